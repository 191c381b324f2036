"""The losses that one stage computes in a batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ibp_deepspeed.stage.module import InterlockedPipelineModule


class StageLosses:
    """Sums over the micro-batches of a batch, by the index of the loss.

    Args:
        module: this stage.
        grid: DeepSpeed's grid of stages and data-parallel ranks.
        device: of the losses.
    """

    def __init__(self, module: InterlockedPipelineModule, grid: Any, device: torch.device) -> None:
        self._module, self._grid, self._device = module, grid, device
        self._sums: dict[int, Tensor] = {}

    def clear(self) -> None:
        """Begin another batch."""
        self._sums = {}

    def take(self, index: int, outputs: Any, labels: Any) -> Tensor:
        """L_index of a micro-batch, a scalar with its graph; it counts from now on."""
        loss_fn = self._module.loss_fn
        loss: Tensor = outputs if loss_fn is None else loss_fn(outputs, labels)
        detached = loss.detach()
        self._sums[index] = self._sums[index] + detached if index in self._sums else detached
        return loss

    def means(self, micro_batches: int) -> dict[int, Tensor]:
        """Means over micro-batches and over the stage's data-parallel ranks, detached; NaN for a missing head."""
        missing = torch.full((), torch.nan, device=self._device)
        means = {index: self._sums.get(index, missing) / micro_batches for index in self._module.losses}
        replicas = self._grid.get_data_parallel_world_size()
        if replicas > 1:
            for mean in means.values():
                dist.all_reduce(mean, group=self._grid.get_data_parallel_group())
                mean /= replicas
        return means
