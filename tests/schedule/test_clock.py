"""The clock of planning says what the simulator does, to the last digit, of any strategy, cost and jitter."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ibp_deepspeed.config.interlocking import Mode
from ibp_deepspeed.errors import ScheduleError
from ibp_deepspeed.schedule.clock import Clock
from ibp_deepspeed.schedule.generator import InterlockedTrainSchedule
from ibp_deepspeed.schedule.predict import measure
from ibp_deepspeed.schedule.simulator import Boundary, Costs, Simulator
from ibp_deepspeed.strategy.strategy import Strategy
from ibp_deepspeed.strategy.timeline import BatchStrategy

COSTS = st.builds(Costs, *[st.floats(0.1, 2.0)] * 3, st.floats(0.0, 1.0), st.floats(0.0, 1.0))
BOUNDARIES = st.builds(Boundary, st.floats(0.0, 3.0), st.floats(0.0, 3.0))


@st.composite
def strategies(draw: st.DrawFn, most_stages: int = 5) -> Strategy:
    """Any that there can be."""
    stages = draw(st.integers(1, most_stages))
    mode: Mode = draw(st.sampled_from(get_args(Mode)))
    width = stages if mode == "sum" else draw(st.integers(1, stages))
    exits = draw(
        st.none() | st.sets(st.integers(0, stages - 1), min_size=1).map(lambda e: (*sorted(e | {stages - 1}),))
    )
    borrow = 0 if mode == "sum" or exits else draw(st.integers(0, 1))
    split, slack = draw(st.booleans()), draw(st.integers(0, 2))
    frozen = draw(st.just(()) | st.sets(st.integers(0, stages - 1)).map(tuple))
    return Strategy(
        stages, width, mode, hop_slack=slack, exits=exits, borrow=borrow, split_backward=split, frozen=frozen
    )


@settings(max_examples=150, deadline=None)
@given(strategies(), st.integers(1, 6), st.data())
def test_the_clock_is_the_simulator_without_its_events(
    strategy: Strategy, micro_batches: int, data: st.DataObject
) -> None:
    stages, batches = strategy.stages, 6
    costs = data.draw(st.lists(COSTS, min_size=stages, max_size=stages))
    boundaries = data.draw(st.lists(BOUNDARIES, min_size=stages - 1, max_size=stages - 1))
    jitter, seed = data.draw(st.sampled_from([0.0, 0.3])), data.draw(st.integers(0, 3))
    batch = BatchStrategy.uniform(strategy, micro_batches)
    least = batch.channel_depth(None)
    depth = data.draw(st.sampled_from([None, least, min(micro_batches, least)]))
    schedules = [InterlockedTrainSchedule.for_batch(batch, k) for k in range(stages)]
    options: dict[str, Any] = {"channel_depth": depth, "jitter": jitter, "seed": seed}
    simulator = Simulator([schedules] * batches, costs=costs, boundaries=boundaries or None, **options)
    try:
        said = measure(simulator, 2, micro_batches)
    except ScheduleError:  # a depth too small for the strategy
        with pytest.raises(ScheduleError, match="wait for ever"):
            Clock(schedules, costs, boundaries, **options).run(batches)
        return
    clock = Clock(schedules, costs, boundaries, **options)
    clock.run(3)
    clock.run(batches)  # goes on where it was
    assert clock.batch_time(2) == pytest.approx(said.batch_time, rel=1e-9)
    assert clock.idle(2) == pytest.approx(said.idle, abs=1e-9)
    assert 0 < clock.executed <= sum(len(program) for program in simulator.programs)
