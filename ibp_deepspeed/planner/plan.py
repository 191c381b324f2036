"""Every way to train a model on a pipeline, side by side: time, memory, messages, work, learning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from ibp_deepspeed.config.interlocking import InterlockingConfig
from ibp_deepspeed.errors import ConfigError, PlanError
from ibp_deepspeed.planner.hardware import Cluster
from ibp_deepspeed.planner.learned import Learned, learned
from ibp_deepspeed.planner.memory import Memory, stage_memory
from ibp_deepspeed.planner.peers import ASYNCHRONOUS
from ibp_deepspeed.planner.pieces import crossings, works
from ibp_deepspeed.planner.timing import Timing, peer_timing, strategy_timing
from ibp_deepspeed.planner.workload import Workload
from ibp_deepspeed.schedule.simulator import Costs
from ibp_deepspeed.strategy.strategy import Strategy
from ibp_deepspeed.strategy.timeline import Timeline

PEERS = ("1F1B", "interleaved 1F1B", "ZB1", "ZBV", "DualPipeV")


@dataclass(frozen=True)
class Job:
    """What is to be planned.

    Attributes:
        workload: model and micro-batch, with the auxiliary head that exits have.
        bounds: of the stages.
        micro_batches: M.
        replicas: data-parallel pipelines.
        cluster: devices and links.
        zero: ZeRO stage, 0 or 1.
        recompute: stages run forward again before their backward pass.
    """

    workload: Workload
    bounds: Sequence[int]
    micro_batches: int
    replicas: int
    cluster: Cluster
    zero: int = 0
    recompute: bool = False

    @property
    def stages(self) -> int:
        """K."""
        return len(self.bounds) - 1

    def costs(self, again: Sequence[bool], borrow: int = 0) -> list[Costs]:
        """Seconds of each piece of each stage's work, a straggler's times its factor.

        Args:
            again: whether each stage runs forward again before its backward pass.
            borrow: layers of the next stage before an auxiliary head.

        Raises:
            PlanError: a straggler that there is not.
        """
        found = self.workload.costs(self.bounds, self.cluster.device.flops, borrow=borrow, recompute=again)
        return self.cluster.slowed(found)


@dataclass(frozen=True)
class Candidate:
    """A way to train.

    Attributes:
        name: for the reader.
        block: of interlocking; None: another system's, which this package does not run.
    """

    name: str
    block: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Row:
    """What a candidate costs.

    Attributes:
        candidate: which.
        reason: why it can't run, in one sentence; then nothing else is there.
        timing: of the pipeline, in seconds; None if it can't run.
        batch_time: seconds a batch, the reduction over replicas included.
        memory: of each stage.
        link_bytes: over the busiest boundary in a batch, both ways.
        work: of all stages against backpropagation's.
        exact: whether the gradients are backpropagation's.
        learned: how much higher its loss was than backpropagation's, where that was measured.
    """

    candidate: Candidate
    reason: str | None = None
    timing: Timing | None = None
    batch_time: float = 0.0
    memory: list[Memory] = field(default_factory=list)
    link_bytes: float = 0.0
    work: float = 1.0
    exact: bool = True
    learned: Learned | None = None

    @property
    def most_memory(self) -> float:
        """Bytes of the stage that holds most."""
        return max((m.total for m in self.memory), default=0.0)

    @property
    def loss_above(self) -> float:
        """As a share of backpropagation's loss, as it was measured; 0 where nothing was, as for what is exact."""
        return 0.0 if self.learned is None else self.learned.mean


def candidates(stages: int, head: Mapping[str, Any] | None = None) -> Iterator[Candidate]:
    """Other systems' schedules, then ours: exact ones, modules, widths in both modes, borrowed layers.

    Args:
        stages: K.
        head: options of ``aux_head``.
    """
    yield from (Candidate(name) for name in PEERS)
    yield Candidate(ASYNCHRONOUS)
    yield Candidate("backpropagation, input gradients first", {"strategy": "global", "exits": stages})
    for name, block in _with_heads(stages):
        options = {**(head or {}), **block.get("aux_head", {})}
        yield Candidate(name, {**block, "aux_head": options} if options else block)


