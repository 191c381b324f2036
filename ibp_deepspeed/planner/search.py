"""The fastest ways to train a model on a number of devices: stages, micro-batches, strategy, cut, heads, recomputation.

All that follow from a :class:`Space` are looked at. What can't run, does not fit or was not measured to learn is
counted and left out before anything is simulated; the rest is simulated (:func:`ibp_deepspeed.planner.plan.evaluate`)
in the order of the least time that its busiest stage needs, until that is more than the best ones take.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

from ibp_deepspeed.errors import PlanError
from ibp_deepspeed.planner.advice import INTERLOCK_BELOW, preferred
from ibp_deepspeed.planner.plan import Outlook, Row, evaluate, outlook
from ibp_deepspeed.planner.ways import Space, Way, ways

MOST_SIMULATED = 400
"""Ways that are simulated at most; the search says so if it stops there."""
_SURE = 0.98
"""Of the least time: what is continued from smaller pipelines may be off by as much."""


@dataclass(frozen=True)
class Found:
    """A way that fits, and what it costs.

    Attributes:
        way: which.
        row: as in the plain table.
        known: what was known before.
        without_recompute: bytes that it would hold without recomputation, if it recomputes.
    """

    way: Way
    row: Row
    known: Outlook
    without_recompute: float | None

    @property
    def rank(self) -> tuple[float, float, float, int]:
        """The least is best: time to five digits, measured loss, memory, then what is simplest."""
        return float(f"{self.row.batch_time:.5g}"), self.row.loss_above, self.row.most_memory, self.way.order


@dataclass
class Result:
    """Of a search.

    Attributes:
        best: the fastest of each group, fastest first.
        exact: the fastest whose gradients are backpropagation's; None if none fits.
        excluded: why → how many ways.
        looked_at: ways in all.
        simulated: of them.
        complete: whether the bound on simulations left nothing out.
    """

    best: list[Found] = field(default_factory=list)
    exact: Found | None = None
    excluded: Counter[str] = field(default_factory=Counter)
    looked_at: int = 0
    simulated: int = 0
    complete: bool = True

    @property
    def preferred(self) -> Found:
        """Of those that are as fast as the fastest, as far as predictions tell, the one that was measured to learn
        best."""
        row = preferred([found.row for found in self.best])
        return next(found for found in self.best if found.row is row)

    @property
    def advised(self) -> Found:
        """The preferred one, if it is exact or more than 5% faster than what is; else that, as the plain table
        advises."""
        first = self.preferred
        if self.exact is None or first.row.batch_time < INTERLOCK_BELOW * self.exact.row.batch_time:
            return first
        return self.exact


def search(
    space: Space,
    tolerance: float,
    keep: int = 10,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    most: int = MOST_SIMULATED,
) -> Result:
    """The fastest ways.

    Args:
        space: all ways.
        tolerance: by what share a measured loss may be above backpropagation's.
        keep: how many.
        progress: around what is iterated over, to show it.
        most: simulations.

    Raises:
        PlanError: no number of stages and samples divides what there is, with what would.
    """
    result = Result()
    prospects = _prospects(space, tolerance, result, progress)
    prospects.sort(key=lambda of: (of[1].least_time, of[0].order))
    best: dict[tuple[int, int, str], Found] = {}
    for way, known, without in progress(prospects):
        ranked = sorted(found.row.batch_time for found in best.values())
        most_wanted = ranked[keep - 1] if len(ranked) >= keep else inf
        if known.exact:  # with the fastest exact one all others are compared
            most_wanted = max(most_wanted, inf if result.exact is None else result.exact.row.batch_time)
        if _SURE * known.least_time > most_wanted:
            result.excluded["slower than the best ones by the work of their busiest stage alone"] += 1
            continue
        if result.simulated >= most:
            result.complete = False
            result.excluded["beyond the number of simulations"] += 1
            continue
        result.simulated += 1
        row = evaluate(way.job, way.candidate)
        if row.reason is not None:
            result.excluded["can't be simulated as large as they are"] += 1
            continue
        found = Found(way, row, known, without)
        if row.exact and (result.exact is None or found.rank < result.exact.rank):
            result.exact = found
        if way.group not in best or found.rank < best[way.group].rank:
            best[way.group] = found
    result.best = sorted(best.values(), key=lambda found: found.rank)[:keep]
    return result


def _prospects(
    space: Space, tolerance: float, result: Result, progress: Callable[[Iterable[Any]], Iterable[Any]]
) -> list[tuple[Way, Outlook, float | None]]:
    """Ways that can run, fit, and are known to learn; recomputing only where it does not fit otherwise."""
    found: list[tuple[Way, Outlook, float | None]] = []
    limit = space.cluster.device.memory
    for way in progress(list(ways(space, result.excluded))):
        result.looked_at += 1
        block = way.candidate.block
        assert block is not None
        try:
            known = outlook(way.job, block)
        except PlanError:
            result.excluded["their configuration can't run"] += 1
            continue
        if not known.exact and known.learned is None:
            result.excluded["their learning is not measured"] += 1
            continue
        if not known.exact and known.learned is not None and known.learned.mean > tolerance:
            result.excluded[f"their loss was measured to be more than {tolerance:.1%} above backpropagation's"] += 1
            continue
        most, without = _most(known), None
        if limit is not None and most > limit:
            way, without = replace(way, job=replace(way.job, recompute=True)), most
            known = outlook(way.job, block)
        if limit is not None and _most(known) > limit:
            result.excluded[f"they need more than {limit / 2**30:.3g} GiB, recomputing or not"] += 1
            continue
        found.append((way, known, without))
    return found


def _most(known: Outlook) -> float:
    return max(memory.total for memory in known.memory)
