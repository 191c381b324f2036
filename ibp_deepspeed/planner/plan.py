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
from ibp_deepspeed.planner.peers import ASYNCHRONOUS, why_not
from ibp_deepspeed.planner.pieces import crossings, works
from ibp_deepspeed.planner.timing import Timing, peer_timing, strategy_timing
from ibp_deepspeed.planner.workload import Workload
from ibp_deepspeed.schedule.simulator import Costs
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

    def costs(self, borrow: int = 0) -> list[Costs]:
        """Seconds of each piece of each stage's work, a straggler's times its factor.

        Raises:
            PlanError: a straggler that there is not.
        """
        found = self.workload.costs(self.bounds, self.cluster.device.flops, borrow=borrow, recompute=self.recompute)
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


def candidates(stages: int) -> Iterator[Candidate]:
    """Other systems' schedules, then ours: exact ones, modules, widths in both modes, borrowed layers."""
    yield from (Candidate(name) for name in PEERS)
    yield Candidate(ASYNCHRONOUS)
    yield Candidate("backpropagation, input gradients first", {"strategy": "global", "exits": stages})
    yield Candidate("backpropagation, all exits (sum)", {"strategy": "global", "mode": "sum"})
    for size in _sizes(stages):
        if size > 1:
            yield Candidate(f"modules of {size} (G = {size})", {"strategy": "local", "exits": size})
    for width in _sizes(stages):
        yield Candidate(f"N = {width}", _nwise(width, "window"))
        if width > 1:
            yield Candidate(f"N = {width}, furthest", _nwise(width, "furthest"))
    yield Candidate("N = 1, heads behind a borrowed layer", {"strategy": "local", "aux_head": {"borrow": 1}})


