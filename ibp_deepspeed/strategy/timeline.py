"""Strategies over time: which strategy each micro-batch of each batch is trained with."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from ibp_deepspeed.config.interlocking import InterlockingConfig, Mode
from ibp_deepspeed.errors import ConfigError
from ibp_deepspeed.strategy.head_placement import borrowed_layers
from ibp_deepspeed.strategy.strategy import Strategy


@dataclass(frozen=True)
class BatchStrategy:
    """The strategies of one batch.

    Attributes:
        strategies: one for each micro-batch; they differ in width, mode and weights only, exits are the same.
    """

    strategies: tuple[Strategy, ...]

    def __post_init__(self) -> None:
        if not self.strategies:
            raise ValueError("a batch needs at least one micro-batch")
        if len({(s.stages, s.hop_slack, s.placement, s.split_backward, s.frozen) for s in self.strategies}) > 1:
            raise ValueError(f"the micro-batches of a batch differ in more than width, mode and weights: {self}")

    @classmethod
    def uniform(cls, strategy: Strategy, micro_batches: int) -> BatchStrategy:
        """All micro-batches with one strategy."""
        return cls((strategy,) * micro_batches)

    def __len__(self) -> int:
        """M."""
        return len(self.strategies)

    def __getitem__(self, micro_batch: int) -> Strategy:
        return self.strategies[micro_batch]

    @property
    def stages(self) -> int:
        """K."""
        return self.strategies[0].stages

    @property
    def hop_slots(self) -> int:
        """Slots between a gradient's use on one stage and on the stage before it."""
        return self.strategies[0].hop_slots

    def distance(self, stage: int) -> int:
        """The most boundaries that an update gradient of trunk ``stage`` crosses."""
        return self._widest.distance(stage)

    def most_in_flight(self, stage: int) -> int:
        """The most micro-batches whose activations ``stage`` holds at once."""
        if any(s.splits(stage) for s in self._distinct):
            return self.buffers(stage)
        hops = {s: s.distance(stage) * s.hop_slots for s in self._distinct}
        last_slots = [m + hops[s] for m, s in enumerate(self.strategies)]
        return max(sum(last >= slot for last in last_slots[: slot + 1]) for slot in range(len(self)))

    def buffers(self, stage: int) -> int:
        """Places for micro-batches that are told apart by their number modulo this."""
        return min(len(self), max(s.slots_in_flight(stage) for s in self._distinct))

    @cached_property
    def _distinct(self) -> list[Strategy]:
        return list(dict.fromkeys(self.strategies))

    @cached_property
    def _widest(self) -> Strategy:
        return max(self._distinct, key=lambda strategy: strategy.width)

    def channel_depth(self, requested: int | None = None) -> int:
        """Micro-batches that a stage may run ahead of what the next stage has received (default 2M).

        Raises:
            ConfigError: the requested depth is below what the schedule of one of the strategies keeps in flight.
        """
        return max(strategy.channel_depth(len(self), requested) for strategy in self._distinct)


class Timeline:
    """The strategies of a training, batch by batch.

    Args:
        interlocking: with its ``schedule``, ``mixed`` and ``global_interval``.
        stages: K.
        micro_batches: M.
        aux_heads: whether there are auxiliary heads.
        frozen: the stages whose trunk has nothing to train.

    Raises:
        ConfigError: a mixed width that is not above one it is mixed into; an exit that there is not, mode sum at
            another width than K, or weights for another number of exits; no heads for a strategy that needs them.
    """

    def __init__(
        self,
        interlocking: InterlockingConfig,
        stages: int,
        micro_batches: int,
        aux_heads: bool = True,
        frozen: Iterable[int] = (),
    ) -> None:
        self._interlocking, self._stages, self._count, self._aux_heads = interlocking, stages, micro_batches, aux_heads
        self._frozen = tuple(frozen)
        given = interlocking
        phases = [
            (p.from_step, self._strategy(p.width, p.mode, exit_weights=p.exit_weights or given.exit_weights))
            for p in given.schedule
        ]
        if not phases or phases[0][0] > 0:
            weights = {"window_weights": given.window_weights, "exit_weights": given.exit_weights}
            phases.insert(0, (0, self._strategy(given.width_for(stages), given.mode, **weights)))
        self._phases = [(start, self._mixed(strategy)) for start, strategy in phases]
        self._global = BatchStrategy.uniform(self._strategy(stages, "furthest"), micro_batches)

    @property
    def period(self) -> int:
        """Batches after which the strategies repeat themselves, but for the changes of ``schedule``."""
        return self._interlocking.global_interval or 1

    def at(self, batch: int) -> BatchStrategy:
        """The strategies of batch ``batch``, counted from 0."""
        interval = self._interlocking.global_interval
        if interval and (batch + 1) % interval == 0:
            return self._global
        return next(phase for start, phase in reversed(self._phases) if start <= batch)

    def distinct(self) -> list[BatchStrategy]:
        """All batches that can occur, in the order of their first use."""
        found = [phase for _, phase in self._phases]
        if self._interlocking.global_interval:
            found.append(self._global)
        return list(dict.fromkeys(found))

    def strategies(self) -> list[Strategy]:
        """All strategies that a micro-batch can have."""
        return list(dict.fromkeys(s for each in self.distinct() for s in each.strategies))

    def channel_depth(self) -> int:
        """Micro-batches that a stage may run ahead of what the next stage has received (default 2M).

        Raises:
            ConfigError: the configured depth is below what a schedule keeps in flight.
        """
        return max(each.channel_depth(self._interlocking.channel_depth) for each in self.distinct())

    def _mixed(self, strategy: Strategy) -> BatchStrategy:
        mixed = self._interlocking.mixed
        if mixed is None or strategy.width >= len(strategy.placement.losses):  # nothing is wider
            return BatchStrategy.uniform(strategy, self._count)
        if mixed.width <= strategy.width:
            raise ConfigError(
                f'"interlocking.mixed.width" is {mixed.width}, which is not above the width {strategy.width} that it '
                "is mixed into."
            )
        wide = math.ceil(mixed.fraction * self._count - 1e-9)  # 0.3 · 10 is a little above 3
        wider = self._strategy(mixed.width, mixed.mode)
        return BatchStrategy((wider,) * wide + (strategy,) * (self._count - wide))

    def _strategy(
        self,
        width: int,
        mode: Mode | None,
        *,
        window_weights: tuple[float, ...] | None = None,
        exit_weights: tuple[float, ...] | None = None,
    ) -> Strategy:
        given, stages = self._interlocking, self._stages
        mode, exits = mode or given.mode, given.exits_for(stages)
        if mode == "sum" and width < stages:
            raise ConfigError(
                f'"interlocking": mode "sum" is for width {stages} or more on {stages} stages, not {width}.'
            )
        weights = exit_weights if mode == "sum" else None
        if weights is not None and len(weights) != len(exits):
            raise ConfigError(
                f'"interlocking.exit_weights" has {len(weights)} values for the {len(exits)} exits on {stages} stages.'
            )
        strategy = Strategy(
            stages,
            min(width, stages),
            mode,
            given.hop_slack,
            window_weights,
            borrowed_layers(given),
            exits,
            weights,
            given.splits_backward,
            self._frozen,
        )
        if self._aux_heads:
            return strategy
        if not strategy.is_backpropagation:
            raise ConfigError(
                f"width {width} of {stages} stages in mode {mode} needs a head for every exit: give aux_head, or use "
                'strategy "global" in mode "furthest" throughout.'
            )
        return replace(strategy, exits=(stages - 1,), borrow=0)
