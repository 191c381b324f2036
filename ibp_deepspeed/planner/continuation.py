"""The time of a batch on a pipeline too large to simulate, continued from smaller ones whose stages are all alike.

What the event simulation shows where both run (tests/planner/test_timing.py), and each use checks on a third size:

* Where losses reach less than half of the stages, a batch takes no longer on more stages.
* Modules of G stages and backpropagation (one module): time is linear on the rays of constant K : G : M, and for few
  micro-batches in G alone.
* Widths N: time is linear in N, K in proportion, for each M, and linear in M for each N.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from math import ceil, floor

from ibp_deepspeed.strategy.strategy import Strategy

CHECKED = 2e-3
"""Share by which a third size may be off the line through the two smaller ones."""
LARGEST_CHECK = 60_000
"""Stages times micro-batches times width of the third size above which no larger ones are tried."""

Time = Callable[[Strategy, int], float]
"""Of a batch: strategy, M."""


@dataclass(frozen=True)
class Shape:
    """What is scaled of a strategy.

    Attributes:
        stages: K.
        width: N in exits.
        gap: G, stages from one exit to the next.
    """

    stages: int
    width: int
    gap: int

    @classmethod
    def of(cls, strategy: Strategy) -> Shape | None:
        """Of a strategy; None if its exits follow no rule, or stages have nothing to train."""
        exits, stages = strategy.placement.losses, strategy.stages
        gaps = {b - a for a, b in zip(exits, exits[1:], strict=False)}
        if len(gaps) > 1 or strategy.frozen:
            return None
        gap = gaps.pop() if gaps else stages
        if strategy.mode == "sum":  # one gradient travels through all stages, as in backpropagation
            return cls(stages, 1, stages) if gap == 1 else None
        return cls(stages, min(strategy.width, len(exits)), gap)

    @property
    def reach(self) -> int:
        """Stages that a gradient passes at most."""
        return min(self.stages, self.width * self.gap)

    def strategy(self, like: Strategy) -> Strategy:
        """The strategy of this shape, the rest as of another one."""
        gap = 1 if like.mode == "sum" else self.gap
        exits = tuple(range((self.stages - 1) % gap, self.stages, gap))
        width = self.stages if like.is_widest else self.width
        return replace(like, stages=self.stages, width=width, exits=exits, exit_weights=None, window_weights=None)


def continued(strategy: Strategy, shape: Shape, micro_batches: int, time: Time) -> float:
    """Time of a batch, in the unit of ``time``.

    Args:
        strategy: which.
        shape: its own.
        micro_batches: M.
        time: of a small one.
    """
    if 2 * shape.reach <= shape.stages:
        shape = replace(shape, stages=min(shape.stages, -(-2 * shape.reach // shape.gap) * shape.gap))

    @cache
    def of(stages: int, width: int, gap: int, m: int) -> float:
        return time(Shape(stages, width, gap).strategy(strategy), m)

    if shape.width > shape.gap:
        return _of_widths(shape, micro_batches, of)
    return _of_modules(shape, micro_batches, of)


def _of_widths(shape: Shape, micro_batches: int, of: Callable[[int, int, int, int], float]) -> float:
    """N and M on lines."""

    def at(width: float, m: float) -> float:
        stages = Fraction(shape.stages) * Fraction(width) / shape.width
        return between(stages, lambda k: of(max(k, int(width)), int(width), shape.gap, int(m)))

    cost = shape.stages / shape.width
    return extended(at, (shape.width, micro_batches), (4, 8), lambda n, m: cost * n * n * m)


def _of_modules(shape: Shape, micro_batches: int, of: Callable[[int, int, int, int], float]) -> float:
    """G with K and M in proportion, or with K alone if there are few micro-batches."""
    parts = max(1, shape.stages // shape.gap)

    def long(gap: int, m: Fraction | int) -> float:
        """Any number of micro-batches on modules of this size."""
        stages = gap * parts if shape.stages % shape.gap == 0 else -(-shape.stages * gap // shape.gap)

        def over(_: float, count: float) -> float:
            return of(stages, shape.width, gap, int(count))

        first = 2 * shape.width * gap + 2
        return between(m, lambda count: extended(over, (1, count), (1, first), lambda _, c: stages * c))

    first = max(4, ceil(4 * shape.gap / micro_batches))
    if 3 * first < shape.gap:
        ratio = Fraction(micro_batches, shape.gap)
        return extended(
            lambda gap, _: long(int(gap), ratio * int(gap)),
            (shape.gap, 1),
            (first, 1),
            lambda g, _: ratio * g * g * parts,
        )
    few = max(4, micro_batches)
    return extended(
        lambda gap, _: long(int(gap), micro_batches), (shape.gap, 1), (few, 1), lambda g, _: g * parts * micro_batches
    )


def extended(
    time: Callable[[float, float], float],
    target: tuple[int, int],
    first: tuple[int, int],
    cost: Callable[[float, float], float | Fraction],
) -> float:
    """time(x, y) from its values at once and twice ``first``, linear in x and in y.

    A side that is at most three times as long as its first is not continued. If three times ``first`` is not where the
    smaller ones say, all are doubled, until that would cost too much.

    Args:
        time: of two sizes.
        target: of which it is asked.
        first: the smallest that count.
        cost: of computing time(x, y), to be compared with ``LARGEST_CHECK``.
    """
    long = [t > 3 * f for t, f in zip(target, first, strict=True)]
    if not any(long):
        return time(*target)
    x, y = ([f, 2 * f] if is_long else [t] for t, f, is_long in zip(target, first, long, strict=True))
    third = [3 * f if is_long else t for t, f, is_long in zip(target, first, long, strict=True)]

    def line(at_x: float, at_y: float) -> float:
        ends = [_through(y, [time(a, b) for b in y], at_y) for a in x]
        return _through(x, ends, at_x)

    checked = time(third[0], third[1])
    doubled = (2 * first[0], 2 * first[1])
    if abs(line(third[0], third[1]) - checked) > CHECKED * checked and cost(2 * third[0], 2 * third[1]) < LARGEST_CHECK:
        return extended(time, target, doubled, cost)
    return line(*target)


def between(value: Fraction | int, time: Callable[[int], float]) -> float:
    """time(value) on the line between the whole numbers around it, which are at least 1."""
    low, high = max(1, floor(value)), max(1, ceil(value))
    below = time(low)
    return below if low == high else below + (time(high) - below) * float(value - low)


def _through(places: list[int], values: list[float], at: float) -> float:
    """On the line through one or two points."""
    if len(places) == 1:
        return values[0]
    return values[0] + (values[1] - values[0]) * (at - places[0]) / (places[1] - places[0])
