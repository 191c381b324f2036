"""The schedule of every width fits together, and the validator notices when one does not."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ibp_deepspeed import InterlockedTrainSchedule, InterlockingConfig, Strategy
from ibp_deepspeed.config.interlocking import Mode
from ibp_deepspeed.config.objectives import OBJECTIVES
from ibp_deepspeed.errors import ScheduleError
from ibp_deepspeed.schedule.instructions import (
    AuxLoss,
    BackwardBorrowed,
    BackwardInput,
    BackwardPass,
    BackwardWeight,
    ForwardPass,
    LoadMicroBatch,
    OptimizerStep,
    PipeInstruction,
    RecvActivation,
    RecvGrad,
    ReduceGrads,
    Release,
    SendActivation,
    SendGrad,
    UpdateInput,
)
from ibp_deepspeed.schedule.predict import predict, predict_timeline
from ibp_deepspeed.schedule.simulator import Costs, Simulator
from ibp_deepspeed.schedule.validate import validate, validated_schedules, validated_timeline
from ibp_deepspeed.strategy.timeline import BatchStrategy, Timeline

MODES: tuple[Mode, ...] = ("furthest", "window")


@pytest.mark.parametrize("stages", range(1, 9))
def test_every_small_schedule_is_valid(stages: int) -> None:
    """K, M ≤ 8, N ≤ K, slack ≤ 2, both modes, with and without borrowed layers, at the least channel depth (a larger
    one only waits less)."""
    axes = itertools.product(range(1, 9), range(1, stages + 1), range(3), MODES, (False, True))
    for micro_batches, width, slack, mode, borrow in axes:
        strategy = Strategy(stages, width, mode, slack, borrow=borrow)
        least = strategy.most_in_flight(0, micro_batches)
        validated_schedules(BatchStrategy.uniform(strategy, micro_batches), least)


@pytest.mark.parametrize("stages", range(1, 7))
def test_every_small_schedule_with_chosen_exits_is_valid(stages: int) -> None:
    """K ≤ 6, M ≤ 5, every set of exits, N ≤ 2 and all, slack ≤ 1, all modes, B and W at once and apart."""
    others = itertools.chain.from_iterable(itertools.combinations(range(stages - 1), n) for n in range(stages))
    for chosen, micro_batches, split in itertools.product(others, (1, 2, 5), (False, True)):
        options: dict[str, Any] = {"exits": (*chosen, stages - 1), "split_backward": split}
        strategies = [Strategy(stages, stages, "sum", **options)]
        widths = sorted({1, min(2, stages), stages})
        for width, mode, slack in itertools.product(widths, MODES, (0, 1)):
            strategies.append(Strategy(stages, width, mode, slack, **options))
        for strategy in dict.fromkeys(strategies):
            least = max(strategy.distance(k) for k in range(stages)) * strategy.hop_slots + 1
            validated_schedules(BatchStrategy.uniform(strategy, micro_batches), min(least, micro_batches))


@pytest.mark.parametrize("stages", range(1, 6))
def test_every_small_schedule_with_frozen_stages_is_valid(stages: int) -> None:
    """K ≤ 5, M ≤ 3, N ≤ K, every set of stages with nothing to train, all modes, borrowed layers, B and W at once and
    apart, at the least channel depth; below the lowest trained stage nothing but forward passes and heads."""
    sets = itertools.chain.from_iterable(itertools.combinations(range(stages), n) for n in range(1, stages + 1))
    below = {ForwardPass, AuxLoss, Release, LoadMicroBatch, RecvActivation, SendActivation}
    for frozen, count, split in itertools.product(sets, (1, 2, 3), (False, True)):
        options: dict[str, Any] = {"frozen": frozen, "split_backward": split}
        strategies = [Strategy(stages, stages, "sum", **options)]
        for width, mode, borrow in itertools.product(range(1, stages + 1), MODES, (0, 1)):
            strategies.append(Strategy(stages, width, mode, borrow=borrow, **options))
        lowest = min(set(range(stages)) - set(frozen), default=stages)
        for strategy in strategies:
            least = max(strategy.distance(k) for k in range(stages)) * strategy.hop_slots + 1
            batch = BatchStrategy.uniform(strategy, count)
            schedules = validated_schedules(batch, min(least, count))
            for k, schedule in enumerate(schedules):
                kinds = {type(i) for i in schedule.program} - {ReduceGrads, OptimizerStep}
                assert k >= lowest or kinds <= below, "no backward pass and no gradients where nothing is trained"
                assert k > lowest or SendGrad not in kinds, "nobody before it would use one"
                assert k not in frozen or not kinds & {BackwardPass, UpdateInput, BackwardWeight}
                assert strategy.most_in_flight(k, count) == 1 or k >= lowest


def test_frozen_stages_take_their_forward_pass() -> None:
    """Backpropagation on 4 stages, half of them frozen: F and a head are left of the first two, which hold nothing."""
    plain, half = (predict(Strategy(4, 4, frozen=frozen), 4) for frozen in ((), (0, 1)))
    assert plain.micro_batch_time == pytest.approx(3.8, abs=0.01)
    assert half.micro_batch_time == pytest.approx(3.3, abs=0.01)
    assert half.idle[:2] == pytest.approx([1 - 1.1 / half.micro_batch_time] * 2, abs=0.01)
    assert half.in_flight[:2] == [1, 1] and plain.in_flight[0] == 4


def mixtures(stages: int, micro_batches: int) -> Iterator[BatchStrategy]:
    """Every wider width before every narrower one, slack ≤ 1, all pairs of modes, with and without borrowed layers."""
    widths = itertools.combinations(range(1, stages + 1), 2)
    for (narrow, wide), count, slack, modes, borrow in itertools.product(
        widths, range(1, micro_batches), range(2), itertools.product(MODES, MODES), (False, True)
    ):
        first = Strategy(stages, wide, modes[0], slack, borrow=borrow)
        then = Strategy(stages, narrow, modes[1], slack, borrow=borrow)
        yield BatchStrategy((first,) * count + (then,) * (micro_batches - count))


@pytest.mark.parametrize("stages", range(2, 6))
def test_every_small_mixture_is_valid(stages: int) -> None:
    """K, M ≤ 5, at the least channel depth."""
    for batch in itertools.chain.from_iterable(mixtures(stages, count) for count in range(2, 6)):
        validated_schedules(batch, batch[0].most_in_flight(0, len(batch)))


@given(
    data=st.data(),
    stages=st.integers(2, 5),
    micro_batches=st.integers(1, 4),
    slack=st.integers(0, 2),
    borrow=st.booleans(),
    split=st.booleans(),
    every=st.integers(1, 5),
)
@settings(deadline=None, max_examples=80)
def test_any_batches_follow_each_other(
    data: st.DataObject, stages: int, micro_batches: int, slack: int, borrow: bool, split: bool, every: int
) -> None:
    """Whatever the strategy of each micro-batch, in any order, at the least channel depth."""
    exits = InterlockingConfig(exits=every).exits_for(stages)
    options = {"hop_slack": slack, "borrow": borrow, "exits": exits, "split_backward": split}
    alike = {name: st.just(value) for name, value in options.items()}
    strategies = st.builds(Strategy, st.just(stages), st.integers(1, stages), st.sampled_from(MODES), **alike)
    rows = st.lists(strategies, min_size=micro_batches, max_size=micro_batches)
    batches = [BatchStrategy(tuple(row)) for row in data.draw(st.lists(rows, min_size=1, max_size=6))]
    every_strategy = [s for batch in batches for s in batch.strategies]
    depth = max(min(micro_batches, s.distance(k) * s.hop_slots + 1) for s in every_strategy for k in range(stages))
    Simulator([validated_schedules(batch, depth) for batch in batches], channel_depth=depth).run()


@pytest.mark.parametrize("micro_batches", [1, 2, 5])
@pytest.mark.parametrize("slack", [0, 1])
def test_timelines_are_valid_at_the_least_channel_depth(micro_batches: int, slack: int) -> None:
    """Phases up and down, periodic backpropagation, mixtures, all at once: every batch after every other."""
    blocks: list[dict[str, Any]] = [
        {"schedule": [{"from_step": t, "width": n} for t, n in enumerate((1, 4, 2, 3))]},
        {"strategy": "local", "global_interval": 2},
        {"strategy": "pairwise", "mode": "window", "global_interval": 3, "mixed": {"width": 3, "fraction": 0.3}},
        {
            "schedule": [{"from_step": 0, "width": 1}, {"from_step": 5, "width": 2, "mode": "window"}],
            "mixed": {"width": 4, "fraction": 0.5, "mode": "window"},
            "global_interval": 4,
        },
    ]
    for block in blocks:
        deep = Timeline(InterlockingConfig.parse({**block, "hop_slack": slack}), 4, micro_batches)
        least = max(s.most_in_flight(0, micro_batches) for s in deep.strategies())
        shallow = InterlockingConfig.parse({**block, "hop_slack": slack, "channel_depth": least})
        timeline = Timeline(shallow, 4, micro_batches)
        assert list(validated_timeline(timeline)) == timeline.distinct() and timeline.channel_depth() == least


def test_one_stage_of_a_valid_set_is_the_public_schedule() -> None:
    checked = validated_schedules(BatchStrategy.uniform(Strategy(4, 2, "window", 1), 3))[1]
    public = InterlockedTrainSchedule(3, 4, 1, 2, hop_slack=1, mode="window")
    assert [repr(step) for step in checked] == [repr(step) for step in public]


class Edited(InterlockedTrainSchedule):
    """A schedule with a mistake made in one stage's list of instructions."""

    edit: Callable[[list[PipeInstruction]], list[PipeInstruction]]

    def steps(self) -> Iterator[list[PipeInstruction]]:
        yield self.edit([instruction for step in super().steps() for instruction in step])


