"""A model cut into pipeline layers, whatever it reads: what building, training, saving and exits ask of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from deepspeed.pipe import LayerSpec
from torch import Tensor, nn
from transformers import PretrainedConfig

from ibp_deepspeed.config.interlocking import AuxHeadConfig, InterlockingConfig
from ibp_deepspeed.models.errors import ModelError
from ibp_deepspeed.models.meta import MetaModel
from ibp_deepspeed.objectives.head import LossFn, Objective
from ibp_deepspeed.objectives.side_loss import MakeSideLoss


class Weights(Protocol):
    """Where the weights of pipeline layers are read from."""

    def layer(self, index: int, names: Sequence[str]) -> Mapping[str, Tensor]:
        """Those of ``names`` in the state dict of layer ``index`` of a cut model.

        Raises:
            ModelError: one is missing or can't be read.
        """


class CutModel(ABC):
    """How one Hugging Face model is cut into an input layer, blocks and an output layer.

    Layers are built one at a time, on the CPU, with random weights that depend on the seed and the layer's index
    alone: not on the number of stages, nor on what else was built; or with given weights.

    Args:
        shell: the model without weights.
        blocks: layers between the first and the last one.
        seed: of all initial weights.
        dtype: of all parameters; initial values are drawn in fp32 and rounded to it.
        weights: of the layers, instead of random ones.

    Attributes:
        hf_config: the model's, an own copy.
        num_layers: blocks + 2.
    """

    blocks_called = "layers"
    """What the blocks are called in messages."""

    def __init__(
        self, shell: MetaModel, blocks: int, *, seed: int, dtype: torch.dtype, weights: Weights | None
    ) -> None:
        self._meta, self._seed, self._dtype, self._weights = shell, seed, dtype, weights
        self.hf_config: PretrainedConfig = shell.hf_config
        self.num_layers = blocks + 2

    def layer_specs(self) -> list[LayerSpec]:
        """[input layer, blocks, output layer] for ``PipelineModule``; each builds its layer with real weights."""
        return [_CutLayerSpec(self, index) for index in range(self.num_layers)]

    def build_layer(self, index: int) -> nn.Module:
        """Layer ``index`` of ``layer_specs`` with real weights on the CPU.

        Raises:
            ModelError: the given weights lack one, or have one of another shape.
        """
        module = self._meta_layer(index)
        values = self._weights.layer(index, list(module.state_dict())) if self._weights is not None else {}
        return self._initialised(module, f"layer {index}", values)

    def empty_layer(self, index: int) -> nn.Module:
        """Layer ``index`` on the CPU with weights of no value, which takes no time."""
        return self._meta_layer(index).to_empty(device="cpu")

    def parameter_counts(self) -> list[int]:
        """Parameters of every layer of ``layer_specs``; nothing is materialised."""
        return [count_parameters(self._meta_layer(index)) for index in range(self.num_layers)]

    @abstractmethod
    def layer_class(self, index: int) -> type[nn.Module]:
        """The class of layer ``index``."""

    @abstractmethod
    def objective(self, stage: int, options: AuxHeadConfig, after: int) -> Objective:
        """That of a stage but the last, with its head on the CPU.

        Args:
            stage: whose loss it is.
            options: of the head.
            after: blocks of the model before the head.
        """

    @abstractmethod
    def loss_fn(self, options: AuxHeadConfig | None) -> LossFn:
        """The loss of all exits; ``options``: of the heads, None without any."""

    def side_loss(self, interlocking: InterlockingConfig) -> MakeSideLoss | None:
        """A loss of each stage's own; None: there is none.

        Raises:
            ModelError: the model's config asks for one that does not go together with these settings.
        """
        return None

    @abstractmethod
    def partition(
        self,
        num_stages: int,
        *,
        aux_heads: AuxHeadConfig | None,
        exits: Sequence[int] | None = None,
        manual: Sequence[int] | None = None,
    ) -> list[int]:
        """Bounds of the stages in ``layer_specs``: stage k has the layers bounds[k] … bounds[k+1]-1.

        The slowest stage is as fast as it can be; of such partitions the most even one is taken. Every stage has a
        block.

        Args:
            num_stages: K, from 1 to the number of blocks.
            aux_heads: options of the auxiliary heads that count; None: there are none.
            exits: the stages that have a loss; None: all.
            manual: instead, K numbers of blocks, or K+1 bounds.

        Returns:
            K+1 numbers from 0 to ``num_layers``.

        Raises:
            ModelError: more stages than blocks, or a manual partition that does not fit.
        """

    @abstractmethod
    def _meta_layer(self, index: int) -> nn.Module:
        """Layer ``index``, its parameters on meta."""

    def _check_stages(self, num_stages: int) -> None:
        blocks = self.num_layers - 2
        if not 1 <= num_stages <= blocks:
            raise ModelError(
                f"{num_stages} stages do not fit a model with {blocks} {self.blocks_called}: every stage needs "
                f"at least one, so choose 1 to {blocks} stages"
            )

    def _initialised(self, module: nn.Module, part: str, values: Mapping[str, Tensor] | None = None) -> nn.Module:
        self._meta.initialise(module, part, self._seed, self._dtype, values or {})
        return module

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.hf_config.model_type})"


class _CutLayerSpec(LayerSpec):  # type: ignore[misc]
    """One layer of a cut model, built by the model that knows the whole."""

    def __init__(self, model: CutModel, index: int) -> None:
        super().__init__(model.layer_class(index), model, index)

    def build(self, log: bool = False) -> nn.Module:
        model, index = self.module_args
        return model.build_layer(index)


def count_parameters(module: nn.Module) -> int:
    """Elements of all of its parameters."""
    return sum(parameter.numel() for parameter in module.parameters())
