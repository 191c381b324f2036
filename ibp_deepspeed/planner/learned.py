"""What the learning study measured of a strategy, at the nearest size that it has."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files

from ibp_deepspeed.config.interlocking import AuxHeadConfig
from ibp_deepspeed.planner.learned_heads import LearnedHead, Sizes, learned_head, over_seeds


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
        optimizer: AdamW (with Nesterov's correction for asynchronous backpropagation) or Muon, of both.
        head: what is in these numbers for heads that are not private and whole.
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
    optimizer: str = "AdamW"
    head: LearnedHead | None = None

    def sentence(self) -> str:
        """For the reader."""
        about = f"{over_seeds(self.low, self.high, self.seeds)}; {self.size}, {self.exits} exits"
        said = f"its loss was {self.mean:+.1%} against backpropagation's ({about})"
        return f"{said}." if self.head is None else f"{said}, {self.head.sentence()}."

    def with_head(self, head: LearnedHead | None) -> Learned:
        """With what such heads were measured to lose."""
        if head is None:
            return self
        both = ((self.mean, head.mean), (self.low, head.low), (self.high, head.high))
        middle, low, high = ((1 + own) * (1 + of_heads) - 1 for own, of_heads in both)
        return replace(self, mean=middle, low=low, high=high, head=head)


@cache
def table() -> tuple[Learned, ...]:
    """All that was measured (``learned.json``, written by ``python -m benchmarks.quality.report``)."""
    text = files("ibp_deepspeed.planner").joinpath("learned.json").read_text(encoding="utf-8")
    return tuple(Learned(**row) for row in json.loads(text))


def learned(
    width: int,
    exits: int,
    mode: str,
    borrow: int,
    head: AuxHeadConfig | None = None,
    sizes: Sizes | None = None,
    optimizer: str = "AdamW",
) -> Learned | None:
    """The measurement of the same width, mode, borrowed layers and optimizer with the nearest number of exits, at most
    twice or half as many, with what was measured of such heads on a model of such sizes; None: not measured."""
    alike = [row for row in table() if row.optimizer == optimizer and row.borrow == borrow]
    kind = [row for row in alike if (row.width, row.mode) == (width, mode)]
    if width == 1:  # with one loss a trunk the modes are one
        kind = [row for row in alike if row.width == 1]
    near = [row for row in kind if exits <= 2 * row.exits and row.exits <= 2 * exits]
    nearest = min(near, key=lambda row: abs(row.exits - exits), default=None)
    return None if nearest is None else nearest.with_head(learned_head(head, exits, sizes))