def drop(kind: type, count: int = 1) -> Callable[[list[PipeInstruction]], list[PipeInstruction]]:
    def edit(program: list[PipeInstruction]) -> list[PipeInstruction]:
        victims = [i for i in program if isinstance(i, kind)][:count]
        return [i for i in program if i not in victims]

    return edit


def swap(kind: type) -> Callable[[list[PipeInstruction]], list[PipeInstruction]]:
    """Exchange the first two instructions of a kind."""

    def edit(program: list[PipeInstruction]) -> list[PipeInstruction]:
        first, second = [n for n, i in enumerate(program) if isinstance(i, kind)][:2]
        program[first], program[second] = program[second], program[first]
        return program

    return edit


def repeat(kind: type) -> Callable[[list[PipeInstruction]], list[PipeInstruction]]:
    def edit(program: list[PipeInstruction]) -> list[PipeInstruction]:
        at = next(n for n, i in enumerate(program) if isinstance(i, kind))
        return [*program[: at + 1], program[at], *program[at + 1 :]]

    return edit


def forwards_first(program: list[PipeInstruction]) -> list[PipeInstruction]:
    """GPipe's order: needs no more messages, but holds every micro-batch."""
    late = (RecvGrad, BackwardPass)
    head = [i for i in program if not isinstance(i, (*late, OptimizerStep)) and type(i).__name__ != "ReduceGrads"]
    return head + [i for i in program if i not in head]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop(SendGrad), "the channel holds|deadlock"),
        (drop(BackwardPass), "in use|reduces after|not there|in flight"),
        (repeat(BackwardPass), "not there"),
        (swap(SendGrad), "not there|the channel holds"),
        (drop(OptimizerStep), "the optimizer steps 0 times"),
        (repeat(OptimizerStep), "after the optimizer step"),
        (drop(BackwardInput), "uses the input gradient of loss 2 of micro-batch 0, which is not there"),
        (drop(RecvGrad), "not there|the channel holds|nobody receives"),
        (forwards_first, "in use|in flight|not there"),
    ],
)
@pytest.mark.parametrize("micro_batches", [4, 6])
def test_the_validator_finds_a_mistake_and_shows_it(
    edit: Callable[..., list[PipeInstruction]], message: str, micro_batches: int
) -> None:
    """In a batch of four at N = 2, alone and after two at N = K."""
    uniform = BatchStrategy.uniform(Strategy(4, 2, "window"), 4)
    wide = (Strategy(4, 4, "window"),) * (micro_batches - 4)
    batch = BatchStrategy(wide + uniform.strategies)
    schedules = [InterlockedTrainSchedule.for_batch(batch, k) for k in range(4)]
    wrong = Edited.for_batch(batch, 2)
    wrong.edit = edit
    schedules[2] = wrong
    with pytest.raises(ScheduleError, match=message) as caught:
        validate(schedules, batch, batch.channel_depth())
    lines = str(caught.value).splitlines()
    rows = [line for line in lines if line.startswith("stage ") and " | " in line]
    assert len(rows) == 4, "the grid has a row a stage"
    assert sum(row.count(">>") for row in rows) == 1, "exactly one step is marked"


