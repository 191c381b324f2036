"""Proof, without devices, that the schedules of all stages compute what the strategies say."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from ibp_deepspeed.schedule.generator import (
    AuxLoss,
    BorrowedProduct,
    ForwardPass,
    InputProduct,
    InterlockedBackward,
    InterlockedTrainSchedule,
    LoadMicroBatch,
    OptimizerStep,
    PipeInstruction,
    RecvActivation,
    RecvGrad,
    ReduceGrads,
    RelayGrad,
    SendActivation,
    SendGrad,
)
from ibp_deepspeed.schedule.simulator import Walk
from ibp_deepspeed.strategy.timeline import BatchStrategy, Course


def checked_course(course: Course) -> dict[BatchStrategy, list[InterlockedTrainSchedule]]:
    """The schedules of all K stages for every batch that a course can have, proved one by one and in pairs.

    Raises:
        ScheduleError: what is wrong, with the grid of stages × time.
        ConfigError: the configured channel depth is too small.
    """
    depth = course.channel_depth()
    checked = {batch: checked_schedules(batch, depth) for batch in course.distinct()}
    for pair in itertools.permutations(checked.values(), 2):
        Walk(pair, channel_depth=depth).run()
    return checked


def checked_schedules(batch: BatchStrategy, channel_depth: int | None = None) -> list[InterlockedTrainSchedule]:
    """The schedules of all K stages, proved; the engine runs its own of these objects.

    Proved: every send meets its receive in order on its channel; no deadlock with channels of this depth (default:
    the strategies'), also from batch to batch; every trunk gets exactly one update gradient a micro-batch, made
    of the losses that the micro-batch's strategy names; the optimizer steps once, after all of them; live
    micro-batches stay within the bound.

    Raises:
        ScheduleError: what is wrong, with the grid of stages × time.
        ConfigError: the depth is too small.
    """
    schedules = [InterlockedTrainSchedule.for_batch(batch, k) for k in range(batch.stages)]
    check_schedules(schedules, batch, batch.channel_depth(channel_depth))
    return schedules


def check_schedules(
    schedules: Sequence[InterlockedTrainSchedule], batch: BatchStrategy, channel_depth: int | None
) -> None:
    """Check given schedules against the strategies of a batch (see :func:`checked_schedules`)."""
    Walk([schedules] * 2, channel_depth=channel_depth).run()
    walk = Walk([schedules], channel_depth=channel_depth)
    walk.run()
    for stage in range(batch.stages):
        _StageCheck(walk, batch, stage).run()


class _StageCheck:
    """Symbolic execution of one stage: which values exist when an instruction uses them."""

    def __init__(self, walk: Walk, batch: BatchStrategy, stage: int) -> None:
        self.walk, self.batch, self.stage = walk, batch, stage
        self.bound = batch.live_micro_batches(stage)
        self.loaded: set[int] = set()
        self.received: set[int] = set()
        self.live: set[int] = set()
        self.buffers: dict[int, int] = {}
        self.cotangents: set[tuple[int, int]] = set()  # (micro-batch, loss): dL/dh_k is known
        self.borrowed: set[tuple[int, int]] = set()  # (micro-batch, loss): dL/d(borrowed layers' output) is known
        self.input_gradients: set[tuple[int, int]] = set()  # (micro-batch, loss): dL/dh_{k-1} is known
        self.lost: list[tuple[int, int]] = []  # (micro-batch, loss): computed by a head
        self.sent: list[tuple[int, int]] = []
        self.updated: list[int] = []
        self.reduced = self.stepped = 0
        self.index = 0

    def run(self) -> None:
        """Execute all instructions, then compare the totals with the strategies."""
        for index, instruction in enumerate(self.walk.programs[self.stage]):
            self.index = index
            self._require(self.stepped == 0, "after the optimizer step")
            getattr(self, f"_{type(instruction).__name__}")(instruction)
        self._require(self.stepped == 1, f"the optimizer steps {self.stepped} times")
        last = self.batch.stages - 1
        strategies = list(enumerate(self.batch.micro_batches))
        losses = sorted((m, loss) for m, s in strategies for loss in s.losses_at(self.stage) if loss < last)
        self._require(sorted(self.lost) == losses, f"computes the heads' losses {sorted(self.lost)}, not {losses}")
        expected = sorted((m, loss) for m, s in strategies for loss in range(last + 1) if s.crosses(loss, self.stage))
        self._require(sorted(self.sent) == expected, f"sends gradients {sorted(self.sent)}, not {expected}")

    def _require(self, holds: bool, message: str) -> None:
        if not holds:
            self.walk.fail(self.stage, self.index, message)

    def _LoadMicroBatch(self, instruction: LoadMicroBatch) -> None:
        self._require(instruction.micro_batch not in self.loaded, "loads a micro-batch twice")
        self.loaded.add(instruction.micro_batch)

    def _RecvActivation(self, instruction: RecvActivation) -> None:
        self.received.add(instruction.micro_batch)

    def _ForwardPass(self, instruction: ForwardPass) -> None:
        m = instruction.micro_batch
        self._require(m in self.loaded, "forward without data")
        self._require(self.stage == 0 or m in self.received, "forward without an input")
        self._require(instruction.buffer_id not in self.buffers, "forward into a buffer that is in use")
        self.buffers[instruction.buffer_id] = m
        self.live.add(m)
        self._require(len(self.live) <= self.bound, f"{len(self.live)} live micro-batches, the bound is {self.bound}")
        if self.stage == self.batch.stages - 1:
            self.cotangents.add((m, self.stage))

    def _SendActivation(self, instruction: SendActivation) -> None:
        self._require_live(instruction)

    def _AuxLoss(self, instruction: AuxLoss) -> None:
        self._require_live(instruction)
        key = (instruction.micro_batch, instruction.loss)
        self.lost.append(key)
        (self.borrowed if instruction.loss < self.stage else self.cotangents).add(key)

    def _RelayGrad(self, instruction: RelayGrad) -> None:
        self._require_live(instruction)
        self.cotangents.add((instruction.micro_batch, instruction.loss))

    def _RecvGrad(self, instruction: RecvGrad) -> None:
        self._RelayGrad(instruction)

    def _InputProduct(self, instruction: InputProduct) -> None:
        self._require_live(instruction)
        key = (instruction.micro_batch, instruction.loss)
        self._require(key in self.cotangents, "product of a gradient that is not here")
        self.input_gradients.add(key)

    def _BorrowedProduct(self, instruction: BorrowedProduct) -> None:
        self._require_live(instruction)
        key = (instruction.micro_batch, instruction.loss)
        self._require(key in self.borrowed, "product through borrowed layers of a loss that is not here")
        self.input_gradients.add(key)

    def _SendGrad(self, instruction: SendGrad) -> None:
        key = (instruction.micro_batch, instruction.loss)
        self._require(key in self.input_gradients, "sends a gradient that was not computed")
        self.sent.append(key)

    def _InterlockedBackward(self, instruction: InterlockedBackward) -> None:
        self._require_live(instruction)
        m = instruction.micro_batch
        strategy = self.batch[m]
        self._require(m not in self.updated, "a second update gradient for a micro-batch")
        for loss in strategy.weights(self.stage):
            self._require((m, loss) in self.cotangents, f"update without the gradient of loss {loss}")
        if strategy.borrowed_share(self.stage):
            self._require((m, self.stage - 1) in self.borrowed, "update without the loss that borrows layers")
        if strategy.update_gives_input_gradient(self.stage):
            self.input_gradients.add((m, strategy.reach(self.stage)))
        self.updated.append(m)
        self.live.remove(m)
        self._require(self.buffers.pop(instruction.buffer_id, None) == m, "frees a buffer of another micro-batch")

    def _ReduceGrads(self, instruction: ReduceGrads) -> None:
        self._require(sorted(self.updated) == list(range(len(self.batch))), f"reduces after {self.updated}")
        self.reduced += 1

    def _OptimizerStep(self, instruction: OptimizerStep) -> None:
        self._require(self.reduced == 1, "steps without a reduction")
        self.stepped += 1

    def _require_live(self, instruction: PipeInstruction) -> None:
        self._require(instruction.micro_batch in self.live, "uses a micro-batch that is not live")
