"""All ways to train a model on a number of devices: stages, replicas, micro-batches, strategy, cut, heads, slack."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

from ibp_deepspeed.errors import PlanError
from ibp_deepspeed.planner.hardware import Cluster
from ibp_deepspeed.planner.plan import Candidate, Job, sizes
from ibp_deepspeed.planner.workload import Workload, balanced

SLACKS = (0, 1, 2)


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
        for way in _Pipelines(space, stages, replicas).ways():
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


class _Pipelines:
    """Ways with so many stages and replicas."""

    def __init__(self, space: Space, stages: int, replicas: int) -> None:
        self.space, self.stages, self.replicas = space, stages, replicas
        inside = stages <= space.devices_a_host
        self.cluster = replace(
            space.cluster,
            stages_a_host=None if inside else space.devices_a_host,
            replicas_apart=inside and space.devices > space.devices_a_host,
        )
        self._workload = cache(lambda kind, samples: space.kinds[kind].workload.times(samples))
        self._cuts = cache(self._make_cuts)

    def ways(self) -> Iterator[Way]:
        """All of them, the simplest first."""
        a_replica = self.space.samples // self.replicas
        for samples, (name, block, exits) in product(divisors(a_replica), strategies(self.stages)):
            has_heads = len(exits) > 1
            slacks = SLACKS if has_heads and name != "N = 1" else SLACKS[:1]
            for number, kind in enumerate(self.space.kinds if has_heads else self.space.kinds[:1]):
                for (cut, bounds), slack in product(self._cuts(number, exits), slacks):
                    workload = self._workload(number, samples)
                    job = Job(workload, bounds, a_replica // samples, self.replicas, self.cluster, self.space.zero)
                    options: dict[str, Any] = {"hop_slack": slack} if slack else {}
                    if has_heads:
                        options["aux_head"] = {**kind.options, **block.get("aux_head", {})}
                    candidate = Candidate(name, {**block, **options})
                    yield Way(job, candidate, samples, kind.name if has_heads else "", cut, slack, 0)

    def _make_cuts(self, number: int, exits: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
        """By what the stages of a kind of heads are balanced, and where that cuts; the same cut once, as by work."""
        work = self.space.kinds[number].workload
        by_work = tuple(balanced(work.layers, self.stages, work.head, exits))
        by_parameters = balanced(work.layers, self.stages, work.head, exits, size=lambda layer: layer.parameters)
        if tuple(by_parameters) == by_work:
            return [("work", by_work)]
        return [("work", by_work), ("parameters", tuple(by_parameters))]


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
