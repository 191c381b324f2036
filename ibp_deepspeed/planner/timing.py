"""How long a batch takes, for any number of stages and micro-batches in seconds of computing.

Small pipelines are simulated as they are (:mod:`ibp_deepspeed.schedule.simulator`). Of large ones smaller pipelines
are, with all stages as slow as the slowest, and their times are continued (compared in tests/planner/test_timing.py):

* Where losses reach less than half of the stages, a batch takes no longer on more stages, and beyond four times as
  many micro-batches as these each further one takes the same.
* Where they reach further, as in backpropagation, time is linear on the rays of constant M / K.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import gcd

from ibp_deepspeed.errors import PlanError
from ibp_deepspeed.planner.peers import Execution, execute, make_peer, why_not
from ibp_deepspeed.schedule.generator import InterlockedTrainSchedule
from ibp_deepspeed.schedule.simulator import Boundary, Costs, Simulator
from ibp_deepspeed.strategy.strategy import Strategy
from ibp_deepspeed.strategy.timeline import BatchStrategy

LARGEST = 6_000
"""Instructions of all stages in a batch up to which it is simulated as it is: about half a second."""


@dataclass(frozen=True)
class Timing:
    """What a batch takes.

    Attributes:
        batch_time: a batch in the steady state, in the unit of the costs.
        idle: share of each stage's time; of a pipeline too large to simulate, of its slowest stage, K times.
        in_flight: the most micro-batches that each stage holds.
        simulated: as it is; otherwise continued from smaller ones.
    """

    batch_time: float
    idle: list[float]
    in_flight: list[int]
    simulated: bool


def strategy_timing(
    make: Callable[[int], Strategy],
    stages: int,
    micro_batches: int,
    costs: Sequence[Costs],
    boundaries: Sequence[Boundary],
) -> Timing:
    """Of one of our strategies.

    Args:
        make: the strategy on a number of stages; what the exits and the width mean must not depend on it.
        stages: K.
        micro_batches: M.
        costs: of each stage.
        boundaries: K-1.
    """
    strategy = make(stages)
    in_flight = [strategy.most_in_flight(k, micro_batches) for k in range(stages)]
    instructions = micro_batches * sum(5 + 2 * len(strategy.weights(k)) for k in range(stages))
    if instructions <= LARGEST:
        found = _simulate(strategy, micro_batches, costs, boundaries)
        return Timing(found.batch_time, found.idle, in_flight, simulated=True)
    alike, boundary = slowest(costs), worst(boundaries)

    def smaller(k: int, m: int) -> float:
        return _simulate(make(k), m, [alike] * k, [boundary] * (k - 1)).batch_time

    grain = _grain(strategy)
    enough = -(-2 * (max(strategy.distance(k) for k in range(stages)) + 1) // grain) * grain
    short = enough < stages
    time = beyond(smaller, enough, micro_batches) if short else on_the_ray(smaller, stages, micro_batches)
    work = micro_batches * stage_work(strategy, alike, stages // 2)
    return Timing(time, [1 - work / time] * stages, in_flight, simulated=False)


def peer_timing(
    name: str, stages: int, micro_batches: int, costs: Sequence[Costs], boundaries: Sequence[Boundary]
) -> Timing:
    """Of another system's schedule; a rank of two chunks holds half a stage in each.

    Raises:
        PlanError: it can't run with so few micro-batches.
    """
    if 12 * stages * micro_batches <= LARGEST:
        found = _execute(name, stages, micro_batches, costs, boundaries)
        return Timing(found.batch_time, found.idle, found.in_flight, simulated=True)
    reason = why_not(name, stages, micro_batches)
    if reason is not None:
        raise PlanError(reason)
    alike, boundary = slowest(costs), worst(boundaries)

    def smaller(k: int, m: int) -> float:
        return _execute(name, k, m, [alike] * k, [boundary] * (k - 1)).batch_time

    time = on_the_ray(smaller, stages, micro_batches)
    work = micro_batches * (alike.forward + alike.input_gradient + alike.weight_gradient)
    return Timing(time, [1 - work / time] * stages, [min(stages, micro_batches)] * stages, simulated=False)


def asynchronous_timing(stages: int, micro_batches: int, costs: Sequence[Costs]) -> Timing:
    """Of 1F1B that never drains (PipeDream-2BW): the slowest stage's work, if messages come in time."""
    work = [c.forward + c.input_gradient + c.weight_gradient for c in costs]
    held = [stages - k for k in range(stages)]
    return Timing(micro_batches * max(work), [1 - w / max(work) for w in work], held, simulated=True)


