"""A pipeline module whose stages each have a loss."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from accelerate import init_empty_weights
from deepspeed import comm as ds_dist
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from torch import Tensor, nn

from ibp_deepspeed.config.interlocking import InterlockingConfig
from ibp_deepspeed.errors import InterlockingError


class ModuleError(InterlockingError, ValueError):
    """A model that can't be cut or trained as asked."""


class InterlockedPipelineModule(PipelineModule):
    """A :class:`deepspeed.pipe.PipelineModule` with an auxiliary head at the end of every stage but the last.

    Each rank builds its own layers and its own head, nothing else; counting parameters for the partition uses the
    meta device (DeepSpeed builds every layer on every rank for that).

    Args:
        layers: layers or layer specs, as for PipelineModule; the last one's output goes to ``loss_fn``.
        num_stages: K; or give ``topology``.
        topology: axes of parallelism, with ``pipe`` and ``data``.
        loss_fn: ``loss_fn(outputs, labels)`` → scalar tensor, used with every exit.
        aux_head: ``aux_head(stage_id)`` → module applied to h_k; None only for backpropagation. With borrowed layers
            it is built on the next stage, and applied to what that stage's first ``borrow`` layers give.
        interlocking: the configuration, here or in the DeepSpeed JSON (here if it borrows layers).
        partition_method: one of PipelineModule's names, or the K+1 layer indices at which stages begin and end.
        kwargs: PipelineModule's.

    Attributes:
        aux_head: this stage's head, None on the last stage and without heads; with borrowed layers that of the loss
            of the stage before, None on the first stage.
        borrow: layers of each stage that stand before the head of the stage before.
        losses: the losses that this stage computes, in that order; without heads its own number all the same.

    Raises:
        ModuleError: more stages than layers, a world that the stages don't divide, wrong bounds, or stages with too few
            layers to borrow.
    """

    def __init__(
        self,
        layers: Iterable[Any],
        *,
        num_stages: int | None = None,
        topology: Any = None,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        aux_head: Callable[[int], nn.Module] | None,
        interlocking: InterlockingConfig | Mapping[str, Any] | None = None,
        partition_method: str | Sequence[int] = "parameters",
        **kwargs: Any,
    ) -> None:
        layers = list(layers)
        stages = topology.get_dim("pipe") if topology is not None else num_stages
        if stages is None:
            raise ModuleError("give num_stages or topology, neither was given.")
        _check_sizes(len(layers), stages, topology)
        config = None if interlocking is None else InterlockingConfig.parse(interlocking)
        if not isinstance(partition_method, str):
            kwargs["partition_method"] = _Bounds(partition_method, len(layers), stages)
        else:
            kwargs["partition_method"] = partition_method
        super().__init__(layers, num_stages=num_stages, topology=topology, loss_fn=loss_fn, **kwargs)
        self.interlocking = config
        self.has_aux_heads = aux_head is not None
        self.borrow = config.aux_head.borrow if aux_head and config and config.aux_head else 0
        self._check_borrow()
        own, last = self.stage_id - bool(self.borrow), self.num_stages - 1
        self.losses = [loss for loss in sorted({own, last if self.stage_id == last else own}) if loss >= 0]
        self.aux_head: nn.Module | None = aux_head(own) if aux_head and 0 <= own < last else None
        if self.aux_head is not None:
            self.aux_head.to(get_accelerator().device_name(self.local_rank))
        self._check_parameters()

    def trunk(self, inputs: Any) -> Any:
        """f_k: this stage's layers, without DeepSpeed's hooks on the module's call."""
        if self.seed_layers:
            return PipelineModule.forward(self, inputs)
        return self.remaining_layers(self.borrowed_layers(inputs))

    def borrowed_layers(self, inputs: Any) -> Any:
        """The first ``borrow`` layers: h_{k-1} → what the head of the stage before reads."""
        for layer in self.forward_funcs[: self.borrow]:
            inputs = layer(inputs)
        return inputs

    def remaining_layers(self, hidden: Any) -> Any:
        """The layers behind :meth:`borrowed_layers`; both together are the trunk."""
        for layer in self.forward_funcs[self.borrow :]:
            hidden = layer(hidden)
        return hidden

    @property
    def head_boundary(self) -> int:
        """The index of the layer before which this stage's head stands."""
        return self.parts[self.stage_id] + self.borrow if self.borrow else self.parts[self.stage_id + 1]

    def head_places(self) -> dict[int, int]:
        """Of all heads of the pipeline: the layer before which one stands → the stage that holds it."""
        if not self.has_aux_heads:
            return {}
        return {self.parts[k + 1] + self.borrow: k + bool(self.borrow) for k in range(self.num_stages - 1)}

    def trunk_parameters(self) -> list[nn.Parameter]:
        """θ_k, those that are trained."""
        head = {id(p) for p in self.aux_head.parameters()} if self.aux_head is not None else set()
        return [p for p in self.parameters() if p.requires_grad and id(p) not in head]

    def tied_across_stages(self) -> list[str]:
        """Keys of tied layers that live on more than one stage."""
        stages: dict[str, set[int]] = {}
        for index, spec in enumerate(self._layer_specs):
            if isinstance(spec, TiedLayerSpec):
                stages.setdefault(spec.key, set()).add(self.stage_owner(index))
        return sorted(key for key, owners in stages.items() if len(owners) > 1)

    def _partition_layers(self, method: Any = "uniform") -> None:
        """Overrides PipelineModule's: bounds can be given."""
        if not isinstance(method, _Bounds):
            super()._partition_layers(method)
            return
        self.parts = method.bounds
        self._set_bounds(start=self.parts[self.stage_id], stop=self.parts[self.stage_id + 1])

    def _count_layer_params(self) -> list[int]:
        """Overrides PipelineModule's, which builds every layer: count shapes on the meta device."""
        counts = []
        for layer in self._layer_specs:
            if isinstance(layer, LayerSpec):
                with init_empty_weights(include_buffers=True):
                    layer = layer.build()
            parameters = layer.parameters() if isinstance(layer, nn.Module) else []
            counts.append(sum(p.numel() for p in parameters if p.requires_grad))
        return counts

    def _check_borrow(self) -> None:
        if not self.borrow:
            return
        for stage, (low, high) in enumerate(pairwise(self.parts)):
            if stage and high - low <= self.borrow:
                raise ModuleError(
                    f'"interlocking.aux_head.borrow" is {self.borrow}, but stage {stage} has {high - low} layers: it '
                    "needs more than are borrowed. Use fewer stages, or borrow less."
                )
        if self.seed_layers:
            raise ModuleError('seed_layers does not go together with "interlocking.aux_head.borrow".')

    def _check_parameters(self) -> None:
        """DeepSpeed's start-up broadcast views parameters as bytes, which 0-dimensional ones can't be."""
        scalars = [name for name, p in self.named_parameters() if p.dim() == 0]
        if scalars:
            raise ModuleError(f"parameter {scalars[0]} of stage {self.stage_id} has no dimension: make its shape (1,).")
        if not any(p.requires_grad for p in self.parameters()):
            raise ModuleError(f"stage {self.stage_id} has no parameter to train: use fewer stages or other bounds.")

    def save_state_dict(self, save_dir: str, checkpoint_engine: Any, exclude_frozen_params: bool = False) -> None:
        """Overrides PipelineModule's: the stage's head goes to a file of its own beside the layers'."""
        super().save_state_dict(save_dir, checkpoint_engine, exclude_frozen_params)
        if self.aux_head is not None and self._grid.data_parallel_id == 0:
            state = {name: tensor.clone() for name, tensor in self.aux_head.state_dict().items()}
            checkpoint_engine.save(state_dict=state, path=aux_head_path(save_dir, self.head_boundary))

    def load_trunk(self, load_dir: str, checkpoint_engine: Any, strict: bool = True) -> None:
        """This stage's layers, whatever the stages that wrote them."""
        super().load_state_dir(load_dir, checkpoint_engine, strict)

    def load_state_dir(self, load_dir: str, checkpoint_engine: Any, strict: bool = True) -> None:
        """Overrides PipelineModule's: the inverse of :meth:`save_state_dict`."""
        self.load_trunk(load_dir, checkpoint_engine, strict)
        if self.aux_head is None:
            return
        path = aux_head_path(load_dir, self.head_boundary)
        if not os.path.exists(path):
            found = sorted(os.path.basename(p) for p in glob.glob(os.path.join(load_dir, "aux_head_*")))
            raise ModuleError(f"{load_dir} has no head before layer {self.head_boundary}, only {found}.")
        self.aux_head.load_state_dict(checkpoint_engine.load(path, map_location=torch.device("cpu")), strict=strict)


