"""Means of the exits' values over micro-batches, weighted by what counts in each."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class ExitMeans:
    """Weighted means of K exits, in float64; NaN for an exit without a value.

    Args:
        exits: K.
    """

    def __init__(self, exits: int) -> None:
        self._sums = torch.zeros(exits, dtype=torch.float64)
        self._weights = torch.zeros(exits, dtype=torch.float64)

    def add(self, values: Mapping[int, Tensor], weights: Mapping[int, Tensor | float]) -> None:
        """One micro-batch: exit → its value, and how much that counts."""
        for index, value in values.items():
            weight = float(weights[index])
            self._sums[index] += value.double().item() * weight
            self._weights[index] += weight

    def means(self) -> Tensor:
        """Shape [K]."""
        return self._sums / self._weights
