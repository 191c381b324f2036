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
from ibp_deepspeed.planner.peers import Peer, execute, make_peer, why_not
from ibp_deepspeed.schedule.generator import InterlockedTrainSchedule
from ibp_deepspeed.schedule.predict import Prediction, measure
from ibp_deepspeed.schedule.simulator import Boundary, Costs, Simulator
from ibp_deepspeed.strategy.strategy import Strategy
from ibp_deepspeed.strategy.timeline import BatchStrategy

LARGEST = 6_000
"""Instructions of all stages in a batch up to which it is simulated as it is: about half a second."""
SETTLED = 2e-3
"""Share of a batch's time by which twice as many batches may change it."""


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
        peer = make_peer(name, stages, micro_batches)
        found = execute(peer, chunk_costs(peer, costs), boundaries)
        return Timing(found.batch_time, found.idle, peer.in_flight, simulated=True)
    reason = why_not(name, stages, micro_batches)
    if reason is not None:
        raise PlanError(reason)
    alike, boundary = slowest(costs), worst(boundaries)
    held: dict[int, int] = {}

    def smaller(k: int, m: int) -> float:
        peer = make_peer(name, k, m)
        held[k] = max(peer.in_flight)
        return execute(peer, chunk_costs(peer, [alike] * k), [boundary] * (k - 1)).batch_time

    time = on_the_ray(smaller, stages, micro_batches)
    work = micro_batches * (alike.plain - (alike.at_once if name in ("ZB1", "ZBV") else 0.0))
    largest = max(held)
    most = -(-held[largest] * stages // largest)  # as many for each stage as in the largest of the smaller ones
    return Timing(time, [1 - work / time] * stages, [most] * stages, simulated=False)


def asynchronous_timing(stages: int, micro_batches: int, costs: Sequence[Costs]) -> Timing:
    """Of 1F1B that never drains (PipeDream-2BW): the slowest stage's work, if messages come in time."""
    work = [c.plain for c in costs]
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
    pieces = ("forward", "input_gradient", "weight_gradient", "head", "borrowed_gradient", "at_once")
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
) -> Prediction:
    """Batches until the time of a batch has settled."""
    batch = BatchStrategy.uniform(strategy, micro_batches)
    schedules = [InterlockedTrainSchedule.for_batch(batch, k) for k in range(strategy.stages)]
    depth = batch.channel_depth(None)
    before, batches = 0.0, 4
    while True:
        simulator = Simulator([schedules] * batches, channel_depth=depth, costs=costs, boundaries=boundaries)
        found = measure(simulator, batches // 2, micro_batches)
        if abs(found.batch_time - before) <= SETTLED * found.batch_time or batches >= 64:
            return found
        before, batches = found.batch_time, 2 * batches


def chunk_costs(peer: Peer, costs: Sequence[Costs]) -> list[Costs]:
    """Costs of each chunk of a peer, equal parts of its rank's stage."""
    share = peer.chunks // len(peer.programs)
    pieces = ("forward", "input_gradient", "weight_gradient", "at_once")
    return [Costs(**{p: getattr(costs[rank], p) / share for p in pieces}) for rank in peer.places]