def beyond(time: Callable[[int, int], float], stages: int, micro_batches: int) -> float:
    """time(K, M) on the line through two smaller M, from 4K on."""
    few, more = 4 * stages, 4 * stages + 8
    if micro_batches <= more:
        return time(stages, micro_batches)
    a, b = time(stages, few), time(stages, more)
    return b + (b - a) / (more - few) * (micro_batches - more)


def on_the_ray(time: Callable[[int, int], float], stages: int, micro_batches: int) -> float:
    """time(K, M) on the line through two smaller pipelines of the same M / K, or itself if there are none."""
    steps = gcd(stages, micro_batches)
    k, m = stages // steps, micro_batches // steps
    first = max(-(-8 // k), -(-4 // m))
    second = 2 * first
    if second >= steps:
        return time(stages, micro_batches)
    a, b = time(first * k, first * m), time(second * k, second * m)
    return b + (b - a) / (second - first) * (steps - second)


def slowest(costs: Sequence[Costs]) -> Costs:
    """The greatest of each piece: a stage that is at least as slow as all."""
    pieces = ("forward", "input_gradient", "weight_gradient", "head", "borrowed_gradient")
    return Costs(**{piece: max(getattr(c, piece) for c in costs) for piece in pieces})


def worst(boundaries: Sequence[Boundary]) -> Boundary:
    """The greatest latency and sending time; nothing if there is no boundary."""
    latency = max((b.latency for b in boundaries), default=0.0)
    return Boundary(latency, max((b.sending for b in boundaries), default=0.0))


def _grain(strategy: Strategy) -> int:
    """Numbers of stages with the same pattern of exits differ by multiples of it."""
    exits = strategy.placement.losses
    gaps = {b - a for a, b in zip(exits, exits[1:], strict=False)}
    return gaps.pop() if len(gaps) == 1 else 1


def stage_work(strategy: Strategy, costs: Costs, stage: int) -> float:
    """Time that a stage computes for a micro-batch."""
    schedule = InterlockedTrainSchedule.for_batch(BatchStrategy.uniform(strategy, 1), stage)
    return sum(costs.of(instruction) for instruction in schedule.program)


def _simulate(
    strategy: Strategy, micro_batches: int, costs: Sequence[Costs], boundaries: Sequence[Boundary]
) -> Execution:
    """Batches until the time of a batch has settled."""
    batch = BatchStrategy.uniform(strategy, micro_batches)
    schedules = [InterlockedTrainSchedule.for_batch(batch, k) for k in range(strategy.stages)]
    depth = batch.channel_depth(None)
    before, batches = 0.0, 4
    while True:
        simulator = Simulator([schedules] * batches, channel_depth=depth, costs=costs, boundaries=boundaries)
        found = _last_half(simulator, batches)
        if abs(found.batch_time - before) <= 2e-3 * found.batch_time or batches >= 64:
            return found
        before, batches = found.batch_time, 2 * batches


def _last_half(simulator: Simulator, batches: int) -> Execution:
    simulator.run()
    count = batches // 2
    spans, busy, in_flight = [0.0] * simulator.stages, [0.0] * simulator.stages, [0] * simulator.stages
    starts, held = [0.0] * simulator.stages, [0] * simulator.stages
    for event in simulator.events:
        stage = event.stage
        if event.index < simulator.bounds[stage][batches - count]:
            starts[stage] = max(starts[stage], event.end)
        else:
            busy[stage] += event.end - event.start
            spans[stage] = max(spans[stage], event.end)
        if not event.partly:
            held[stage] += getattr(event.instruction, "begins", False) - getattr(event.instruction, "ends", False)
            in_flight[stage] = max(in_flight[stage], held[stage])
    time = max(end - start for end, start in zip(spans, starts, strict=True)) / count
    return Execution(time, [1 - b / count / time for b in busy], in_flight)


def _execute(
    name: str, stages: int, micro_batches: int, costs: Sequence[Costs], boundaries: Sequence[Boundary]
) -> Execution:
    peer = make_peer(name, stages, micro_batches)
    share = peer.chunks // stages
    pieces = ("forward", "input_gradient", "weight_gradient")
    chunks = [Costs(**{p: getattr(costs[rank], p) / share for p in pieces}) for rank in peer.places]
    return execute(peer, chunks, boundaries)
