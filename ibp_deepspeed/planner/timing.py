"""How long a batch takes, for any number of stages and micro-batches in seconds of computing.

Small pipelines are simulated as they are (:mod:`ibp_deepspeed.schedule.clock`), large ones are continued from smaller
ones with all stages as slow as the slowest (:mod:`ibp_deepspeed.planner.continuation`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import gcd

from ibp_deepspeed.errors import PlanError
from ibp_deepspeed.planner.continuation import Shape, between, continued
from ibp_deepspeed.planner.execution import execute
from ibp_deepspeed.planner.peers import Peer, make_peer, why_not
from ibp_deepspeed.planner.pieces import pieces, works
from ibp_deepspeed.schedule.clock import Clock
from ibp_deepspeed.schedule.generator import InterlockedTrainSchedule
from ibp_deepspeed.schedule.simulator import Boundary, Costs
from ibp_deepspeed.strategy.strategy import Strategy
from ibp_deepspeed.strategy.timeline import BatchStrategy

LARGEST = 20_000
"""Instructions of all stages in a batch up to which it is simulated as it is: about a quarter of a second."""
LARGEST_UNEVEN = 200_000
"""The same with jitter or a straggler, of which nothing is continued."""
SETTLED = 1e-3
"""Share of a batch's time by which twice as many batches may change it."""
JITTERED = 32
"""Batches over which jitter is averaged."""


@dataclass(frozen=True)
class Timing:
    """What a batch takes.

    Attributes:
        batch_time: a batch in the steady state, in the unit of the costs.
        idle: share of each stage's time; of a pipeline too large to simulate, of stages as slow as the slowest.
        in_flight: the most micro-batches that each stage holds.
        simulated: as it is; otherwise continued from smaller ones.
        executed: instructions that were simulated for this.
    """

    batch_time: float
    idle: list[float]
    in_flight: list[int]
    simulated: bool
    executed: int = 0


@dataclass(frozen=True)
class Unevenness:
    """What is not alike in time or between stages, so that it has to be simulated as it is.

    Attributes:
        jitter: standard deviation of the logarithm of a factor on each piece of work.
        seed: of these factors.
        straggler: whether one stage's costs are another's times a factor.
    """

    jitter: float = 0.0
    seed: int = 0
    straggler: bool = False

    def refuse_more_than(self, instructions: int, micro_batches: int) -> bool:
        """Whether there is any; then so many instructions must not be too many.

        Raises:
            PlanError: they are, with how many micro-batches would not be.
        """
        if not self.jitter and not self.straggler:
            return False
        if instructions > LARGEST_UNEVEN:
            fit = LARGEST_UNEVEN * micro_batches // instructions
            way = f"at most {fit} micro-batches" if fit else "fewer stages"
            raise PlanError(
                f"with jitter or a straggler a batch is simulated as it is, up to {LARGEST_UNEVEN:,} instructions; "
                f"this one has {instructions:,}: {way} would fit."
            )
        return True


EVEN = Unevenness()


def strategy_timing(
    strategy: Strategy,
    micro_batches: int,
    costs: Sequence[Costs],
    boundaries: Sequence[Boundary],
    uneven: Unevenness = EVEN,
) -> Timing:
    """Of one of our strategies.

    Args:
        strategy: on K stages.
        micro_batches: M.
        costs: of each stage.
        boundaries: K-1.
        uneven: what can't be continued.

    Raises:
        PlanError: an uneven batch that is too large to simulate.
    """
    stages = strategy.stages
    in_flight = [strategy.most_in_flight(k, micro_batches) for k in range(stages)]
    instructions = micro_batches * sum(4 + 2 * piece.input_gradients for piece in pieces(strategy))
    as_it_is = uneven.refuse_more_than(instructions, micro_batches)
    shape = Shape.of(strategy)
    if as_it_is or instructions <= LARGEST or shape is None:
        time, idle, executed = _simulate(strategy, micro_batches, costs, boundaries, uneven)
        return Timing(time, idle, in_flight, simulated=True, executed=executed)
    alike, boundary = slowest(costs), worst(boundaries)
    executed = 0

    def smaller(of: Strategy, m: int) -> float:
        nonlocal executed
        time, _, more = _simulate(of, m, [alike] * of.stages, [boundary] * (of.stages - 1))
        executed += more
        return time

    time = continued(strategy, shape, micro_batches, smaller)
    idle = [1 - micro_batches * work / time for work in works(strategy, [alike] * stages)]
    return Timing(time, idle, in_flight, simulated=False, executed=executed)


