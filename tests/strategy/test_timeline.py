"""Which strategy each micro-batch of each batch has, and how much is live."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ibp_deepspeed import (
    ConfigError,
    InterlockedReference,
    InterlockedTrainSchedule,
    InterlockingConfig,
    ModuleError,
    Strategy,
)
from ibp_deepspeed.engine.initialize import _check_module
from ibp_deepspeed.schedule.instructions import BackwardPass, BackwardWeight, ForwardPass
from ibp_deepspeed.strategy.timeline import BatchStrategy, Timeline


def timeline(stages: int, micro_batches: int, **options: Any) -> Timeline:
    return Timeline(InterlockingConfig.parse(options), stages, micro_batches)


def widths(batch: BatchStrategy) -> list[int]:
    return [strategy.width for strategy in batch.strategies]


def test_without_options_all_batches_are_alike() -> None:
    plain = timeline(4, 3, strategy="pairwise", mode="window", hop_slack=1)
    assert plain.at(0) == plain.at(1000) == BatchStrategy.uniform(Strategy(4, 2, "window", 1), 3)
    assert plain.distinct() == [plain.at(0)] and plain.strategies() == [Strategy(4, 2, "window", 1)]
    assert plain.period == 1


def test_phases_begin_with_their_step_and_keep_the_mode_unless_told() -> None:
    phases = [{"from_step": 2, "width": 2, "mode": "window"}, {"from_step": 5, "width": 9}]
    changing = timeline(4, 2, strategy="local", schedule=phases)
    assert [widths(changing.at(t))[0] for t in range(8)] == [1, 1, 2, 2, 2, 4, 4, 4]
    assert [changing.at(t)[0].mode for t in (0, 2, 5)] == ["furthest", "window", "furthest"]
    assert changing.at(5)[0].is_backpropagation, "K or more is backpropagation"
    assert changing.distinct() == [changing.at(t) for t in (0, 2, 5)]


def test_a_schedule_from_step_0_replaces_the_strategy() -> None:
    assert timeline(4, 2, schedule=[{"from_step": 0, "width": 3}]).strategies() == [Strategy(4, 3)]
    headless = InterlockingConfig(schedule=({"from_step": 0, "width": 4},), aux_head=None)  # type: ignore[arg-type]
    assert Timeline(headless, 4, 2, aux_heads=False).at(0)[0].is_backpropagation
    InterlockedReference([nn.Identity()] * 4, None, nn.functional.mse_loss, headless)


def test_every_p_th_batch_is_backpropagation() -> None:
    periodic = timeline(4, 2, strategy="local", mode="window", global_interval=3)
    assert [widths(periodic.at(t)) for t in range(7)] == [[1, 1], [1, 1], [4, 4], [1, 1], [1, 1], [4, 4], [1, 1]]
    assert periodic.at(2)[0].is_backpropagation, "whatever the mode of the others"
    assert periodic.period == 3 and len(periodic.distinct()) == 2


@pytest.mark.parametrize(
    ("micro_batches", "fraction", "wide"), [(1, 0.1, 1), (4, 0.25, 1), (5, 0.25, 2), (10, 0.3, 3), (4, 1.0, 4)]
)
def test_mixed_micro_batches_come_first_and_are_rounded_up(micro_batches: int, fraction: float, wide: int) -> None:
    mixed = timeline(4, micro_batches, strategy="local", mixed={"width": 3, "fraction": fraction, "mode": "window"})
    assert widths(mixed.at(7)) == [3] * wide + [1] * (micro_batches - wide)
    assert {strategy.mode for strategy in mixed.at(7).strategies[:wide]} == {"window"}


def test_mixing_rests_where_all_are_as_wide() -> None:
    phases = [{"from_step": 4, "width": 4}]
    both = timeline(4, 2, strategy="local", schedule=phases, mixed={"width": 3, "fraction": 0.5}, global_interval=4)
    assert [widths(both.at(t)) for t in (0, 3, 4)] == [[3, 1], [4, 4], [4, 4]]
    assert len(both.distinct()) == 2, "a phase of backpropagation is the batch that comes every P-th time too"


def test_a_mixture_that_is_not_wider_is_refused() -> None:
    with pytest.raises(ConfigError, match="mixed.width.* is 2, which is not above the width 2 that it is mixed into"):
        timeline(4, 2, strategy="pairwise", mixed={"width": 2, "fraction": 0.5})


def test_channel_depth_is_that_of_the_deepest_batch() -> None:
    assert timeline(4, 4, strategy="local", global_interval=5).channel_depth() == 8
    assert timeline(8, 1, strategy="local", hop_slack=1, global_interval=5).channel_depth() == 15
    with pytest.raises(ConfigError, match="channel_depth.* is 2, the least for width 4 .* is 4"):
        timeline(4, 4, strategy="local", channel_depth=2, mixed={"width": 4, "fraction": 0.25}).channel_depth()


@pytest.mark.parametrize("option", ["schedule", "mixed"])
def test_a_module_is_refused_for_what_comes_later(option: str) -> None:
    """Backpropagation needs no heads and may tie layers; another width, or mode, at any time does not."""
    blocks: dict[str, dict[str, Any]] = {
        "schedule": {"strategy": "global", "schedule": [{"from_step": 1000, "width": 3}]},
        "mixed": {"strategy": "nwise", "width": 3, "mixed": {"width": 4, "fraction": 0.5}},
    }
    tied, plain = stub(["embedding"]), stub(["embedding"])
    later = timeline(4, 2, **blocks[option])
    with pytest.raises(ModuleError, match="'embedding' is tied across stages, which width 3 of 4 stages can't train"):
        _check_module(tied, later)
    with pytest.raises(ConfigError, match="width 3 of 4 stages in mode furthest needs a head for every exit"):
        Timeline(InterlockingConfig(**blocks[option]), 4, 2, aux_heads=False)
    _check_module(plain, timeline(4, 2, strategy="global", global_interval=2, schedule=[{"from_step": 9, "width": 5}]))


def stub(tied: list[str]) -> Any:
    """As much of a module as is checked."""
    return SimpleNamespace(num_stages=4, dynamic_shape=False, tied_across_stages=lambda: tied)


@given(data=st.data(), stages=st.integers(1, 7), slack=st.integers(0, 2), split=st.booleans(), every=st.integers(1, 7))
def test_live_micro_batches_and_buffers_are_what_the_schedule_needs(
    data: st.DataObject, stages: int, slack: int, split: bool, every: int
) -> None:
    exits = InterlockingConfig(exits=every).exits_for(stages)
    given_widths = data.draw(st.lists(st.integers(1, stages), min_size=1, max_size=9))
    options: dict[str, Any] = {"hop_slack": slack, "exits": exits, "split_backward": split}
    batch = BatchStrategy(tuple(Strategy(stages, width, **options) for width in given_widths))
    reached = not split or len(set(given_widths)) == 1  # another kind of update in between works off what is due
    for stage in range(stages):
        live: dict[int, int] = {}
        most = 0
        for instruction in (i for step in InterlockedTrainSchedule.for_batch(batch, stage).steps() for i in step):
            if isinstance(instruction, ForwardPass):
                assert instruction.buffer_id not in live
                live[instruction.buffer_id] = instruction.micro_batch
                most = max(most, len(live))
            elif isinstance(instruction, BackwardPass | BackwardWeight):
                assert live.pop(instruction.buffer_id) == instruction.micro_batch
        assert not live and most <= batch.most_in_flight(stage) <= batch.buffers(stage)
        assert most == batch.most_in_flight(stage) or not reached


def test_batches_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="at least one micro-batch"):
        BatchStrategy(())
    with pytest.raises(ValueError, match="differ in more than width"):
        BatchStrategy((Strategy(4, 2), Strategy(3, 2)))