def _with_heads(stages: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and configuration of ours that have auxiliary heads."""
    yield "backpropagation, all exits (sum)", {"strategy": "global", "mode": "sum"}
    for size in sizes(stages):
        if size > 1:
            yield f"modules of {size} (G = {size})", {"strategy": "local", "exits": size}
    for width in sizes(stages):
        yield f"N = {width}", _nwise(width, "window")
        if width > 1:
            yield f"N = {width}, furthest", _nwise(width, "furthest")
    yield "N = 1, heads behind a borrowed layer", {"strategy": "local", "aux_head": {"borrow": 1}}


def sizes(stages: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, … below K."""
    found = [1, 2, 3]
    while found[-1] < stages:
        found += [2 * found[-2], 2 * found[-1]]
    return [size for size in found if size < stages]


def _nwise(width: int, mode: str) -> dict[str, Any]:
    return {"strategy": "nwise", "width": width, "mode": mode}


@dataclass(frozen=True)
class Outlook:
    """What is known of a candidate of ours before its schedule is simulated.

    Attributes:
        strategy: on the job's stages.
        costs: of each stage.
        memory: of each stage.
        least_time: seconds that a batch takes at least: the busiest stage's work, and the reduction.
        reduction: seconds of it that sum gradients over replicas.
        exact: whether the gradients are backpropagation's.
        learned: how much higher its loss was than backpropagation's, where that was measured.
    """

    strategy: Strategy
    costs: list[Costs]
    memory: list[Memory]
    least_time: float
    reduction: float
    exact: bool
    learned: Learned | None


def outlook(job: Job, block: Mapping[str, Any]) -> Outlook:
    """Of one of our configurations.

    Raises:
        PlanError: it can't run so.
    """
    try:
        config = InterlockingConfig.parse(block)
        strategy = Timeline(config, job.stages, job.micro_batches, job.workload.head is not None).at(0)[0]
    except ConfigError as error:
        raise PlanError(str(error)) from None
    borrow = 0 if config.aux_head is None else config.aux_head.borrow
    shortest = min((high - low for low, high in pairwise(job.bounds[1:])), default=borrow + 1)
    if borrow and shortest <= borrow:
        fit = f"borrow = {shortest - 1} would fit" if shortest > 1 else "fewer stages would make them longer"
        raise PlanError(
            f"a head behind {_counted(borrow, 'borrowed layer')} needs stages of more than that, the shortest has "
            f"{shortest}: {fit}."
        )
    # A stage whose update waits for no other one has nothing to recompute: it is updated at once.
    again = [job.recompute and strategy.distance(k) > 0 for k in range(job.stages)]
    costs = job.costs(again, borrow)
    exits = set(strategy.placement.losses) - {job.stages - 1}
    homes = {strategy.placement.home(loss) for loss in exits}
    held = [strategy.most_in_flight(k, job.micro_batches) for k in range(job.stages)]
    whole = [min(job.micro_batches, strategy.distance(k) * strategy.hop_slots + 1) for k in range(job.stages)]
    memory = [
        _memory(job, k, whole[k], again[k], head=k in homes, put_off=held[k] - whole[k]) for k in range(job.stages)
    ]
    reduction = _reduction(job, memory)
    return Outlook(
        strategy,
        costs,
        memory,
        least_time=job.micro_batches * max(works(strategy, costs)) + reduction,
        reduction=reduction,
        exact=strategy.is_backpropagation,
        learned=learned(
            strategy.width,
            len(strategy.placement.losses),
            strategy.mode,
            borrow,
            config.aux_head,
            job.workload.sizes,
            job.workload.optimizer,
        ),
    )


def evaluate(job: Job, candidate: Candidate) -> Row:
    """What a candidate costs; a row with the reason if it can't run."""
    try:
        return _peer_row(job, candidate) if candidate.block is None else _own_row(job, candidate, candidate.block)
    except PlanError as error:
        return Row(candidate, reason=str(error))


def _own_row(job: Job, candidate: Candidate, block: Mapping[str, Any]) -> Row:
    known = outlook(job, block)
    strategy = known.strategy
    boundaries = job.cluster.boundaries(job.stages, job.workload.message)
    timing = strategy_timing(strategy, job.micro_batches, known.costs, boundaries, job.cluster.uneven)
    crossing = 1 + max(crossings(strategy)) if job.stages > 1 else 0
    return Row(
        candidate,
        timing=timing,
        batch_time=timing.batch_time + known.reduction,
        memory=known.memory,
        link_bytes=crossing * job.micro_batches * job.workload.message,
        work=sum(works(strategy, known.costs)) / _plain_work(known.costs),
        exact=known.exact,
        learned=known.learned,
    )


def _peer_row(job: Job, candidate: Candidate) -> Row:
    name, late = candidate.name, candidate.name == ASYNCHRONOUS
    layers, two_chunks = len(job.workload.layers) - 2, name not in ("1F1B", ASYNCHRONOUS)
    if two_chunks and layers < 2 * job.stages:
        raise PlanError(
            f"{name} needs {2 * job.stages} decoder layers, two parts a stage, the model has {layers}: "
            f"{_counted(layers // 2, 'stage')} would fit."
        )
    boundaries = job.cluster.boundaries(job.stages, job.workload.message)
    again = [job.recompute] * job.stages
    timing = peer_timing(name, job.stages, job.micro_batches, job.costs(again), boundaries, job.cluster.uneven)
    share = 0.5 if two_chunks else 1.0
    memory = [
        _memory(job, k, share * timing.in_flight[k], again[k], head=False, versions=2 if late else 1)
        for k in range(job.stages)
    ]
    crossings = 0 if job.stages == 1 else (2 if two_chunks else 1) * 2 * job.micro_batches
    note = learned(0, 1, "late", 0, optimizer=job.workload.optimizer) if late else None
    time = timing.batch_time + (0.0 if late else _reduction(job, memory))
    link_bytes = crossings * job.workload.message
    return Row(candidate, None, timing, time, memory, link_bytes, exact=not late, learned=note)


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _memory(
    job: Job, stage: int, in_flight: float, again: bool, *, head: bool, versions: int = 1, put_off: float = 0.0
) -> Memory:
    return stage_memory(
        job.workload,
        job.bounds,
        stage,
        in_flight,
        head=head,
        zero=job.zero,
        replicas=job.replicas,
        recompute=again,
        weight_versions=versions,
        put_off=put_off,
    )


def _reduction(job: Job, memory: Sequence[Memory]) -> float:
    """Seconds of a ring that sums the gradients of the largest stage over the replicas, after the batch."""
    if job.replicas == 1:
        return 0.0
    link, rings = job.cluster.reduction(job.stages)
    size = max(m.gradients for m in memory)
    return 2 * (job.replicas - 1) * (rings * size / job.replicas / link.bandwidth + link.latency)


def _plain_work(costs: Sequence[Costs]) -> float:
    return sum(c.plain for c in costs)