def test_the_validator_knows_who_has_something_to_train() -> None:
    """A trained stage that only passes gradients on, and a frozen one that computes weight gradients."""
    plain, frozen = (BatchStrategy.uniform(Strategy(4, 4, frozen=f, split_backward=False), 4) for f in ((), (2,)))
    for right, wrong, message in (
        (plain, frozen, "ends a micro-batch without the trunk's gradient"),
        (frozen, plain, "a gradient for a trunk with nothing to train"),
    ):
        schedules = [InterlockedTrainSchedule.for_batch(wrong if k == 2 else right, k) for k in range(4)]
        with pytest.raises(ScheduleError, match=message):
            validate(schedules, right, right.channel_depth())


@pytest.mark.parametrize(
    ("kind", "message"),
    [(AuxLoss, "uses the borrowed gradient of loss 1 of"), (BackwardBorrowed, "uses the input gradient of loss 1 of")],
)
def test_the_validator_finds_a_mistake_with_borrowed_layers(kind: type, message: str) -> None:
    batch = BatchStrategy.uniform(Strategy(4, 1, "window", borrow=1), 4)
    schedules = [InterlockedTrainSchedule.for_batch(batch, k) for k in range(4)]
    wrong = Edited.for_batch(batch, 2)
    wrong.edit = drop(kind)
    schedules[2] = wrong
    with pytest.raises(ScheduleError, match=message):
        validate(schedules, batch, batch.channel_depth())


