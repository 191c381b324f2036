"""The fastest ways to train a model on a number of devices: stages, micro-batches, strategy, cut, heads, recomputation.

All that follow from a :class:`Space` are looked at. What can't run, does not fit or was not measured to learn is
counted and left out before anything is simulated; the rest is simulated (:func:`ibp_deepspeed.planner.plan.evaluate`)
in the order of the least time that its busiest stage needs, until that is more than the best ones take.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from math import inf
from typing import Any

from ibp_deepspeed.errors import PlanError
from ibp_deepspeed.planner.advice import INTERLOCK_BELOW
from ibp_deepspeed.planner.hardware import Cluster
from ibp_deepspeed.planner.plan import Candidate, Job, Outlook, Row, evaluate, outlook, sizes
from ibp_deepspeed.planner.workload import Workload, balanced

SLACKS = (0, 1, 2)
MOST_SIMULATED = 400
"""Ways that are simulated at most; the search says so if it stops there."""
_SURE = 0.98
"""Of the least time: what is continued from smaller pipelines may be off by as much."""


@dataclass(frozen=True)
class Kind:
    """A kind of auxiliary head.

    Attributes:
        name: for the reader.
        options: of ``aux_head``.
        workload: the model with it, and a micro-batch of one sample.
    """

    name: str
    options: Mapping[str, Any]
    workload: Workload


@dataclass(frozen=True)
class Space:
    """What is searched.

    Attributes:
        devices: in all.
        devices_a_host: on a host; a pipeline is inside one, or has whole ones.
        samples: of a batch, over all replicas.
        kinds: of heads, the first is preferred where they take the same time.
        cluster: device and links.
        zero: ZeRO stage, 0 or 1.
    """

    devices: int
    devices_a_host: int
    samples: int
    kinds: Sequence[Kind]
    cluster: Cluster
    zero: int = 0

    def __post_init__(self) -> None:
        """Refuse what can't be.

        Raises:
            PlanError: hosts that are not full.
        """
        if self.devices % self.devices_a_host:
            full = self.devices // self.devices_a_host * self.devices_a_host or self.devices_a_host
            raise PlanError(
                f"{self.devices} devices don't fill hosts of {self.devices_a_host}: {full} would, or "
                f"{self.devices} on one host."
            )


@dataclass(frozen=True)
class Way:
    """One point of the space.

    Attributes:
        job: with its stages, cut, micro-batches and replicas.
        candidate: with its options of ``aux_head``.
        samples: of a micro-batch.
        kind: of heads, empty if it has none.
        cut: by what its stages are balanced.
        slack: ``hop_slack``.
        order: among those that take the same time, the least counts.
    """

    job: Job
    candidate: Candidate
    samples: int
    kind: str
    cut: str
    slack: int
    order: int

    @property
    def group(self) -> tuple[int, int, str]:
        """Of these only the best is shown: K, M and the strategy are the same."""
        return self.job.stages, self.job.micro_batches, self.candidate.name


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
    def rank(self) -> tuple[float, float, int]:
        """The least is best: time to five digits, memory, then what is simplest."""
        return float(f"{self.row.batch_time:.5g}"), self.row.most_memory, self.way.order


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
    def advised(self) -> Found:
        """The fastest, if it is exact or more than 5% faster than what is; else that, as the plain table advises."""
        first = self.best[0]
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


def ways(space: Space, excluded: Counter[str]) -> Iterator[Way]:
    """All points of the space without recomputation, the simplest first; what divides nothing is counted.

    Raises:
        PlanError: nothing divides, with what would.
    """
    layers = len(space.kinds[0].workload.layers) - 2
    order = 0
    for stages in divisors(space.devices):
        if not whole_hosts(stages, space.devices_a_host):
            excluded["numbers of stages: they would break hosts"] += 1
            continue
        if stages > layers:
            excluded[f"numbers of stages: more than the {layers} decoder layers"] += 1
            continue
        replicas = space.devices // stages
        if space.samples % replicas:
            excluded["numbers of stages: the batch does not divide between their replicas"] += 1
            continue
        for way in _ways_of(space, stages, replicas):
            yield replace(way, order=order)
            order += 1
    if not order:
        possible = [k for k in divisors(space.devices) if k <= layers and whole_hosts(k, space.devices_a_host)]
        most = possible[-1]
        grain = space.devices // most
        up = -(-space.samples // grain) * grain
        raise PlanError(
            f"a batch of {space.samples} samples does not divide between the replicas of any number of stages on "
            f"{space.devices} devices: {up} would, on {most} stages."
        )


def _ways_of(space: Space, stages: int, replicas: int) -> Iterator[Way]:
    inside = stages <= space.devices_a_host
    cluster = replace(
        space.cluster,
        stages_a_host=None if inside else space.devices_a_host,
        replicas_apart=inside and space.devices > space.devices_a_host,
    )

    @cache
    def bounds(kind: int, exits: tuple[int, ...], by_parameters: bool) -> tuple[int, ...]:
        work = space.kinds[kind].workload
        if by_parameters:
            return tuple(balanced(work.layers, stages, work.head, exits, size=lambda layer: layer.parameters))
        return tuple(balanced(work.layers, stages, work.head, exits))

    @cache
    def workload(kind: int, samples: int) -> Workload:
        return space.kinds[kind].workload.times(samples)

    for samples in divisors(space.samples // replicas):
        count = space.samples // replicas // samples
        for name, block, exits in strategies(stages):
            slacks = SLACKS if len(exits) > 1 and name != "N = 1" else SLACKS[:1]
            for number, kind in enumerate(space.kinds if len(exits) > 1 else space.kinds[:1]):
                cuts = {bounds(number, exits, by): cut for by, cut in ((True, "parameters"), (False, "work"))}
                for cut in sorted(cuts, key=lambda of: cuts[of], reverse=True):
                    job = Job(workload(number, samples), cut, count, replicas, cluster, space.zero)
                    for slack in slacks:
                        options = {"hop_slack": slack} if slack else {}
                        heads = {"aux_head": {**kind.options, **block.get("aux_head", {})}}
                        candidate = Candidate(name, {**block, **options, **(heads if len(exits) > 1 else {})})
                        shown = kind.name if len(exits) > 1 else ""
                        yield Way(job, candidate, samples, shown, cuts[cut], slack, 0)


def strategies(stages: int) -> Iterator[tuple[str, dict[str, Any], tuple[int, ...]]]:
    """Name, configuration and exits of all strategies on so many stages: exact ones, then modules and widths."""
    last = (stages - 1,)
    yield "1F1B", {"strategy": "global", "exits": stages, "backward": "fused"}, last
    if stages == 1:
        return
    yield "backpropagation, input gradients first", {"strategy": "global", "exits": stages}, last
    yield "backpropagation, all exits (sum)", {"strategy": "global", "mode": "sum"}, tuple(range(stages))
    for gap in sizes(stages):
        exits = tuple(range((stages - 1) % gap, stages, gap))
        modules = {} if gap == 1 else {"exits": gap}
        of_modules = "" if gap == 1 else f", modules of {gap}"
        yield f"N = 1{of_modules}", {"strategy": "local", **modules}, exits
        for width in sizes(len(exits))[1:]:
            block = {"strategy": "nwise", "width": width, **modules}
            yield f"N = {width}{of_modules}", {**block, "mode": "window"}, exits
            yield f"N = {width}{of_modules}, furthest", {**block, "mode": "furthest"}, exits
    yield "N = 1, heads behind a borrowed layer", {"strategy": "local", "aux_head": {"borrow": 1}}, tuple(range(stages))


def whole_hosts(stages: int, devices_a_host: int) -> bool:
    """Whether pipelines of so many stages fill hosts, or hosts hold whole ones."""
    return stages % devices_a_host == 0 or devices_a_host % stages == 0


def divisors(number: int) -> list[int]:
    """Rising."""
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