def peer_timing(
    name: str,
    stages: int,
    micro_batches: int,
    costs: Sequence[Costs],
    boundaries: Sequence[Boundary],
    uneven: Unevenness = EVEN,
) -> Timing:
    """Of another system's schedule; a rank of two chunks holds half a stage in each.

    Raises:
        PlanError: it can't run with so few micro-batches, or an uneven batch that is too large to simulate.
    """
    reason = why_not(name, stages, micro_batches)
    if reason is not None:
        raise PlanError(reason)
    instructions = 12 * stages * micro_batches
    if uneven.refuse_more_than(instructions, micro_batches) or instructions <= LARGEST:
        peer = make_peer(name, stages, micro_batches)
        batches = JITTERED if uneven.jitter else peer.settles_after + 4
        found = execute(
            peer, chunk_costs(peer, costs), boundaries, batches=batches, jitter=uneven.jitter, seed=uneven.seed
        )
        return Timing(found.batch_time, found.idle, peer.in_flight, simulated=True, executed=found.executed)
    alike, boundary = slowest(costs), worst(boundaries)
    held: dict[int, int] = {}
    executed = 0

    def smaller(k: int, m: int) -> float:
        nonlocal executed
        peer = make_peer(name, k, m)
        held[k] = max(peer.in_flight)
        costs, links = chunk_costs(peer, [alike] * k), [boundary] * (k - 1)
        found = execute(peer, costs, links, batches=peer.settles_after + 4)
        executed += found.executed
        return found.batch_time

    time = on_the_ray(smaller, stages, micro_batches)
    work = micro_batches * (alike.plain - (alike.at_once if name in ("ZB1", "ZBV") else 0.0))
    largest = max(held)
    most = -(-held[largest] * stages // largest)  # as many for each stage as in the largest of the smaller ones
    return Timing(time, [1 - work / time] * stages, [most] * stages, simulated=False, executed=executed)


def on_the_ray(time: Callable[[int, int], float], stages: int, micro_batches: int) -> float:
    """time(K, M) on the line through two smaller pipelines of the same M / K, or itself if there are none.

    If K and M have too little in common, M lies between two that have more; where M is below K / 8, K alone grows.
    """
    steps = gcd(stages, micro_batches)
    k, m = stages // steps, micro_batches // steps
    first = max(-(-8 // k), -(-4 // m))
    if 2 * first < steps:
        a, b = time(first * k, first * m), time(2 * first * k, 2 * first * m)
        return b + (b - a) / first * (steps - 2 * first)
    if 12 * stages * micro_batches <= LARGEST_UNEVEN:
        return time(stages, micro_batches)
    grain = stages // 8
    if micro_batches < grain:
        first = max(8, micro_batches)
        a, b = time(first, micro_batches), time(2 * first, micro_batches)
        return b + (b - a) / first * (stages - 2 * first)
    return between(Fraction(micro_batches, grain), lambda count: on_the_ray(time, 8 * grain, grain * count))


def slowest(costs: Sequence[Costs]) -> Costs:
    """The greatest of each piece: a stage that is at least as slow as all."""
    pieces = ("forward", "input_gradient", "weight_gradient", "head", "borrowed_gradient", "at_once")
    return Costs(**{piece: max(getattr(c, piece) for c in costs) for piece in pieces})


def worst(boundaries: Sequence[Boundary]) -> Boundary:
    """The greatest latency and sending time; nothing if there is no boundary."""
    latency = max((b.latency for b in boundaries), default=0.0)
    return Boundary(latency, max((b.sending for b in boundaries), default=0.0))


def _simulate(
    strategy: Strategy,
    micro_batches: int,
    costs: Sequence[Costs],
    boundaries: Sequence[Boundary],
    uneven: Unevenness = EVEN,
) -> tuple[float, list[float], int]:
    """Batches until the time of a batch has settled: that, each stage's idle share, and instructions."""
    batch = BatchStrategy.uniform(strategy, micro_batches)
    schedules = [InterlockedTrainSchedule.for_batch(batch, k) for k in range(strategy.stages)]
    clock = Clock(
        schedules,
        costs,
        boundaries,
        channel_depth=batch.channel_depth(None),
        jitter=uneven.jitter,
        seed=uneven.seed,
    )
    before, batches = 0.0, JITTERED if uneven.jitter else 4
    while True:
        clock.run(batches)
        time = clock.batch_time(batches // 2)
        if uneven.jitter or abs(time - before) <= SETTLED * time or batches >= 64:
            return time, clock.idle(batches // 2), clock.executed
        before, batches = time, 2 * batches


def chunk_costs(peer: Peer, costs: Sequence[Costs]) -> list[Costs]:
    """Costs of each chunk of a peer, equal parts of its rank's stage."""
    share = peer.chunks // len(peer.programs)
    pieces = ("forward", "input_gradient", "weight_gradient", "at_once")
    return [Costs(**{p: getattr(costs[rank], p) / share for p in pieces}) for rank in peer.places]
