"""All exits of a trained image classifier in one process: every head and the model's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ibp_deepspeed.config.interlocking import InterlockingConfig
from ibp_deepspeed.data.image_sources import open_images
from ibp_deepspeed.data.images import ImageData
from ibp_deepspeed.models.build import stage_objective
from ibp_deepspeed.models.errors import ModelError
from ibp_deepspeed.models.runs.checkpoint import Checkpoint
from ibp_deepspeed.models.vision.assemble import assemble
from ibp_deepspeed.models.vision.image_classifier import ImageClassifier
from ibp_deepspeed.objectives.evaluation import ExitMeans, weight_of
from ibp_deepspeed.strategy.head_placement import HeadPlacement


class ImageExits:
    """A checkpoint's classifier with its K exits, on one device. Exit k is behind the first k stages; exit K the model.

    Args:
        path: the checkpoint, see :class:`ibp_deepspeed.models.runs.checkpoint.Checkpoint`.
        device: where the layers go.

    Raises:
        ModelError: a file that is missing or does not fit, or a checkpoint of something else.
    """

    def __init__(self, path: str | Path, device: torch.device | str = "cpu") -> None:
        self.checkpoint = Checkpoint(path)
        self.folder, self.description = self.checkpoint.folder, self.checkpoint.description
        if self.description.images is None:
            raise ModelError(
                f"{self.folder} is a checkpoint of a language model: use evaluate_lm.py and convert_hf.py."
            )
        self.interlocking = InterlockingConfig.parse(self.description.interlocking)
        self.placement = HeadPlacement.from_config(self.interlocking, len(self), self.interlocking.aux_head is not None)
        hf_config, size = self.description.hf_config(), self.description.images.size
        self.model = ImageClassifier(hf_config, size, weights=self.checkpoint)
        self.device = torch.device(device)

    def __len__(self) -> int:
        """K."""
        return len(self.description.bounds) - 1

    @cached_property
    def layers(self) -> list[nn.Module]:
        """All pipeline layers, in fp32, with their running statistics."""
        return [self._ready(self.model.build_layer(index)) for index in range(self.model.num_layers)]

    @cached_property
    def heads(self) -> dict[int, nn.Module]:
        """Boundary → the head before that layer."""
        found = {}
        for loss in self.placement.heads:
            boundary = self.placement.boundary(loss, self.description.bounds)
            state = self.checkpoint.head_state(boundary)
            if state is None:
                continue
            head = stage_objective(self.model, self.interlocking, self.description.bounds, loss).module
            try:
                head.load_state_dict({n: t.float() if t.is_floating_point() else t for n, t in state.items()})
            except RuntimeError as error:
                reason = str(error).splitlines()[-1].strip()
                raise ModelError(f"the head of exit {loss + 1} in {self.folder} doesn't fit: {reason}") from error
            found[boundary] = self._ready(head)
        return found

    @torch.no_grad()
    def logits(self, images: Tensor) -> dict[int, Tensor]:
        """Exit (1 … K) → logits [B, C] of normalised images [B, 3 or 1, S, S]."""
        exits = {self.placement.boundary(k, self.description.bounds): k + 1 for k in self.placement.heads}
        found, hidden = {}, images.to(self.device)
        for behind, layer in enumerate(self.layers, 1):
            hidden = layer(hidden)
            if behind in self.heads:
                found[exits[behind]] = self.heads[behind](hidden)
        return {**found, len(self): hidden}

    def eval_batch(
        self, data_iter: Iterator[Any], num_micro_batches: int, measure: Callable[[Any, Any], Tensor]
    ) -> Tensor:
        """What a measure gives for the K exits, as a pipeline's ``eval_batch``; NaN where there is no head. [K, m]"""
        means = ExitMeans(len(self))
        for images, labels, _ in islice(data_iter, num_micro_batches):
            labels = labels.to(self.device)
            values = {k - 1: measure(made, labels) for k, made in self.logits(images).items()}
            means.add(values, {k: weight_of(measure, labels) for k in values})
        return means.means()

    def data(self, source: str | None = None) -> ImageData:
        """The images that it was trained on, or others, with its size and its training data's statistics.

        Raises:
            DataError: they can't be read.
            ModelError: they have other classes.
        """
        reads = self.description.images
        assert reads is not None
        name = source or str(self.description.data)
        opened = open_images(name, reads.size, self.model.hf_config.num_channels, reads.held_out_fraction)
        found = replace(opened, known=(reads.mean, reads.deviation))
        classes = list(self.model.hf_config.id2label.values())
        if list(found.classes) != classes:
            raise ModelError(f"{name} has the classes {list(found.classes)!r:.80}, the model {classes!r:.80}.")
        return found

    def to_hugging_face(self) -> PreTrainedModel:
        """The whole model without the heads."""
        layers = range(self.model.num_layers)
        return assemble(self.model.hf_config, {index: self.checkpoint.layer_state(index) for index in layers})

    def _ready(self, module: nn.Module) -> nn.Module:
        return module.to(self.device).eval().requires_grad_(False)
