"""The losses that one stage computes in a batch, or in an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class StageLosses:
    """Weighted sums over micro-batches, by the index of the loss.

    Args:
        grid: DeepSpeed's grid of stages and data-parallel ranks.
        device: of the losses.
    """

    def __init__(self, grid: Any, device: torch.device) -> None:
        self._grid, self._device = grid, device
        self._sums: dict[int, Tensor] = {}
        self._weights: dict[int, Tensor | float] = {}

    def clear(self) -> None:
        """Begin another batch."""
        self._sums, self._weights = {}, {}

    def add(self, index: int, loss: Tensor, weight: Tensor | float | None = None) -> None:
        """L_index of a micro-batch, a scalar (or several numbers): it counts from now on, by its weight (None: all
        alike)."""
        value = loss.detach() if weight is None else loss.detach() * weight
        self._sums[index] = self._sums[index] + value if index in self._sums else value
        self._weights[index] = self._weights.get(index, 0) + (1 if weight is None else weight)

    def not_finite(self) -> list[int]:
        """The losses of which a micro-batch of this rank was infinite or not a number."""
        return [index for index, total in self._sums.items() if not bool(torch.isfinite(total))]

    def means(self, indices: Sequence[int]) -> dict[int, Tensor]:
        """Means over micro-batches and data-parallel ranks of the stage, detached; NaN where nobody computes one."""
        missing = torch.full((), torch.nan, device=self._device)
        return {index: self._mean(self._sums.get(index, missing), self._weights.get(index, 1)) for index in indices}

    def _mean(self, total: Tensor, weight: Tensor | float) -> Tensor:
        if self._grid.get_data_parallel_world_size() == 1:
            return total / weight
        weight = torch.as_tensor(weight, dtype=torch.float64, device=total.device)
        both = torch.cat([total.double().reshape(-1), weight.reshape(-1)])
        dist.all_reduce(both, group=self._grid.get_data_parallel_group())
        return (both[:-1] / both[-1]).view_as(total).to(total.dtype)
