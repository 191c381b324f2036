"""A pipeline module whose stages each have a loss."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import init_empty_weights
from deepspeed import comm as ds_dist
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from torch import Tensor, nn

from ibp_deepspeed.checkpoint import layout
from ibp_deepspeed.config.interlocking import InterlockingConfig
from ibp_deepspeed.errors import ModuleError
from ibp_deepspeed.objectives.head import Objective, as_objective, last_objective
from ibp_deepspeed.objectives.side_loss import MakeSideLoss, SideLoss
from ibp_deepspeed.optimizer.matrices import inner_matrices
from ibp_deepspeed.optimizer.parameter_groups import PLACEHOLDER
from ibp_deepspeed.strategy.head_placement import HeadPlacement


class InterlockedPipelineModule(PipelineModule):
    """A :class:`deepspeed.pipe.PipelineModule` with an auxiliary head at every exit but the last stage's own.

    Each rank builds its own layers and its own head, nothing else; counting parameters for the partition uses the
    meta device (DeepSpeed builds every layer on every rank for that).

    Args:
        layers: layers or layer specs, as for PipelineModule; the last one's output goes to ``loss_fn``.
        num_stages: K; or give ``topology``.
        topology: axes of parallelism, with ``pipe`` and ``data``.
        loss_fn: ``loss_fn(outputs, labels)`` → scalar tensor, used with every exit; if it has a method
            ``weight(labels)``, evaluations weight micro-batches by it.
        aux_head: ``aux_head(stage_id)`` → the head of the loss of that stage, a module applied to h_k, or an
            :class:`~ibp_deepspeed.objectives.head.Objective`; None only for backpropagation. With borrowed layers it is
            built on the next stage, and applied to what that stage's first ``borrow`` layers give.
        interlocking: the configuration, here or in the DeepSpeed JSON.
        partition_method: one of PipelineModule's names, or the K+1 layer indices at which stages begin and end.
        side_loss: a loss of a stage's own layers, a part of all exits' losses behind it.
        kwargs: PipelineModule's.

    Attributes:
        placement: where the heads of all stages stand.
        objectives: of the losses that this stage computes, by their index.
        aux_head: the module of this stage's head, None where there is none.
        frozen_stages: those whose trunk has nothing to train, known from :func:`ibp_deepspeed.initialize` on.

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
        aux_head: Callable[[int], nn.Module | Objective] | None,
        interlocking: InterlockingConfig | Mapping[str, Any] | None = None,
        partition_method: str | Sequence[int] = "parameters",
        side_loss: MakeSideLoss | None = None,
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
        self._make_head = aux_head
        self.aux_head: nn.Module | None = None
        self.objectives: dict[int, Objective] = {}
        self.frozen_stages: tuple[int, ...] = ()
        self.side_loss = side_loss
        provisional = config or InterlockingConfig()
        self._place_heads(HeadPlacement.from_config(provisional, self.num_stages, self.has_aux_heads))
        self.configure(provisional)
        self._check_parameters()

    def mpu(self) -> NoReturn:
        """Overrides PipelineModule's, which ``deepspeed.initialize`` asks for its grid.

        Raises:
            ModuleError: always; DeepSpeed's engine would train plain backpropagation in silence.
        """
        raise ModuleError(
            "an InterlockedPipelineModule is trained with ibp_deepspeed.initialize: deepspeed.initialize would train "
            "plain backpropagation."
        )

    @property
    def grid(self) -> Any:
        """DeepSpeed's grid of stages and replicas."""
        return self._grid

    def configure(self, interlocking: InterlockingConfig) -> bool:
        """Take over what the configuration says of heads, and build this stage's where it stands.

        Called by :func:`ibp_deepspeed.initialize` with the configuration that counts, where that is not known before.

        Returns:
            whether heads that existed had to move, to or from borrowed layers.

        Raises:
            ModuleError: a stage has too few layers to borrow.
        """
        placement = HeadPlacement.from_config(interlocking, self.num_stages, self.has_aux_heads)
        moved = placement != self.placement
        if moved:
            self._place_heads(placement)
        for loss, objective in self.objectives.items():
            objective.configured(None if loss == self.num_stages - 1 else interlocking.aux_head, self.loss_fn)
        return moved

    def trunk(self, inputs: Any) -> Any:
        """f_k: this stage's layers, without DeepSpeed's hooks on the module's call."""
        if self.seed_layers:
            return PipelineModule.forward(self, inputs)
        return self.remaining_layers(self.borrowed_layers(inputs))

    def side_loss_of_layers(self) -> SideLoss | None:
        """That of this stage's layers, right after their forward pass."""
        return None if self.side_loss is None else self.side_loss(self.forward_funcs)

    def borrowed_layers(self, inputs: Any) -> Any:
        """The layers that stand before the head of the stage before, if any: h_{k-1} → what that head reads."""
        for layer in self.forward_funcs[: self.placement.borrowed_from(self.stage_id)]:
            inputs = layer(inputs)
        return inputs

    def remaining_layers(self, hidden: Any) -> Any:
        """The layers behind :meth:`borrowed_layers`; both together are the trunk."""
        for layer in self.forward_funcs[self.placement.borrowed_from(self.stage_id) :]:
            hidden = layer(hidden)
        return hidden

    @property
    def losses(self) -> list[int]:
        """The losses that this stage reports, in that order."""
        return self.placement.reported_at(self.stage_id)

    @property
    def head_boundary(self) -> int | None:
        """The index of the layer before which this stage's head stands."""
        loss = self.placement.head_at(self.stage_id)
        return None if loss is None else self.placement.boundary(loss, self.parts)

    def trunk_parameters(self) -> list[nn.Parameter]:
        """θ_k, those that are trained."""
        others = {id(p) for p in self.aux_head.parameters()} if self.aux_head is not None else set()
        return [
            p for name, p in self.named_parameters() if p.requires_grad and id(p) not in others and name != PLACEHOLDER
        ]

    def inner_matrices(self) -> list[nn.Parameter]:
        """What Muon trains of this stage."""
        last = self.stage_id == self.num_stages - 1
        return inner_matrices(self.forward_funcs, first=self.stage_id == 0, last=last, head=self.aux_head)

    def give_optimizer_something(self) -> None:
        """On a stage with nothing to train: one number that nobody uses, because DeepSpeed's optimizers need a
        parameter."""
        if not any(parameter.requires_grad for parameter in self.parameters()):
            device = get_accelerator().device_name(self.local_rank)
            self.register_parameter(PLACEHOLDER, nn.Parameter(torch.zeros(1, device=device)))

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

    def _place_heads(self, placement: HeadPlacement) -> None:
        """Make the objectives of the losses that this stage computes; the head's module becomes a part of this one."""
        self._check_borrow(placement)
        loss = placement.head_at(self.stage_id)
        self.placement, self.aux_head, self.objectives = placement, None, {}
        if loss is not None and self._make_head is not None:
            self.objectives[loss] = as_objective(self._make_head(loss))
            self.aux_head = self.objectives[loss].module.to(get_accelerator().device_name(self.local_rank))
        if self.stage_id == self.num_stages - 1:
            self.objectives[self.stage_id] = last_objective()

    def _check_borrow(self, placement: HeadPlacement) -> None:
        if not placement.borrow:
            return
        if self.side_loss is not None:
            raise ModuleError('a side_loss does not go together with "interlocking.aux_head.borrow".')
        for stage, (low, high) in enumerate(pairwise(self.parts)):
            if high - low <= placement.borrowed_from(stage):
                raise ModuleError(
                    f'"interlocking.aux_head.borrow" is {placement.borrow}, but stage {stage} has {high - low} layers: '
                    "it needs more than are borrowed. Use fewer stages, or borrow less."
                )
        if self.seed_layers:
            raise ModuleError('seed_layers does not go together with "interlocking.aux_head.borrow".')

    def _check_parameters(self) -> None:
        """DeepSpeed's start-up broadcast views parameters as bytes, which 0-dimensional ones can't be."""
        scalars = [name for name, p in self.named_parameters() if p.dim() == 0]
        if scalars:
            raise ModuleError(f"parameter {scalars[0]} of stage {self.stage_id} has no dimension: make its shape (1,).")

    def save_state_dict(self, save_dir: str, checkpoint_engine: Any, exclude_frozen_params: bool = False) -> None:
        """Overrides PipelineModule's: the stage's head goes to a file of its own beside the layers'."""
        super().save_state_dict(save_dir, checkpoint_engine, exclude_frozen_params)
        if self.aux_head is not None and self._grid.data_parallel_id == 0:
            state = {name: tensor.clone() for name, tensor in self.aux_head.state_dict().items()}
            checkpoint_engine.save(state_dict=state, path=self._head_path(save_dir))

    def load_trunk(self, load_dir: str, checkpoint_engine: Any, strict: bool = True) -> None:
        """This stage's layers, whatever the stages that wrote them."""
        super().load_state_dir(load_dir, checkpoint_engine, strict)

    def load_state_dir(self, load_dir: str, checkpoint_engine: Any, strict: bool = True) -> None:
        """Overrides PipelineModule's: the inverse of :meth:`save_state_dict`."""
        self.load_trunk(load_dir, checkpoint_engine, strict)
        if self.aux_head is None:
            return
        path = self._head_path(load_dir)
        if not os.path.exists(path):
            found = sorted(p.name for p in Path(load_dir).glob(layout.ANY_AUX_HEAD))
            raise ModuleError(f"{load_dir} has no head before layer {self.head_boundary}, only {found}.")
        self.aux_head.load_state_dict(checkpoint_engine.load(path, map_location=torch.device("cpu")), strict=strict)

    def _head_path(self, folder: str) -> str:
        assert self.head_boundary is not None
        return os.path.join(folder, layout.aux_head(self.head_boundary))


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
