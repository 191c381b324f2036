"""Warm-up, stable, decay. That the engine uses it as the one process does: tests/single_process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ibp_deepspeed.errors import ConfigError
from ibp_deepspeed.optimizer.learning_rate import StepDecayLR, WarmupStableDecayLR, configured_schedule


def schedule(**changes: Any) -> WarmupStableDecayLR:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.5)
    values = {"total_num_steps": 8, "warmup_num_steps": 2, "warmup_max_lr": 0.4, "decay_share": 0.5} | changes
    return WarmupStableDecayLR(optimizer, **values)


def rates(of: WarmupStableDecayLR, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        of.step()
        found.append(of.optimizer.param_groups[0]["lr"])
    return found


def test_the_rate_rises_stays_and_falls_linearly() -> None:
    assert rates(schedule(), 10) == pytest.approx([0, 0.2, 0.4, 0.4, 0.4, 0.3, 0.2, 0.1, 0, 0])


def test_it_ends_at_a_ratio_and_takes_the_optimizers_rate() -> None:
    found = rates(schedule(decay_min_ratio=0.25, warmup_max_lr=None), 10)
    assert found[3] == 0.5 and found[8:] == pytest.approx([0.125, 0.125])


def test_a_resumed_schedule_goes_on() -> None:
    whole, first, second = schedule(), schedule(), schedule()
    expected = rates(whole, 10)
    rates(first, 6)
    second.load_state_dict(first.state_dict())
    assert rates(second, 4) == expected[6:]


@pytest.mark.parametrize(
    ("name", "value"), [("decay_share", 0.0), ("decay_share", 1.5), ("decay_min_ratio", -0.1), ("total_num_steps", 0)]
)
def test_values_that_make_no_schedule_are_named(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf'"scheduler.params.{name}" is {value}'):
        schedule(**{name: value})


def test_names_are_deepspeeds_and_ours() -> None:
    assert configured_schedule({}) is None
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.5)
    made = configured_schedule({"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.1}}})
    assert made is not None and type(made(optimizer)).__name__ == "WarmupLR"
    with pytest.raises(ConfigError, match="known are .*WarmupStableDecayLR"):
        configured_schedule({"scheduler": {"type": "Cosine"}})


def test_steps_are_those_of_torchs_milestones() -> None:
    """The paper's: a tenth after 91, 136 and 182 of 200 epochs, from the first batch on without a warm-up."""
    ours, theirs = (torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1) for _ in range(2))
    made = StepDecayLR(ours, 200, [0.455, 0.68, 0.91])
    want = torch.optim.lr_scheduler.MultiStepLR(theirs, [91, 136, 182], gamma=0.1)
    for _ in range(200):
        assert ours.param_groups[0]["lr"] == pytest.approx(theirs.param_groups[0]["lr"])
        theirs.step()
        made.step()
        want.step()
    with pytest.raises(ConfigError, match=r'"scheduler.params.milestones" is \[0.5, 0.5\]'):
        StepDecayLR(ours, 200, [0.5, 0.5])