@pytest.mark.parametrize("stage", range(3))
def test_the_validator_finds_a_stage_with_another_mixture(stage: int) -> None:
    """One stage has the wide micro-batch elsewhere, or another number of them, or all alike."""
    wide, narrow = Strategy(4, 2, "window"), Strategy(4, 1)
    right = BatchStrategy((wide, narrow, narrow, narrow))
    for wrong in ((narrow, narrow, narrow, wide), (wide, wide, narrow, narrow), (wide,) * 4, (narrow,) * 4):
        schedules = [InterlockedTrainSchedule.for_batch(right, k) for k in range(4)]
        schedules[stage] = InterlockedTrainSchedule.for_batch(BatchStrategy(wrong), stage)
        with pytest.raises(ScheduleError):
            validate(schedules, right, right.channel_depth())


def test_a_channel_too_shallow_deadlocks_in_the_simulation() -> None:
    """Depth 0 lets nobody start: the simulation says who waits instead of hanging."""
    schedules = [InterlockedTrainSchedule(2, 3, k, 2) for k in range(3)]
    with pytest.raises(ScheduleError, match="deadlock"):
        Simulator([schedules], channel_depth=0).run()


@pytest.mark.parametrize(
    ("stages", "micro_batches", "width", "expected"),
    [(4, 1, 1, 3.1), (4, 1, 2, 6.0), (4, 1, 3, 9.0), (4, 4, 1, 3.1), (4, 4, 2, 4.1), (8, 4, 1, 3.1), (8, 4, 2, 4.1)],
)
@pytest.mark.parametrize("mode", MODES)
def test_simulated_times_of_narrow_widths(
    stages: int, micro_batches: int, width: int, expected: float, mode: Mode
) -> None:
    """The table of docs/how-it-works.md; with one micro-batch and N = 3 the modes differ in the last stages."""
    if (micro_batches, width, mode) == (1, 3, "window"):
        expected = 8.0  # the second input gradient of stage K-2 goes up before its update
    fused = Strategy(stages, width, mode, split_backward=False)
    assert predict(fused, micro_batches).micro_batch_time == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(
    ("stages", "micro_batches", "every", "fused", "split"),
    [
        (8, 1, 2, 6.1, 5.1),
        (8, 4, 2, 3.85, 3.35),
        (8, 16, 2, 3.29, 3.16),
        (8, 4, 4, 5.35, 3.85),
        (8, 16, 4, 3.66, 3.29),
        (8, 4, 8, 8.25, 5.75),
        (4, 1, 4, 12.0, 9.0),
        (4, 16, 4, 3.56, 3.19),
    ],
)
def test_simulated_times_of_modules(stages: int, micro_batches: int, every: int, fused: float, split: float) -> None:
    """Local learning over modules of so many stages (all: backpropagation), with B and W at once and apart."""
    exits = InterlockingConfig(exits=every).exits_for(stages)
    for splits, expected in ((False, fused), (True, split)):
        said = predict(Strategy(stages, 1, exits=exits, split_backward=splits), micro_batches)
        assert said.micro_batch_time == pytest.approx(expected, abs=0.01)
        assert max(said.in_flight) == min(micro_batches, every), "as many micro-batches as a module has stages"


