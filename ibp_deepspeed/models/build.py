"""From a cut model to an interlocked pipeline: stages as processes, or all in one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ibp_deepspeed import InterlockedPipelineModule, InterlockingConfig
from ibp_deepspeed.config.deepspeed import resolve_interlocking
from ibp_deepspeed.models.cut_model import CutModel
from ibp_deepspeed.objectives.head import Objective
from ibp_deepspeed.single_process.virtual_pipeline import VirtualPipeline
from ibp_deepspeed.strategy.head_placement import HeadPlacement


def stage_objective(
    model: CutModel,
    interlocking: InterlockingConfig,
    bounds: Sequence[int],
    stage: int,
    token_counts: Tensor | None = None,
) -> Objective:
    """The objective of the loss of a stage but the last, with its head, on the CPU.

    Args:
        model: the cut model.
        interlocking: with options of the heads.
        bounds: of the stages.
        stage: 0 … K-2.
        token_counts: how often each token occurs in the training data, [V]; for training with ``negatives``.
    """
    assert interlocking.aux_head is not None
    placement = HeadPlacement.from_config(interlocking, len(bounds) - 1)
    objective = model.objective(stage, interlocking.aux_head, after=placement.boundary(stage, bounds) - 1)
    objective.token_counts = token_counts
    return objective


def pipeline_module(
    model: CutModel,
    interlocking: InterlockingConfig,
    num_stages: int,
    manual: Sequence[int] | None = None,
    token_counts: Tensor | None = None,
) -> InterlockedPipelineModule:
    """This rank's stage of a cut model with its head.

    Args:
        model: the cut model.
        interlocking: strategy and options of the heads.
        num_stages: K.
        manual: a partition, see :meth:`CutModel.partition`; None balances the work of layers and heads.
        token_counts: see :func:`stage_objective`.
    """
    options = interlocking.aux_head
    bounds = model.partition(num_stages, aux_heads=options, exits=interlocking.exits_for(num_stages), manual=manual)

    def aux_head(stage: int) -> Objective:
        return stage_objective(model, interlocking, bounds, stage, token_counts)

    return InterlockedPipelineModule(
        model.layer_specs(),
        num_stages=num_stages,
        loss_fn=model.loss_fn(options),
        aux_head=aux_head if options else None,
        interlocking=interlocking,
        partition_method=bounds,
        side_loss=model.side_loss(interlocking),
    )


def virtual_pipeline(
    model: CutModel,
    ds_config: Mapping[str, Any],
    num_stages: int,
    manual: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    monitor: Any = None,
    token_counts: Tensor | None = None,
    kind: Callable[..., VirtualPipeline] = VirtualPipeline,
) -> VirtualPipeline:
    """All stages of a cut model on one device, with the weights that processes would start from.

    Args:
        model: the cut model.
        ds_config: DeepSpeed configuration.
        num_stages: K.
        manual: a partition, see :meth:`CutModel.partition`.
        device: where they go.
        monitor: DeepSpeed's, for the losses.
        token_counts: see :func:`stage_objective`.
        kind: what is built of them.
    """
    interlocking = resolve_interlocking(ds_config)
    options = interlocking.aux_head
    bounds = model.partition(num_stages, aux_heads=options, exits=interlocking.exits_for(num_stages), manual=manual)
    stages = [nn.Sequential(*map(model.build_layer, range(low, high))) for low, high in pairwise(bounds)]
    heads = None
    if options is not None:
        exits = interlocking.exits_for(num_stages)
        heads = [
            stage_objective(model, interlocking, bounds, stage, token_counts) if stage in exits else None
            for stage in range(num_stages - 1)
        ]
    return kind(stages, heads, model.loss_fn(options), ds_config, device, monitor, model.side_loss(interlocking))
