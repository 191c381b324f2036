"""The record of some batches of a run: who did what from when to when, on one clock."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

WEIGHTS = "WeightGradient"
"""Kind of a span in which weight gradients that were put off are computed, also within another instruction."""
CREDIT = "CreditWait"
"""Kind of a span in which a forward pass waits until the next stage has received enough."""

LATE = "LateParts"
"""Kind of a span in which a batch begins or ends with what travels late: losses of late targets, and copies."""


@dataclass(frozen=True)
class Span:
    """One instruction of one stage, or a part of it.

    Attributes:
        rank: of the process.
        kind: the instruction's class, :data:`WEIGHTS`, :data:`CREDIT` or :data:`LATE`.
        batch: from 1.
        micro_batch: from 0; -1: of the whole batch.
        loss: whose gradient or head it is; None: no loss is meant.
        start, end: seconds.
    """

    rank: int
    kind: str
    batch: int
    micro_batch: int
    loss: int | None
    start: float
    end: float

    @property
    def seconds(self) -> float:
        """From its start to its end, what lies within included."""
        return self.end - self.start


@dataclass(frozen=True)
class Process:
    """One rank of the job.

    Attributes:
        rank: global.
        stage, replica: its place.
        host: its name.
        uncertainty: seconds by which its clock may be off rank 0's.
    """

    rank: int
    stage: int
    replica: int
    host: str
    uncertainty: float = 0.0


@dataclass(frozen=True)
class Recording:
    """Some batches of a run, of all ranks.

    Attributes:
        stages: K.
        micro_batches: M.
        first, last: batches, from 1.
        interlocking: the block of the configuration.
        has_aux_heads: whether the model has auxiliary heads.
        frozen: the stages whose trunk has nothing to train.
        device: what the stages ran on, and on whose clock: ``cuda`` spans are those of the compute stream.
        processes: by rank.
        spans: by rank and start.
    """

    stages: int
    micro_batches: int
    first: int
    last: int
    interlocking: dict[str, Any]
    has_aux_heads: bool
    device: str
    processes: Sequence[Process]
    spans: Sequence[Span]
    frozen: Sequence[int] = ()

    @property
    def batches(self) -> int:
        """How many were recorded."""
        return self.last - self.first + 1

    @cached_property
    def by_rank(self) -> dict[int, list[Span]]:
        """The spans of each rank, by start, a span before those within it."""
        found: dict[int, list[Span]] = {process.rank: [] for process in self.processes}
        for span in sorted(self.spans, key=lambda span: (span.start, -span.end, span.kind in (WEIGHTS, CREDIT))):
            found[span.rank].append(span)
        return found

    def of_replica(self, replica: int) -> list[Process]:
        """The processes of one pipeline, by stage."""
        return sorted((p for p in self.processes if p.replica == replica), key=lambda process: process.stage)


def own_seconds(spans: Iterable[Span]) -> list[tuple[Span, float]]:
    """Spans of one rank with the time of each that no span within it has.

    Args:
        spans: by start, a span before those within it.
    """
    result: list[tuple[Span, float]] = []
    inside: list[int] = []  # places in the result of the spans that enclose the next one
    for span in spans:
        while inside and result[inside[-1]][0].end <= span.start:
            inside.pop()
        if inside:
            outer, seconds = result[inside[-1]]
            result[inside[-1]] = outer, seconds - span.seconds
        inside.append(len(result))
        result.append((span, span.seconds))
    return result