def test_exits_make_local_learning_of_fewer_stages() -> None:
    """G stages a module at N = 1: every trunk is trained by the next exit, and no gradient leaves its module."""
    strategy = Strategy(8, 1, exits=(3, 7))
    assert [strategy.reach(k) for k in range(8)] == [3] * 4 + [7] * 4
    assert [strategy.sends_gradients(k) for k in range(8)] == [False, True, True, True] * 2
    wider = Strategy(8, 2, "window", exits=(0, 3, 7), window_weights=(1.0, 0.5))
    assert [wider.weights(k) for k in (0, 1, 4)] == [{0: 1.0, 3: 0.5}, {3: 1.0, 7: 0.5}, {7: 1.5}]
    assert Strategy(8, 1, exits=(7,)).is_backpropagation and not strategy.is_backpropagation


def test_the_sum_of_all_exits_travels_as_one_gradient() -> None:
    strategy = Strategy(4, 4, "sum", exits=(1, 3), exit_weights=(0.25, 1.0))
    assert [strategy.weights(k) for k in range(4)] == [{1: 0.25, 3: 1.0}] * 2 + [{3: 1.0}] * 2
    assert [strategy.terms(k) for k in range(4)] == [{3: 1.0}, {1: 0.25, 3: 1.0}, {3: 1.0}, {3: 1.0}]
    assert [[loss for loss in (1, 3) if strategy.crosses(loss, k)] for k in range(4)] == [[], [3], [3], [3]]
    for split, peer in ((False, 8.25), (True, 5.75)):  # backpropagation's times, but for the heads
        summed = predict(Strategy(8, 8, "sum", split_backward=split), 4)
        assert summed.micro_batch_time == pytest.approx(peer, abs=0.3)
    with pytest.raises(ValueError, match="mode sum is for width >= stages"):
        Strategy(4, 2, "sum")


def test_simulated_times_of_wide_and_slow_pipelines() -> None:
    assert predict(Strategy(8, 3), 4).micro_batch_time == pytest.approx(5.1, abs=0.01)
    backpropagation = Strategy(8, 8, exits=(7,), split_backward=False)
    assert predict(backpropagation, 4).micro_batch_time == pytest.approx(8.25, abs=0.01)  # (M + K - 1) · 3 / M
    slow = Costs(latency=2.0)
    for split, expected in ((False, 4.34), (True, 4.21)):
        slackened = Strategy(8, 2, hop_slack=1, split_backward=split)
        assert predict(slackened, 16, slow).micro_batch_time == pytest.approx(expected, abs=0.02)
    assert predict(backpropagation, 16, slow).micro_batch_time == pytest.approx(9.25, abs=0.1)


def test_depth_costs_nothing_at_narrow_widths() -> None:
    """K = 64, M = 8: local and pairwise stay at their work, 1F1B does not."""
    assert predict(Strategy(64, 1), 8, batches=16).micro_batch_time == pytest.approx(3.1, abs=0.01)
    assert predict(Strategy(64, 2), 8, batches=16).micro_batch_time == pytest.approx(4.1, abs=0.01)
    one_f_one_b = Strategy(64, 64, exits=(63,), split_backward=False)
    assert predict(one_f_one_b, 8, batches=4).micro_batch_time > 26


def test_idle_share_and_micro_batches_in_flight() -> None:
    prediction = predict(Strategy(8, 2), 4)
    assert max(prediction.idle[1:-1]) < 1e-6 and prediction.limit == pytest.approx(4.1)
    assert prediction.in_flight == [2] * 8
    assert predict(Strategy(8, 8, split_backward=False), 16).in_flight == [8, 7, 6, 5, 4, 3, 2, 1]
    assert max(predict(Strategy(8, 8), 16).in_flight) == 8, "stages that put weight gradients off hold as many at most"
    blocked = predict(Strategy(4, 1), 4, streaming=False)
    assert blocked.micro_batch_time > predict(Strategy(4, 1), 4).micro_batch_time


def timeline(stages: int, micro_batches: int, **options: Any) -> Timeline:
    return Timeline(InterlockingConfig(**options), stages, micro_batches)


