"""What the schedules say about stages that sleep, beside what is measured: ours and other systems'.

A contender's time is simulated from the instructions that it executes; and once more with each rank's own processor
time, measured in the same run, on top of the work that it sleeps for: what its runtime itself takes. Both are held
against the fastest repeat, because what else the machine does can only add to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.speed.contenders import PEERS, interlocking
from benchmarks.speed.harness import Row
from benchmarks.speed.sleeping import HEAD_UNITS
from ibp_deepspeed import InterlockingConfig, Strategy
from ibp_deepspeed.planner.peers import ASYNCHRONOUS
from ibp_deepspeed.planner.pieces import works
from ibp_deepspeed.planner.timing import Timing, peer_timing, strategy_timing
from ibp_deepspeed.schedule.simulator import Boundary, Costs
from ibp_deepspeed.strategy.timeline import Timeline

UNIT = Costs(1.0, 1.0, 1.0, HEAD_UNITS)
_NAMES = {"2BW": ASYNCHRONOUS}


def strategy_of(name: str, stages: int) -> Strategy | None:
    """What a contender's schedule is made of; None for peers whose schedules are not ours."""
    if name in PEERS and name != "1F1B":
        return None
    block = interlocking("B-W fused" if name == "1F1B" else name, stages)
    return Timeline(InterlockingConfig.parse(block), stages, 1).at(0)[0]


def simulated(name: str, micro_batches: int, latency: float, costs: Sequence[Costs]) -> Timing:
    """Of any contender, in units.

    Args:
        name: ours or a peer's.
        micro_batches: M.
        latency: of a message.
        costs: of each stage.
    """
    stages = len(costs)
    boundaries = [Boundary(latency)] * (stages - 1)
    if name in PEERS:
        return peer_timing(_NAMES.get(name, name), stages, micro_batches, costs, boundaries)
    strategy = strategy_of(name, stages)
    assert strategy is not None
    return strategy_timing(strategy, micro_batches, costs, boundaries)


def work(name: str, stages: int) -> list[float]:
    """Units that each stage works for a micro-batch."""
    strategy = None if name in PEERS else strategy_of(name, stages)
    return [3.0] * stages if strategy is None else works(strategy, [UNIT] * stages)


def predictions(
    name: str, stages: int, micro_batches: int, latency: float, measured: float, own: Sequence[float]
) -> dict[str, float]:
    """Columns of a row.

    Args:
        name: of the contender.
        stages: K.
        micro_batches: M.
        latency: of a message, in units.
        measured: units a micro-batch, of the fastest repeat.
        own: processor time of each rank a micro-batch, in units.

    Returns:
        ``limit``: the busiest stage's work; ``predicted``: units a micro-batch; ``off``: by what share the measured
        ones are more; ``own``: of the busiest rank; ``predicted_with_own``, ``off_with_own``.
    """
    of_stage = work(name, stages)
    said = simulated(name, micro_batches, latency, [UNIT] * stages).batch_time / micro_batches
    slower = [UNIT.scaled(1 + more / units) for more, units in zip(own, of_stage, strict=True)]
    said_with_own = simulated(name, micro_batches, latency, slower).batch_time / micro_batches
    return {
        "limit": round(max(of_stage), 3),
        "predicted": round(said, 3),
        "off": round(measured / said - 1, 4),
        "own": round(max(own), 4),
        "predicted_with_own": round(said_with_own, 3),
        "off_with_own": round(measured / said_with_own - 1, 4),
    }


COLUMNS: dict[str, Callable[[Row], str]] = {
    "simulated": lambda row: f"{row['predicted']:.2f}",
    "fastest repeat off by": lambda row: f"{row['off']:+.1%}",
    "own time of a rank": lambda row: f"{row['own']:.3f}",
    "simulated with it": lambda row: f"{row['predicted_with_own']:.2f}",
    "then off by": lambda row: f"{row['off_with_own']:+.1%}",
}


def summary(rows: Sequence[Row]) -> str:
    """The largest deviations, in one line."""

    def largest(key: str) -> str:
        row: Any = max(rows, key=lambda row: abs(row[key]))
        return f"{row[key]:+.1%} ({row['contender']}, K = {row['stages']}, M = {row['micro_batches']})"

    return (
        f"Largest deviation of the fastest repeat from what is simulated: {largest('off')}; "
        f"with each rank's own processor time counted as work: {largest('off_with_own')}."
    )
