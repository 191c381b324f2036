"""Learning-rate schedules: DeepSpeed's by their names, and those that it lacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from deepspeed.runtime import lr_schedules

from ibp_deepspeed.errors import ConfigError


class WarmupStableDecayLR(lr_schedules.WarmupLR):
    """A warm-up, a constant rate, and a linear decay over the last part (Hu et al. 2024, arXiv:2404.06395, section 4).

    Args:
        optimizer: as DeepSpeed's schedules.
        total_num_steps: batches until the decay's end; the rate stays there afterwards.
        decay_share: part of ``total_num_steps`` that the decay takes, above 0, at most 1.
        decay_min_ratio: rate at its end over the constant one.
        warmup: ``warmup_min_lr``, ``warmup_max_lr`` (default: the optimizer's rate), ``warmup_num_steps``,
            ``warmup_type`` ("linear" here by default) and ``last_batch_iteration`` of DeepSpeed's WarmupLR.

    Raises:
        ConfigError: a share, a ratio or a number of steps that makes no such schedule.
    """

    def __init__(
        self,
        optimizer: Any,
        total_num_steps: int,
        decay_share: float = 0.25,
        decay_min_ratio: float = 0.0,
        **warmup: Any,
    ) -> None:
        if not 0 < decay_share <= 1:
            raise ConfigError(f'"scheduler.params.decay_share" is {decay_share}: give a part above 0 and at most 1.')
        if not 0 <= decay_min_ratio <= 1:
            raise ConfigError(f'"scheduler.params.decay_min_ratio" is {decay_min_ratio}: give 0 to 1.')
        if total_num_steps < 1:
            raise ConfigError(f'"scheduler.params.total_num_steps" is {total_num_steps}: give at least 1.')
        self.total_num_steps, self.decay_min_ratio = total_num_steps, decay_min_ratio
        self.decay_steps = max(1, round(decay_share * total_num_steps))
        super().__init__(optimizer, **{"warmup_type": lr_schedules.WARMUP_LINEAR_RATE, **warmup})

    def _get_gamma(self) -> float:
        """Overrides WarmupLR's: the rate over the constant one."""
        left = max(0, self.total_num_steps - self.last_batch_iteration) / self.decay_steps
        decayed = self.decay_min_ratio + (1 - self.decay_min_ratio) * min(1.0, left)
        return min(super()._get_gamma(), decayed)


class StepDecayLR(lr_schedules.WarmupLR):
    """A constant rate that falls at some points of a training, as residual networks are trained (He et al. 2016).

    Args:
        optimizer: as DeepSpeed's schedules; its rate is the first one.
        total_num_steps: batches of the whole training.
        milestones: parts of it, rising, after each of which the rate is multiplied by ``gamma``.
        gamma: above 0, at most 1.
        last_batch_iteration: of DeepSpeed's schedules.

    Raises:
        ConfigError: milestones, a factor or a number of steps that make no such schedule.
    """

    def __init__(
        self,
        optimizer: Any,
        total_num_steps: int,
        milestones: Sequence[float],
        gamma: float = 0.1,
        last_batch_iteration: int = -1,
    ) -> None:
        if not milestones or not all(0 < low < high for low, high in pairwise([*milestones, 1.0])):
            raise ConfigError(f'"scheduler.params.milestones" is {milestones}: give rising parts above 0 and below 1.')
        if not 0 < gamma <= 1:
            raise ConfigError(f'"scheduler.params.gamma" is {gamma}: give a factor above 0 and at most 1.')
        if total_num_steps < 1:
            raise ConfigError(f'"scheduler.params.total_num_steps" is {total_num_steps}: give at least 1.')
        self.gamma, self.steps = gamma, [round(part * total_num_steps) for part in milestones]
        super().__init__(optimizer, last_batch_iteration=last_batch_iteration)

    def get_lr(self) -> list[float]:
        """Overrides WarmupLR's: the rates of the next batch, also of the first."""
        passed = sum(self.last_batch_iteration + 1 >= step for step in self.steps)
        return [rate * self.gamma**passed for rate in self.max_lrs]


_OURS = {each.__name__: each for each in (WarmupStableDecayLR, StepDecayLR)}


def configured_schedule(ds_config: Mapping[str, Any]) -> Callable[[Any], Any] | None:
    """Maker of the schedule, from an optimizer, that a DeepSpeed configuration asks for; None if for none.

    Raises:
        ConfigError: the type is unknown.
    """
    block = ds_config.get("scheduler") or {}
    if not block:
        return None
    name = str(block.get("type"))
    if name not in (*_OURS, *lr_schedules.VALID_LR_SCHEDULES):
        known = ", ".join([*lr_schedules.VALID_LR_SCHEDULES, *_OURS])
        raise ConfigError(f'"scheduler.type" is {name!r}, known are {known}.')
    return partial(_OURS.get(name) or getattr(lr_schedules, name), **block.get("params", {}))


def check_schedule(ds_config: Mapping[str, Any]) -> None:
    """Refuse a schedule that can't be made, before there is an optimizer.

    Raises:
        ConfigError: its type or a parameter is unknown, or a value is wrong.
    """
    schedule = configured_schedule(ds_config)
    if schedule is None:
        return
    try:
        schedule(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.0))
    except (TypeError, ValueError) as error:
        raise ConfigError(f'"scheduler" of type {ds_config["scheduler"]["type"]}: {error}.') from error


def is_ours(ds_config: Mapping[str, Any]) -> bool:
    """Whether DeepSpeed would not find the schedule of a configuration by its name."""
    return (ds_config.get("scheduler") or {}).get("type") in _OURS
