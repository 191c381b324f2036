"""Losses that jump, told apart from noise."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

WINDOW = 100
"""Batches before that a loss is compared with."""
LEAST = 30
"""Of them, before anything is called a jump."""
_DEVIATIONS = 7.0
_TO_DEVIATION = 1.4826  # of a normal distribution: its standard deviation over its median absolute deviation
_LEAST_DEVIATION = 0.01  # of the median: nearly constant losses have none
_SHOWN = 16  # sample ids in a line


class Spike(NamedTuple):
    """A loss that jumped.

    Attributes:
        stage: of the exit, from 0.
        loss: of the batch.
        median: of the batches before.
        batches: how many these are.
    """

    stage: int
    loss: float
    median: float
    batches: int


class SpikeWatch:
    """The newest losses of all exits.

    A loss has jumped if it is more than 7 standard deviations above the median of the last 100 batches. The deviation
    is taken from the median absolute deviation, which a few outliers don't move (Leys et al. 2013), and is at least 1%
    of the median. Of a loss that stays up the first batch is told alone. Losses that are infinite or not a number are
    left to ``"non_finite"``.
    """

    def __init__(self) -> None:
        self._recent: list[deque[float]] = []
        self._is_up: list[bool] = []

    def add(self, losses: Sequence[float]) -> list[Spike]:
        """The losses of the next batch, by stage, NaN where there is none; returns those that have jumped."""
        if len(losses) != len(self._recent):  # the first, or of a run that had another number of stages
            self._recent = [deque(maxlen=WINDOW) for _ in losses]
            self._is_up = [False] * len(losses)
        spikes = []
        for stage, (loss, recent) in enumerate(zip(losses, self._recent, strict=True)):
            if not np.isfinite(loss):
                continue
            median, limit = _usual(recent)
            if loss > limit and not self._is_up[stage]:
                spikes.append(Spike(stage, loss, median, len(recent)))
            self._is_up[stage] = loss > limit
            recent.append(loss)
        return spikes


def in_words(batch: int, spikes: Sequence[Spike], samples: Sequence[int]) -> str:
    """A line for the user.

    Args:
        batch: from 1.
        spikes: of it.
        samples: ids of its samples.
    """
    exits = ", ".join(
        f"the loss of exit {spike.stage + 1} jumped to {spike.loss:.3f} (median of the {spike.batches} batches before: "
        f"{spike.median:.3f})"
        for spike in spikes
    )
    shown = ", ".join(map(str, samples[:_SHOWN]))
    more = f" and {len(samples) - _SHOWN} more, all in history.jsonl" if len(samples) > _SHOWN else ""
    return f"batch {batch}: {exits}; its samples are {shown}{more}"


def _usual(recent: Sequence[float]) -> tuple[float, float]:
    """The median of losses, and the limit above which another one has jumped."""
    if len(recent) < LEAST:
        return np.nan, np.inf
    values = np.array(recent)
    median = float(np.median(values))
    deviation = _TO_DEVIATION * float(np.median(np.abs(values - median)))
    return median, median + _DEVIATIONS * max(deviation, _LEAST_DEVIATION * abs(median))
