"""Where losses stand, by hand for three stages of three layers."""

from __future__ import annotations

import pytest

from ibp_deepspeed import InterlockingConfig
from ibp_deepspeed.errors import ConfigError
from ibp_deepspeed.strategy.head_placement import HeadPlacement

BOUNDS = [0, 3, 6, 9]


def test_heads_end_their_stages() -> None:
    placement = HeadPlacement(3)
    assert [placement.home(loss) for loss in range(3)] == [0, 1, 2]
    assert [placement.losses_at(k) for k in range(3)] == [[0], [1], [2]]
    assert [placement.head_at(k) for k in range(3)] == [0, 1, None]
    assert [placement.borrowed_from(k) for k in range(3)] == [0, 0, 0]
    assert placement.boundaries(BOUNDS) == {3: 0, 6: 1}


def test_heads_behind_borrowed_layers_live_on_the_next_stage() -> None:
    placement = HeadPlacement(3, borrow=2)
    assert [placement.home(loss) for loss in range(3)] == [1, 2, 2]
    assert [placement.losses_at(k) for k in range(3)] == [[], [0], [1, 2]]
    assert [placement.head_at(k) for k in range(3)] == [None, 0, 1]
    assert [placement.borrowed_from(k) for k in range(3)] == [0, 2, 2]
    assert placement.boundaries(BOUNDS) == {5: 1, 8: 2}


def test_without_heads_the_last_loss_alone_is_computed_and_every_stage_reports() -> None:
    placement = HeadPlacement.from_config(InterlockingConfig.parse({"aux_head": {"borrow": 1}}), 3, aux_heads=False)
    assert placement.exits == (2,)
    assert [placement.losses_at(k) for k in range(3)] == [[], [], [2]]
    assert [placement.reported_at(k) for k in range(3)] == [[0], [1], [2]]
    assert placement.boundaries(BOUNDS) == {}


def test_heads_stand_at_the_chosen_exits() -> None:
    for exits, found in {"every": (0, 1, 2, 3), 2: (1, 3), 3: (0, 3), (2, 0): (0, 2, 3)}.items():
        placement = HeadPlacement.from_config(InterlockingConfig.parse({"exits": exits}), 4)
        assert placement.losses == found and placement.heads == found[:-1]
        assert [k for k in range(4) if placement.losses_at(k)] == list(found)
        assert sorted(loss for k in range(4) for loss in placement.reported_at(k)) == [0, 1, 2, 3]
    borrowing = HeadPlacement(4, 1, (1, 3))
    assert [placement.losses_at(k) for placement in [borrowing] for k in range(4)] == [[], [], [1], [3]]
    assert [borrowing.reported_at(k) for k in range(4)] == [[0], [], [1, 2], [3]]
    assert [borrowing.borrowed_from(k) for k in range(4)] == [0, 0, 1, 0]
    assert borrowing.boundaries([0, 3, 6, 9, 12]) == {7: 2}


def test_exits_that_are_none() -> None:
    with pytest.raises(ConfigError, match="exits.* names stage 4, the 4 stages are 0 … 3"):
        InterlockingConfig.parse({"exits": [0, 4]}).exits_for(4)
    with pytest.raises(ValueError, match="must rise and end with the last of 3 stages"):
        HeadPlacement(3, exits=(0, 1))


@pytest.mark.parametrize("borrow", [0, 1])
def test_one_stage_has_the_models_loss_alone(borrow: int) -> None:
    placement = HeadPlacement(1, borrow)
    assert placement.losses_at(0) == [0] and placement.head_at(0) is None and placement.borrowed_from(0) == 0
