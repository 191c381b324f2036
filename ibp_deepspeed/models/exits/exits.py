"""All exits of a trained model in one process: every head and the model's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ibp_deepspeed.batches import position_ids
from ibp_deepspeed.config.interlocking import InterlockingConfig
from ibp_deepspeed.documents import Documents, reading
from ibp_deepspeed.models.build import stage_objective
from ibp_deepspeed.models.causal_lm import CausalLM
from ibp_deepspeed.models.errors import ModelError
from ibp_deepspeed.models.hf.assemble import assemble, exit_parts
from ibp_deepspeed.models.runs.checkpoint import Checkpoint
from ibp_deepspeed.objectives.cross_entropy import CausalLMLoss, LazyLogits
from ibp_deepspeed.objectives.evaluation import ExitMeans
from ibp_deepspeed.objectives.head import Objective, last_objective
from ibp_deepspeed.strategy.head_placement import HeadPlacement

Watch = Callable[[dict[int, LazyLogits], Tensor], None]
"""Takes exit → its logits [B, S, V], and the labels [B, S]."""


class Exits:
    """A checkpoint's model with its K exits, on one device. Exit k is behind the first k stages; exit K is the model.

    Args:
        path: the checkpoint, see :class:`ibp_deepspeed.models.checkpoint.Checkpoint`.
        device: where the layers go.

    Raises:
        ModelError: a file that is missing or does not fit.
    """

    def __init__(self, path: str | Path, device: torch.device | str = "cpu") -> None:
        self.checkpoint = Checkpoint(path)
        self.folder, self.description = self.checkpoint.folder, self.checkpoint.description
        if self.description.images is not None:
            raise ModelError(f"{self.folder} is of an image classifier: evaluate_vision.py reads and exports it.")
        self.interlocking = InterlockingConfig.parse(self.description.interlocking)
        self.placement = HeadPlacement.from_config(self.interlocking, len(self), self.interlocking.aux_head is not None)
        self.hf_config = self.description.hf_config()
        self.model = CausalLM(self.hf_config, weights=self.checkpoint)
        self.device = torch.device(device)

    def __len__(self) -> int:
        """K."""
        return len(self.description.bounds) - 1

    @cached_property
    def layers(self) -> list[nn.Module]:
        """All pipeline layers, in fp32."""
        return [self._ready(self.model.build_layer(index)) for index in range(self.model.num_layers)]

    @cached_property
    def objectives(self) -> dict[int, Objective]:
        """Exit (1 … K) → its objective in fp32: those whose head the checkpoint has, and the model's own."""
        states = {loss + 1: self.checkpoint.head_state(self.boundary(loss + 1)) for loss in self.placement.heads}
        found = {exit_: self._objective(exit_, state) for exit_, state in states.items() if state is not None}
        return {**found, len(self): last_objective().configured(None, CausalLMLoss())}

    def boundary(self, exit_: int) -> int:
        """The pipeline layer before which an exit's head stands."""
        return self.placement.boundary(exit_ - 1, self.description.bounds)

    def check(self, exit_: int) -> None:
        """Raises a ModelError when there is no such exit."""
        if exit_ not in self.objectives:
            there = ", ".join(map(str, self.objectives))
            raise ModelError(f"{self.folder} has no exit {exit_}: its exits are {there} (the last one is the model).")

    @torch.no_grad()
    def eval_batch(
        self, data_iter: Iterator[tuple[Tensor, ...]], num_micro_batches: int, watch: Watch | None = None
    ) -> Tensor:
        """Held-out losses of the K exits as a pipeline's ``eval_batch`` gives them, NaN where there is no head. [K]

        ``watch`` is shown each micro-batch's logits and labels.
        """
        means = ExitMeans(len(self))
        for micro_batch in islice(data_iter, num_micro_batches):
            input_ids, labels = micro_batch[0], micro_batch[1].to(self.device)
            with reading(Documents.of(position_ids(micro_batch), self.device)):
                outputs = self._all_outputs(input_ids)
            if watch is not None:
                watch(outputs, labels)
            values = {k - 1: self.objectives[k].measure(made, labels) for k, made in outputs.items()}
            means.add(values, {k - 1: self.objectives[k].weight(labels) for k in outputs})
        return means.means()

    def _all_outputs(self, input_ids: Tensor) -> dict[int, LazyLogits]:
        """Exit → its logits, in one pass over the layers."""
        readers = {self.boundary(exit_): exit_ for exit_ in self.objectives if exit_ < len(self)}
        outputs, hidden = {}, input_ids.to(self.device)
        for behind, layer in enumerate(self.layers, 1):
            hidden = layer(hidden)
            if behind in readers:
                outputs[readers[behind]] = self.objectives[readers[behind]].outputs(hidden)
        return {**outputs, len(self): hidden}

    def shared_layers(self, exit_: int) -> int:
        """Decoder layers of an exit that are the model's first ones; behind them are blocks of its head."""
        return self.model.num_layers - 2 if exit_ == len(self) else self.boundary(exit_) - 1

    def depth(self, exit_: int) -> int:
        """Decoder layers that an exit's logits have gone through, blocks of its head included."""
        if exit_ == len(self):
            return self.model.num_layers - 2
        return self.shared_layers(exit_) + self.objectives[exit_].inner_layers

    @torch.no_grad()
    def lazy_logits(self, input_ids: Tensor, exit_: int) -> LazyLogits:
        """An exit's logits [B, S, V], in fp32, of the documents at hand."""
        self.check(exit_)
        hidden = input_ids.to(self.device)
        for layer in self.layers[: self.boundary(exit_)] if exit_ < len(self) else self.layers:
            hidden = layer(hidden)
        logits: LazyLogits = self.objectives[exit_].outputs(hidden)
        return logits

    def to_hugging_face(self, exit_: int | None = None) -> PreTrainedModel:
        """The whole model without the heads, or the first stages with an exit's head as a smaller model.

        Its logits are those of the exit where the model's architecture has a place for everything in the head, which
        :func:`ibp_deepspeed.models.hub_folder.write` finds out.

        Raises:
            ModelError: there is no such exit.
        """
        exit_ = len(self) if exit_ is None else exit_
        self.check(exit_)
        if exit_ == len(self):
            return assemble(self.hf_config, {i: self.checkpoint.layer_state(i) for i in range(self.model.num_layers)})
        below = [self.checkpoint.layer_state(index) for index in range(self.boundary(exit_))]
        return assemble(*exit_parts(self.hf_config, below, self.objectives[exit_].as_layers()))

    def _objective(self, exit_: int, state: dict[str, Tensor]) -> Objective:
        objective = stage_objective(self.model, self.interlocking, self.description.bounds, exit_ - 1)
        try:
            objective.module.load_state_dict({name: tensor.float() for name, tensor in state.items()})
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise ModelError(f"the head of exit {exit_} in {self.folder} doesn't fit the model: {reason}") from error
        self._ready(objective.module)
        return objective.configured(self.interlocking.aux_head, CausalLMLoss())

    def _ready(self, module: nn.Module) -> nn.Module:
        return module.to(self.device).eval().requires_grad_(False)
