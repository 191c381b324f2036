"""What a stage counts of itself while it trains, for its reports."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ibp_deepspeed.comm.waits import Waits
from ibp_deepspeed.measures import BATCH_TIME, IN_FLIGHT, WAITING, WAITING_FOR


class StageMeters:
    """Counts since the last :meth:`take`; between two of them only numbers are added.

    Args:
        waits: of the stage's links.
    """

    def __init__(self, waits: Waits) -> None:
        self._waits = waits
        self._in_flight = self._most = self._batches = 0
        self._seconds = 0.0

    def micro_batch_begins(self) -> None:
        """One more is in flight."""
        self._in_flight += 1
        self._most = max(self._most, self._in_flight)

    def micro_batch_ends(self) -> None:
        """All of its work is done."""
        self._in_flight -= 1

    def batch_ends(self, seconds: float) -> None:
        """A batch took so long from the call to the return of ``train_batch``."""
        self._batches += 1
        self._seconds += seconds

    def take(self) -> dict[str, float]:
        """Name → value of the batches since the last time, at least one of them; begins again."""
        waited, seconds = self._waits.take(), self._seconds
        measures = {BATCH_TIME: seconds / self._batches, IN_FLIGHT: float(self._most)}
        measures[WAITING] = sum(waited.values()) / seconds
        measures |= {WAITING_FOR[cause]: wait / seconds for cause, wait in waited.items()}
        self._most, self._batches, self._seconds = self._in_flight, 0, 0.0
        return measures


class Agreement:
    """Whether a stage's own loss and the later ones want the same of its output h_k: the cosine of their gradients.

    Both gradients are taken over all micro-batches of a batch, as one long vector.

    Args:
        device: of the hidden states.
    """

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)

    def add(self, gradients: Mapping[int, Tensor], own: int, weights: Mapping[int, float]) -> None:
        """A micro-batch; nothing where one of the two gradients does not exist.

        Args:
            gradients: loss index → dL/dh_k.
            own: index of the stage's own loss.
            weights: loss index → weight in the trunk's gradient; of the received ones this sum counts.
        """
        received = [gradients[loss] * weight for loss, weight in weights.items() if loss != own and loss in gradients]
        if own not in gradients or not received:
            return
        one, other = gradients[own].float().flatten(), torch.stack(received).sum(0).float().flatten()
        self._sums += torch.stack([one @ other, one @ one, other @ other])

    def sums(self) -> Tensor:
        """Scalar product and the two squared lengths, [3] in float64: to be added up over replicas, in place."""
        return self._sums

    def cosine(self) -> Tensor:
        """-1 … 1; NaN where there was nothing to compare."""
        product, *squares = self._sums
        length = math.prod(square.sqrt() for square in squares)
        return product / length