def _sizes(stages: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, … below K."""
    found = [1, 2, 3]
    while found[-1] < stages:
        found += [2 * found[-2], 2 * found[-1]]
    return [size for size in found if size < stages]


def _nwise(width: int, mode: str) -> dict[str, Any]:
    return {"strategy": "nwise", "width": width, "mode": mode}


def evaluate(job: Job, candidate: Candidate) -> Row:
    """What a candidate costs; a row with the reason if it can't run."""
    block = candidate.block
    if block is None:
        return _peer_row(job, candidate)
    config = InterlockingConfig.parse(block)
    try:
        timeline = Timeline(config, job.stages, job.micro_batches, job.workload.head is not None)
        strategy = timeline.at(0)[0]
    except ConfigError as error:
        return Row(candidate, reason=str(error))
    borrow = 0 if config.aux_head is None else config.aux_head.borrow
    if borrow and any(high - low <= borrow for low, high in pairwise(job.bounds[1:])):
        return Row(candidate, reason=f"{borrow} borrowed layers need stages of more than that.")
    costs = job.costs(borrow)
    boundaries = job.cluster.boundaries(job.stages, job.workload.message)
    try:
        timing = strategy_timing(strategy, job.micro_batches, costs, boundaries, job.cluster.uneven)
    except PlanError as error:
        return Row(candidate, reason=str(error))
    exits = set(strategy.placement.losses) - {job.stages - 1}
    homes = {strategy.placement.home(loss) for loss in exits}
    memory = [_memory(job, k, timing.in_flight[k], head=k in homes) for k in range(job.stages)]
    crossing = 1 + max(crossings(strategy)) if job.stages > 1 else 0
    return Row(
        candidate,
        timing=timing,
        batch_time=timing.batch_time + _reduction(job, memory),
        memory=memory,
        link_bytes=crossing * job.micro_batches * job.workload.message,
        work=sum(works(strategy, costs)) / _plain_work(costs),
        exact=strategy.is_backpropagation,
        learned=learned(strategy.width, len(strategy.placement.losses), strategy.mode, borrow),
    )


def _peer_row(job: Job, candidate: Candidate) -> Row:
    name, late = candidate.name, candidate.name == ASYNCHRONOUS
    reason = why_not(name, job.stages, job.micro_batches)
    two_chunks = name not in ("1F1B", ASYNCHRONOUS)
    if reason is None and two_chunks and len(job.workload.layers) - 2 < 2 * job.stages:
        reason = f"{name} needs {2 * job.stages} decoder layers, two parts a stage; there are fewer."
    if reason is not None:
        return Row(candidate, reason=reason)
    boundaries = job.cluster.boundaries(job.stages, job.workload.message)
    try:
        timing = peer_timing(name, job.stages, job.micro_batches, job.costs(), boundaries, job.cluster.uneven)
    except PlanError as error:
        return Row(candidate, reason=str(error))
    share = 0.5 if two_chunks else 1.0
    memory = [
        _memory(job, k, share * timing.in_flight[k], head=False, versions=2 if late else 1) for k in range(job.stages)
    ]
    crossings = 0 if job.stages == 1 else (2 if two_chunks else 1) * 2 * job.micro_batches
    note = learned(0, 1, "late", 0) if late else None
    time = timing.batch_time + (0.0 if late else _reduction(job, memory))
    link_bytes = crossings * job.workload.message
    return Row(candidate, None, timing, time, memory, link_bytes, exact=not late, learned=note)


def _memory(job: Job, stage: int, in_flight: float, *, head: bool, versions: int = 1) -> Memory:
    return stage_memory(
        job.workload,
        job.bounds,
        stage,
        in_flight,
        head=head,
        zero=job.zero,
        replicas=job.replicas,
        recompute=job.recompute,
        weight_versions=versions,
    )


def _reduction(job: Job, memory: Sequence[Memory]) -> float:
    """Seconds of a ring that sums the gradients of the largest stage over the replicas, after the batch."""
    if job.replicas == 1:
        return 0.0
    link = job.cluster.inside if job.cluster.stages_a_host is None else job.cluster.between
    size = max(m.gradients for m in memory)
    return 2 * (job.replicas - 1) / job.replicas * size / link.bandwidth + 2 * (job.replicas - 1) * link.latency


def _plain_work(costs: Sequence[Costs]) -> float:
    return sum(c.forward + c.input_gradient + c.weight_gradient for c in costs)


@dataclass(frozen=True)
class Advice:
    """What to do, and why.

    Attributes:
        row: the candidate that is advised; None: nothing fits.
        reason: in one or two sentences.
    """

    row: Row | None
    reason: str


def advise(job: Job, rows: Sequence[Row], tolerance: float = 0.02) -> Advice:
    """The fastest candidate of ours that fits and whose loss was measured to be within ``tolerance`` of
    backpropagation's, if it is more than 5% faster than the best exact schedule that fits; else that one."""
    memory = job.cluster.device.memory
    running = [row for row in rows if row.timing is not None]
    fitting = [row for row in running if memory is None or row.most_memory <= memory]
    if not fitting:
        least = min(running, key=lambda row: row.most_memory, default=None)
        if least is None:
            raise PlanError("no way of training can run so.")
        assert memory is not None
        return Advice(
            None,
            f"Nothing fits into {memory / 2**30:.0f} GiB: {least.candidate.name} holds least, "
            f"{least.most_memory / 2**30:.1f} GiB on its largest stage. Take more stages, ZeRO 1 with more replicas, "
            "smaller micro-batches, or recomputation.",
        )
    exact = min((row for row in fitting if row.exact), key=lambda row: row.batch_time, default=None)
    ours = [row for row in fitting if row.candidate.block is not None and not row.exact and row.learned is not None]
    good = [row for row in ours if row.learned is not None and row.learned.mean <= tolerance]
    best = min(good, key=lambda row: row.batch_time, default=None)
    if exact is None or (best is not None and best.batch_time < 0.95 * exact.batch_time):
        if best is None:
            chosen = min(fitting, key=lambda row: row.batch_time)
            return Advice(chosen, f"{chosen.candidate.name} is the fastest that fits; its learning is not measured.")
        against = (
            "" if exact is None else f" in {best.batch_time / exact.batch_time:.2f} of {exact.candidate.name}'s time"
        )
        return Advice(best, f"{best.candidate.name}{against}; {best.learned.sentence() if best.learned else ''}")
    missed = min(ours, key=lambda row: row.batch_time, default=None)
    why = (
        "nothing that interlocks is more than 5% faster"
        if best is not None or missed is None or missed.batch_time >= 0.95 * exact.batch_time
        else f"what is faster ({missed.candidate.name}, {missed.batch_time / exact.batch_time:.2f} of the time) was "
        f"measured to learn worse than {tolerance:.0%} allows"
    )
    return Advice(exact, f"Do not interlock here: {why}. {exact.candidate.name} is exact and the fastest that fits.")
