"""Means of the exits' values over micro-batches, weighted by what counts in each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class ExitMeans:
    """Weighted means of K exits, in float64; NaN for an exit without a value.

    Args:
        exits: K.
    """

    def __init__(self, exits: int) -> None:
        self._sums: Tensor = torch.zeros(exits, dtype=torch.float64)
        self._weights = torch.zeros(exits, dtype=torch.float64)

    def add(self, values: Mapping[int, Tensor], weights: Mapping[int, Tensor | float]) -> None:
        """One micro-batch: exit → its value, and how much that counts."""
        for index, value in values.items():
            weight = float(weights[index])
            if value.dim() and self._sums.dim() == 1:
                self._sums = self._sums.unsqueeze(1).repeat(1, len(value))
            self._sums[index] += value.double().cpu() * weight
            self._weights[index] += weight

    def means(self) -> Tensor:
        """Shape [K], or [K, m] where each exit has m values in a micro-batch."""
        return self._sums / (self._weights.unsqueeze(1) if self._sums.dim() > 1 else self._weights)


def weight_of(measure: Any, labels: Any) -> Tensor | float:
    """How much a micro-batch counts in a mean: what ``measure.weight(labels)`` says, or 1."""
    weigh = getattr(measure, "weight", None)
    return 1.0 if weigh is None else weigh(labels)
