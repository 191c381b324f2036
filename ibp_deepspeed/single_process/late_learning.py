"""The late targets of all exits in one process: the rule of :mod:`ibp_deepspeed.objectives.late_targets`, nothing
more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from ibp_deepspeed.objectives.head import Objective
from ibp_deepspeed.objectives.late_targets import LateMemory, LateWay, late_ways
from ibp_deepspeed.strategy.head_placement import HeadPlacement


class LateLearning:
    """What exits keep, and their losses of it.

    Args:
        objectives: of all losses.
        placement: of their heads.

    Raises:
        InterlockingError: late targets that can't be had.
    """

    def __init__(self, objectives: Mapping[int, Objective], placement: HeadPlacement) -> None:
        self._objectives, self._placement = objectives, placement
        self._memories: dict[int, LateMemory] | None = None
        self._ways(1)

    def memories(self, micro_batches: int) -> dict[int, LateMemory]:
        """By stage; ``micro_batches`` decides delays that are not given, when this is called first."""
        if self._memories is None:
            self._memories = {way.receiver: LateMemory(way) for way in self._ways(micro_batches)}
        return self._memories

    def keep(self, batch: int, hidden: Mapping[int, Any], outputs: Mapping[int, Any], labels: Any) -> None:
        """A micro-batch of the training: what heads were given, and what exits gave."""
        for stage, memory in (self._memories or {}).items():
            memory.keep(batch, hidden[stage], labels)
            said = memory.way.targets(outputs[memory.way.sender], labels, batch)
            memory.targets.setdefault(batch, []).append(said)

    def losses(self, batch: int, micro_batches: int) -> Iterator[tuple[int, Tensor, int]]:
        """As a batch begins, for each loss that is due its stage, the loss, and how many micro-batches have one."""
        for stage, memory in self.memories(micro_batches).items():
            used = memory.way.used_at(batch)
            examples = memory.take(used) if used in memory.kept else []
            for example in examples:
                yield stage, self._objectives[stage].late_loss(*example), len(examples)

    def _ways(self, micro_batches: int) -> list[LateWay]:
        wanted = {stage: objective.needs.late for stage, objective in self._objectives.items()}
        return late_ways(wanted, self._placement.losses, micro_batches, borrow=self._placement.borrow)
