"""What a stage computes for a micro-batch is what its schedule's instructions add up to."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

from ibp_deepspeed.planner.pieces import crossings, works
from ibp_deepspeed.schedule.generator import InterlockedTrainSchedule
from ibp_deepspeed.schedule.instructions import SendGrad
from ibp_deepspeed.schedule.simulator import Costs
from ibp_deepspeed.strategy.strategy import Strategy
from ibp_deepspeed.strategy.timeline import BatchStrategy
from tests.schedule.test_clock import strategies


@settings(max_examples=200, deadline=None)
@given(strategies(most_stages=9))
def test_pieces_are_those_of_the_instructions(strategy: Strategy) -> None:
    costs = [Costs(1.0, 10.0, 100.0, 1000.0, 10_000.0, at_once=-0.25).scaled(k + 1) for k in range(strategy.stages)]
    batch = BatchStrategy.uniform(strategy, 1)
    programs = [InterlockedTrainSchedule.for_batch(batch, k).program for k in range(strategy.stages)]
    assert works(strategy, costs) == pytest.approx(
        [sum(cost.of(i) for i in program) for cost, program in zip(costs, programs, strict=True)]
    )
    assert crossings(strategy) == [sum(isinstance(i, SendGrad) for i in program) for program in programs]
