"""What one stage does for late targets: it keeps states for its own head, and answers the exit before it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import log_dist
from torch import Tensor

from ibp_deepspeed.checkpoint import layout
from ibp_deepspeed.comm.late_relay import LateRelay
from ibp_deepspeed.comm.link_groups import new_host_group
from ibp_deepspeed.objectives.late_targets import (
    LateMemory,
    LateTargets,
    LateWay,
    late_ways,
    least_late_delay,
    not_taken,
)
from ibp_deepspeed.stage.late_parts import LatePart
from ibp_deepspeed.stage.module import InterlockedPipelineModule

Learn = Callable[[Tensor, int], None]
"""(a late loss, the number of micro-batches that it is one of) → its gradients are a part of those of the batch at
hand."""


class LateAnswers(LatePart):
    """The late targets that come to this stage, and those that it sends. Made at the same time on all ranks.

    Nothing is waited for but at the beginning of the batch that uses a batch's targets, and in checkpoints.

    Args:
        module: this stage.
        grid: DeepSpeed's grid of stages and data-parallel ranks.
        ways: all of the pipeline.
        device: of the states.
        learn: takes the losses.

    Attributes:
        received_bytes: of the targets of one batch, the last that came.
    """

    def __init__(
        self, module: InterlockedPipelineModule, grid: Any, ways: list[LateWay], device: torch.device, learn: Learn
    ) -> None:
        self._stage, self._replica = grid.get_stage_id(), grid.get_data_parallel_rank()
        self._objectives, self._device, self._learn = module.objectives, device, learn
        self._batch = self.received_bytes = 0
        self._said: list[list[Tensor]] = []
        group = new_host_group()

        def relay(way: LateWay) -> LateRelay:
            ranks = {stage: grid.stage_to_global(stage) for stage in (way.receiver, way.sender)}
            return LateRelay(group, ranks, self._stage, None, what="late targets")

        coming = next((way for way in ways if way.receiver == self._stage), None)
        self._going = next((way for way in ways if way.sender == self._stage), None)
        self._memory = None if coming is None else LateMemory(coming)
        self._source = None if coming is None else relay(coming)
        self._sink = None if self._going is None else relay(self._going)

    @classmethod
    def from_module(
        cls, module: InterlockedPipelineModule, grid: Any, micro_batches: int, device: torch.device, learn: Learn
    ) -> LateAnswers | None:
        """What the objectives of all stages want; None if that is nothing.

        Raises:
            InterlockingError: on all ranks, something that can't be had.
        """
        placement = module.placement
        if not placement.heads:
            return None
        seen: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(seen, {loss: objective.needs.late for loss, objective in module.objectives.items()})
        wanted: dict[int, LateTargets | None] = {loss: late for row in seen for loss, late in row.items()}
        ways = late_ways(wanted, placement.losses, micro_batches, borrow=placement.borrow)
        for way in ways:
            _warn_of_waiting(way, least_late_delay(way.sender - way.receiver, micro_batches))
        return cls(module, grid, ways, device, learn) if ways else None

    def begin_batch(self, batch: int) -> None:
        """Overrides LatePart's: the losses of the batch whose targets are due."""
        self._batch = batch
        if self._memory is None:
            return
        used = self._memory.way.used_at(batch)
        if used not in self._memory.kept:  # before the first, or a checkpoint had none
            return
        self._collect(used)
        examples = self._memory.take(used)
        objective = self._objectives[self._stage]
        for example in examples:
            self._learn(objective.late_loss(*example), len(examples))

    def micro_batch(self, loss: int, states: Any, outputs: Any, labels: Any) -> None:
        """Keep what the head of an exit on this stage was given, and answer the exit before; in training alone.

        Args:
            loss: of the exit.
            states: that its head was given; the model's own layers keep none.
            outputs, labels: of its loss.
        """
        if self._memory is not None and loss == self._memory.way.receiver:
            self._memory.keep(self._batch, states, labels)
        if self._going is not None and loss == self._going.sender:
            self._said.append(self._going.targets(outputs, labels, self._batch))

    def end_batch(self) -> None:
        """Send the answers of all micro-batches, at once because copying to the host waits for the device."""
        if self._sink is not None:
            self._sink.send(self._batch, [torch.stack(parts).cpu() for parts in zip(*self._said, strict=True)])
            self._said = []

    def save(self, folder: str, batch: int, checkpoint_engine: Any) -> None:
        """Overrides LatePart's: each stage and replica its own."""
        if self._memory is not None:
            self.settle(batch)
            checkpoint_engine.save(state_dict=self._memory.state_dict(batch), path=self._path(folder))

    def settle(self, batch: int) -> None:
        """Overrides LatePart's."""
        for kept in [] if self._memory is None else self._memory.way.pending(batch):
            self._collect(kept)

    def load(self, folder: str, batch: int, checkpoint_engine: Any, *, strict: bool = True) -> None:
        """Overrides LatePart's: what the checkpoint lacks, or has of another shape (not ``strict``), is left out."""
        self.load_report = ()
        if self._memory is None:
            return
        path = self._path(folder)
        state: dict[str, Any] = {}
        if strict and os.path.exists(path):
            state = checkpoint_engine.load(path, map_location=torch.device("cpu"))
        lacking = self._memory.load_state_dict(state, batch, self._device)
        if lacking and self._replica == 0:
            self.load_report = (not_taken(self._stage, lacking),)

    def close(self, *, wait: bool) -> None:
        """Overrides LatePart's."""
        for relay in (self._sink, self._source):
            if relay is not None:
                relay.close(wait=wait)

    def _collect(self, batch: int) -> None:
        """Wait for the targets of a batch of which there are states."""
        assert self._memory is not None and self._source is not None
        if batch in self._memory.targets or batch not in self._memory.kept:
            return
        stacked = self._source.take(batch)
        self.received_bytes = sum(tensor.nbytes for tensor in stacked)
        of_micro_batches = zip(*(tensor.to(self._device) for tensor in stacked), strict=True)
        self._memory.targets[batch] = [list(targets) for targets in of_micro_batches]

    def _path(self, folder: str) -> str:
        return os.path.join(folder, layout.late_targets(self._replica, self._stage))


def _warn_of_waiting(way: LateWay, least: int) -> None:
    if way.delay < least:
        log_dist(
            f"delay {way.delay} is below {least}: stage {way.receiver} will wait for what stage {way.sender} says",
            ranks=[0],
            level=logging.WARNING,
        )