def test_a_timeline_without_change_costs_what_its_strategy_does() -> None:
    for costs in (None, Costs(latency=1.0)):
        steady = predict(Strategy(8, 2), 4, costs)
        assert predict_timeline(timeline(8, 4), costs).batch_time == pytest.approx(steady.batch_time, abs=0.01)


def test_simulated_time_of_periodic_backpropagation() -> None:
    """A batch of backpropagation costs its whole fill and drain; its neighbours don't pay beyond that."""
    local, whole = predict(Strategy(8, 1), 4).batch_time, predict(Strategy(8, 8), 4).batch_time
    for interval in (2, 5):
        periodic = predict_timeline(timeline(8, 4, strategy="local", global_interval=interval), batches=7)
        assert periodic.batch_time == pytest.approx(local + (whole - local) / interval, abs=0.01)


def test_simulated_time_of_a_change_of_width() -> None:
    """Six batches at N = 1 and two at N = 2, whatever came before."""
    changing = timeline(8, 4, strategy="local", schedule=[{"from_step": 6, "width": 2}])
    assert predict_timeline(changing, batches=8).micro_batch_time == pytest.approx((6 * 3.1 + 2 * 4.1) / 8, abs=0.05)


def test_wide_micro_batches_come_first_because_their_gradients_travel_meanwhile() -> None:
    """The numbers of docs/how-it-works.md: a quarter of the micro-batches at N = 2 and at N = K."""
    for micro_batches, width, first, last in ((4, 2, 3.35, 3.60), (8, 8, 3.35, 4.70)):
        mixed = timeline(8, micro_batches, strategy="local", mixed={"width": width, "fraction": 0.25})
        assert predict_timeline(mixed).micro_batch_time == pytest.approx(first, abs=0.01)
        late = BatchStrategy(tuple(reversed(mixed.at(0).strategies)))
        walk = Simulator([validated_schedules(late)] * 40, channel_depth=late.channel_depth())
        ends = [e.end for e in walk.run() if e.stage == 0 and isinstance(e.instruction, OptimizerStep)]
        assert (ends[-1] - ends[19]) / 20 / micro_batches == pytest.approx(last, abs=0.01)


@given(
    stages=st.integers(1, 12),
    width=st.integers(1, 14),
    mode=st.sampled_from(MODES),
    weights=st.lists(st.floats(0.1, 2.0), min_size=14, max_size=14),
)
@settings(deadline=None, max_examples=60)
def test_strategy_tables_agree_with_their_definition(stages: int, width: int, mode: Mode, weights: list[float]) -> None:
    given_weights = tuple(weights[:width]) if mode == "window" else None
    strategy = Strategy(stages, width, mode, window_weights=given_weights)
    for k in range(stages):
        reach = min(k + width - 1, stages - 1)
        assert strategy.reach(k) == reach
        table = strategy.weights(k)
        assert list(table) == ([reach] if mode == "furthest" else list(range(k, reach + 1)))
        total = sum(given_weights) if given_weights else 1.0
        assert sum(table.values()) == pytest.approx(total)
        for loss in range(stages):
            assert (k in strategy.users(loss)) == (loss in table)
            crosses = loss >= k and any(loss in strategy.weights(i) for i in range(k))
            assert strategy.crosses(loss, k) == crosses
    assert not Strategy(stages, 1).sends_gradients(stages - 1), "local learning sends no gradient at all"


def test_forward_comes_first_in_its_slot() -> None:
    """1F1B's order at N = K: the forward pass of a slot, then the gradient that arrives in it."""
    program = [i for step in InterlockedTrainSchedule(6, 3, 0, 3).steps() for i in step]
    order = [(type(i), i.micro_batch) for i in program if isinstance(i, ForwardPass | BackwardPass)]
    assert order[:6] == [(ForwardPass, 0), (ForwardPass, 1), (ForwardPass, 2), (BackwardPass, 0)] + [
        (ForwardPass, 3),
        (BackwardPass, 1),
    ]


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_an_objective_adds_no_instruction(name: str) -> None:
    def steps(objective: str) -> list[list[str]]:
        block = {"strategy": "pairwise", "mode": "window", "aux_head": {"objective": objective}}
        timeline = Timeline(InterlockingConfig.parse(block), 4, 3, True)
        (stages,) = validated_timeline(timeline).values()
        return [[repr(step) for step in stage.steps()] for stage in stages]

    assert steps(name) == steps("cross_entropy")
