"""Under NCCL's rules the engine's posts have no cycle of waits; those of simpler layouts have."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from ibp_deepspeed import InterlockedTrainSchedule, InterlockingConfig, Strategy
from ibp_deepspeed.comm.link_groups import Kind, group_of, groups_of
from ibp_deepspeed.config.interlocking import Mode
from ibp_deepspeed.errors import ScheduleError
from ibp_deepspeed.schedule.posts import PostingRules, check_posts
from ibp_deepspeed.strategy.timeline import BatchStrategy, Timeline

MODES: tuple[Mode, ...] = ("furthest", "window")


def schedules(batch: BatchStrategy) -> list[InterlockedTrainSchedule]:
    return [InterlockedTrainSchedule.for_batch(batch, k) for k in range(batch.stages)]


def one(strategy: Strategy, micro_batches: int, rules: PostingRules | None = None, depth: int | None = None) -> None:
    """Two batches of one strategy."""
    check_posts([schedules(BatchStrategy.uniform(strategy, micro_batches))] * 2, depth, rules)


def stops(strategy: Strategy, micro_batches: int, rules: PostingRules) -> str:
    with pytest.raises(ScheduleError) as caught:
        one(strategy, micro_batches, rules)
    return str(caught.value)


@pytest.mark.parametrize("stages", range(1, 7))
def test_every_small_schedule_comes_to_its_end(stages: int) -> None:
    """K ≤ 6, M ≤ 5, every N, slack, mode, with and without borrowed layers, at the least channel depth; every host
    synchronises its device before each instruction."""
    axes = itertools.product(range(1, 6), range(1, stages + 1), range(3), MODES, (0, 1))
    for micro_batches, width, slack, mode, borrow in axes:
        strategy = Strategy(stages, width, mode, slack, borrow=borrow)
        one(strategy, micro_batches, depth=strategy.most_in_flight(0, micro_batches))
    one(Strategy(stages, stages, exits=(stages - 1,)), 5)


@pytest.mark.parametrize("stages", range(2, 7))
def test_chosen_exits_and_weight_gradients_apart_come_to_their_end(stages: int) -> None:
    """Modules of every size, the sum of all exits; weight gradients at their latest place, which holds up most."""
    for every, micro_batches, split, slack in itertools.product(range(1, stages + 1), (1, 2, 5), (False, True), (0, 1)):
        options: dict[str, Any] = {"split_backward": split, "exits": InterlockingConfig(exits=every).exits_for(stages)}
        depth = min(micro_batches, (every - 1) * (1 + slack) + 1)
        one(Strategy(stages, 1, "furthest", slack, **options), micro_batches, depth=depth)
        one(Strategy(stages, 2, "window", slack, **options), micro_batches)
        one(Strategy(stages, stages, "sum", slack, **options), micro_batches)


def test_every_change_of_width_comes_to_its_end() -> None:
    """Phases, periodic backpropagation and mixtures, every batch after every other."""
    blocks: list[dict[str, Any]] = [
        {"schedule": [{"from_step": t, "width": n} for t, n in enumerate((1, 4, 2, 3))]},
        {"strategy": "local", "global_interval": 2},
        {"strategy": "pairwise", "mode": "window", "global_interval": 3, "mixed": {"width": 3, "fraction": 0.3}},
    ]
    for block, slack, micro_batches in itertools.product(blocks, (0, 1), (1, 2, 5)):
        timeline = Timeline(InterlockingConfig.parse({**block, "hop_slack": slack}), 4, micro_batches)
        made = [schedules(each) for each in timeline.distinct()]
        for pair in itertools.product(made, repeat=2):
            check_posts(pair, timeline.channel_depth())


def whole(kind: Kind, boundary: int) -> Kind:
    """One group a direction, of all stages."""
    return kind


def test_one_group_a_direction_with_receives_posted_ahead_stops_at_three_stages() -> None:
    """The layout of before: a stage's send queues behind the receives that it posted, and two stages work."""
    rules = PostingRules(whole, announced=False, synchronise=False)
    assert "stage 1 waits for" in stops(Strategy(3, 2, "window"), 2, rules)
    one(Strategy(2, 2, "window"), 3, rules)


def test_groups_by_parity_with_receives_posted_ahead_do_until_a_device_is_synchronised() -> None:
    """The posted receive that spins is what a synchronisation waits for."""
    for stages, width in itertools.product((3, 4), (2, 3)):
        one(Strategy(stages, width, "window"), 3, PostingRules(announced=False, ahead=0, synchronise=False))
    said = stops(Strategy(3, 2, "window"), 3, PostingRules(announced=False, ahead=0, synchronise=True))
    assert "its device before" in said


def test_receives_that_are_posted_for_messages_that_never_come_stop_local_learning() -> None:
    """Gradients do not cross at N = 1: who posts a receive for one blocks in its first meeting. The engine's posts do
    not depend on what will come, only on what was announced."""
    strategy = Strategy(3, 1)

    class Receiving(InterlockedTrainSchedule):
        def steps(self) -> Any:
            from ibp_deepspeed.schedule.instructions import RecvGrad

            for commands in super().steps():
                extra = [RecvGrad(buffer_id=0, micro_batch=0, loss=1)] if self.stage_id == 0 else []
                yield [*commands, *extra]

    batch = BatchStrategy.uniform(strategy, 1)
    with pytest.raises(ScheduleError, match="stage 0 waits for stage 1 to meet it"):
        check_posts([[Receiving.for_batch(batch, k) for k in range(3)]], None, PostingRules(announced=False))


@pytest.mark.parametrize("stages", range(2, 9))
def test_a_rank_has_one_role_and_one_peer_on_a_communicator(stages: int) -> None:
    """What the layout is for; and everything that the engine makes is used."""
    for stage in range(stages):
        roles: dict[Any, set[tuple[str, int]]] = {}
        for kind, boundary in itertools.product(Kind, (stage - 1, stage)):
            if 0 <= boundary < stages - 1:
                down = kind is not Kind.GRADIENTS
                sends = (boundary == stage) == down
                peer = boundary if boundary != stage else stage + 1
                roles.setdefault(group_of(kind, boundary), set()).add(("sends" if sends else "receives", peer))
        assert all(len(role) == 1 for role in roles.values()), roles
        assert set(roles) <= set(groups_of(stages))
    used = {group_of(kind, boundary) for kind in Kind for boundary in range(stages - 1)}
    assert used == set(groups_of(stages)) and len(groups_of(stages)) == (3 if stages == 2 else 6)
