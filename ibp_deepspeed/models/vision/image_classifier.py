"""Hugging Face image classifiers cut into pipeline layers: stem, blocks, classifier."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PretrainedConfig

from ibp_deepspeed.config.interlocking import AuxHeadConfig
from ibp_deepspeed.models.cut_model import CutModel, Weights
from ibp_deepspeed.models.errors import ModelError
from ibp_deepspeed.models.partition import balanced_sizes, manual_bounds, sizes_to_bounds
from ibp_deepspeed.models.vision.heads import check_options, make_head
from ibp_deepspeed.models.vision.layers import BlockLayer, ClassifierLayer, StemLayer
from ibp_deepspeed.models.vision.shell import ImageShell, walk
from ibp_deepspeed.objectives.classification import ClassificationLoss
from ibp_deepspeed.objectives.head import Objective
from ibp_deepspeed.strategy.head_placement import HeadPlacement

_NEVER = 10**30  # multiply-adds of a stage that can't be


class ImageClassifier(CutModel):
    """How one Hugging Face image classifier is cut into pipeline layers.

    Args:
        hf_config: of a type in ``ibp_deepspeed.models.vision.shell.PROVEN``; it is copied.
        image_size: S of the images [B, C, S, S], which decides what layers cost; a vision Transformer's has to be its
            config's.
        seed, dtype, weights: see :class:`~ibp_deepspeed.models.cut_model.CutModel`.

    Attributes:
        image_size: S.
        classes: of the logits.

    Raises:
        ModelError: a model that cannot be cut, or images of another size than it takes.
    """

    blocks_called = "blocks"

    def __init__(
        self,
        hf_config: PretrainedConfig,
        image_size: int,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        weights: Weights | None = None,
    ) -> None:
        self._shell, self.image_size = ImageShell(hf_config), image_size
        super().__init__(self._shell, len(self._shell.blocks), seed=seed, dtype=dtype, weights=weights)
        self.classes: int = self.hf_config.num_labels
        self._check_size()

    @property
    def is_convolutional(self) -> bool:
        """Whether it is a residual network."""
        return self._shell.is_convolutional

    def layer_class(self, index: int) -> type[nn.Module]:
        """The class of layer ``index``."""
        return {0: StemLayer, self.num_layers - 1: ClassifierLayer}.get(index, BlockLayer)

    def objective(self, stage: int, options: AuxHeadConfig, after: int) -> Objective:
        """Classes, read out by a head whose random weights depend on seed and stage alone.

        Raises:
            ConfigError: options that heads of images do not have.
        """
        head = make_head(self._shell, options, self.hidden_shapes[after])
        return Objective(self._initialised(head, f"auxiliary head {stage}"))

    def model_key(self, index: int, key: str) -> str:
        """The name in the whole model of a weight of pipeline layer ``index``."""
        return self._shell.model_key(index, key)

    def loss_fn(self, options: AuxHeadConfig | None) -> ClassificationLoss:
        """Cross-entropy of the classes."""
        return ClassificationLoss()

    @cached_property
    def hidden_shapes(self) -> list[torch.Size]:
        """Of the hidden states of one image behind the stem, behind each block, and of its logits."""
        return [hidden.shape for hidden in walk(self._meta_layers(), self._image_shape)]

    @cached_property
    def layer_operations(self) -> list[float]:
        """Multiply-adds of a forward pass of one image through every layer of ``layer_specs``."""
        shapes = [self._image_shape, *self.hidden_shapes[:-1]]
        return [_operations(layer, shape) for layer, shape in zip(self._meta_layers(), shapes, strict=True)]

    def head_operations(self, options: AuxHeadConfig, after: int) -> float:
        """The same of a head behind that many blocks."""
        return _operations(make_head(self._shell, options, self.hidden_shapes[after]), self.hidden_shapes[after])

    def head_parameters(self, options: AuxHeadConfig, after: int) -> int:
        """Parameters of a head behind that many blocks."""
        head = make_head(self._shell, options, self.hidden_shapes[after])
        return sum(parameter.numel() for parameter in head.parameters())

    def partition(
        self,
        num_stages: int,
        *,
        aux_heads: AuxHeadConfig | None,
        exits: Sequence[int] | None = None,
        manual: Sequence[int] | None = None,
    ) -> list[int]:
        """See :meth:`CutModel.partition`; a residual network's head costs what the maps before it make it cost."""
        self._check_stages(num_stages)
        if aux_heads is not None:
            check_options(aux_heads, self.is_convolutional)
        if manual is not None:
            return manual_bounds(manual, num_stages, self.num_layers - 2, self.blocks_called)
        stem, *costs, classifier = map(round, self.layer_operations)
        costs[0] += stem
        costs[-1] += classifier
        placement = HeadPlacement(
            num_stages, aux_heads.borrow if aux_heads else 0, None if exits is None else tuple(exits)
        )
        heads = [0.0] * len(self.hidden_shapes)
        if aux_heads is not None:
            heads = [self.head_operations(aux_heads, after) for after in range(self.num_layers - 1)]
        return sizes_to_bounds(balanced_sizes(costs, [_head_cost(placement, k, heads) for k in range(num_stages)]))

    def _meta_layer(self, index: int) -> nn.Module:
        if self.layer_class(index) is BlockLayer:
            return BlockLayer(self._shell, index - 1)
        return self.layer_class(index)(self._shell)

    def _meta_layers(self) -> list[nn.Module]:
        return [self._meta_layer(index) for index in range(self.num_layers)]

    @property
    def _image_shape(self) -> torch.Size:
        return torch.Size([1, self.hf_config.num_channels, self.image_size, self.image_size])

    def _check_size(self) -> None:
        wanted = getattr(self.hf_config, "image_size", self.image_size)
        if wanted not in (self.image_size, [self.image_size] * 2, (self.image_size,) * 2):
            raise ModelError(
                f"images are {self.image_size} × {self.image_size}, the model takes {wanted}: "
                f"--set image_size={self.image_size}, or images of its size"
            )


def _head_cost(placement: HeadPlacement, stage: int, heads: Sequence[float]) -> int | Callable[[int, int], int]:
    """What the head on a stage costs, by the blocks before it."""
    if placement.head_at(stage) is None:
        return 0
    borrowed = placement.borrowed_from(stage)
    if borrowed:
        # something has to be left behind the head: on the last stage that is the classifier
        last = len(heads) - 1
        return lambda first, end: round(heads[first + borrowed]) if first + borrowed < end + (end == last) else _NEVER
    return lambda first, end: round(heads[end])


def _operations(layer: nn.Module, shape: torch.Size) -> float:
    """Multiply-adds of a layer for one sample of a shape."""
    with FlopCounterMode(display=False) as counter:
        walk([layer], shape)
    return counter.get_total_flops() / 2
