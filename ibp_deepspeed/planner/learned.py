"""What the learning study measured of a strategy, at the nearest size that it has."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files


@dataclass(frozen=True)
class Learned:
    """Held-out loss of the last exit against backpropagation's at equal tokens, as a share of it.

    Attributes:
        width: N.
        exits: losses along the model.
        mode: of the strategy; "late": asynchronous backpropagation.
        borrow: layers of the next stage before the heads.
        mean, low, high: of the paired differences over the seeds.
        seeds: how many.
        size: of the model and the text, in words.
    """

    width: int
    exits: int
    mode: str
    borrow: int
    mean: float
    low: float
    high: float
    seeds: int
    size: str

    def sentence(self) -> str:
        """For the reader."""
        seeds = "one seed" if self.seeds == 1 else f"{self.low:+.1%} to {self.high:+.1%} over {self.seeds} seeds"
        return f"its loss was {self.mean:+.1%} against backpropagation's ({seeds}; {self.size}, {self.exits} exits)."


@cache
def table() -> tuple[Learned, ...]:
    """All that was measured (``learned.json``, written by ``python -m benchmarks.quality.report``)."""
    text = files("ibp_deepspeed.planner").joinpath("learned.json").read_text(encoding="utf-8")
    return tuple(Learned(**row) for row in json.loads(text))


def learned(width: int, exits: int, mode: str, borrow: int) -> Learned | None:
    """The measurement of the same width, mode and borrowed layers with the nearest number of exits, at most twice or
    half as many; None: not measured."""
    kind = [row for row in table() if (row.width, row.mode, row.borrow) == (width, mode, borrow)]
    if width == 1:  # with one loss a trunk the modes are one
        kind = [row for row in table() if row.width == 1 and row.borrow == borrow]
    near = [row for row in kind if exits <= 2 * row.exits and row.exits <= 2 * exits]
    return min(near, key=lambda row: abs(row.exits - exits), default=None)