def aux_head_path(folder: str, boundary: int) -> str:
    """The file of the head that stands before layer ``boundary``."""
    return os.path.join(folder, f"aux_head_{boundary:02d}-model_states.pt")


def shared_readout_path(folder: str) -> str:
    """The file of copies that were taken and not yet used."""
    return os.path.join(folder, "shared_readout-model_states.pt")


class _Bounds:
    """Stage bounds in the place of a partition method's name."""

    def __init__(self, bounds: Sequence[int], layers: int, stages: int) -> None:
        self.bounds = [int(b) for b in bounds]
        rising = all(a < b for a, b in zip(self.bounds, self.bounds[1:], strict=False))
        if len(self.bounds) != stages + 1 or self.bounds[0] != 0 or self.bounds[-1] != layers or not rising:
            raise ModuleError(
                f"partition {list(bounds)} is not {stages + 1} rising layer indices from 0 to {layers} for {stages} "
                f"stages of {layers} layers."
            )


def _check_sizes(layers: int, stages: int, topology: Any) -> None:
    if stages > layers:
        raise ModuleError(f"{stages} stages are more than the model's {layers} layers: use at most {layers} stages.")
    world = ds_dist.get_world_size()
    if world % stages:
        raise ModuleError(
            f"{world} processes can't be divided into pipelines of {stages} stages: start a multiple of {stages}."
        )
