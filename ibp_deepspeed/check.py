"""Proof, without devices, that the schedules of all stages compute what the strategy says."""

from __future__ import annotations

from collections.abc import Sequence

from ibp_deepspeed.schedule import (
    AuxLoss,
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
from ibp_deepspeed.strategy import Strategy
from ibp_deepspeed.walk import Walk


def checked_schedules(
    strategy: Strategy, micro_batches: int, channel_depth: int | None = None
) -> list[InterlockedTrainSchedule]:
    """The schedules of all K stages, proved; the engine runs its own of these objects.

    Proved: every send meets its receive in order on its channel; no deadlock with channels of this depth (default:
    the strategy's), also from batch to batch; every trunk gets exactly one update gradient a micro-batch, made
    of the losses that the strategy names; the optimizer steps once, after all of them; live micro-batches stay
    within the bound.

    Raises:
        ScheduleError: what is wrong, with the grid of stages × time.
    """
    schedules = [
        InterlockedTrainSchedule(
            micro_batches,
            strategy.stages,
            k,
            strategy.width,
            strategy.hop_slack,
            strategy.mode,
            strategy.aux_heads,
        )
        for k in range(strategy.stages)
    ]
    check_schedules(schedules, strategy, strategy.channel_depth(micro_batches, channel_depth))
    return schedules


def check_schedules(
    schedules: Sequence[InterlockedTrainSchedule], strategy: Strategy, channel_depth: int | None
) -> None:
    """Check given schedules against a strategy (see :func:`checked_schedules`)."""
    Walk(schedules, channel_depth=channel_depth, batches=2).run()
    walk = Walk(schedules, channel_depth=channel_depth)
    walk.run()
    for stage, schedule in enumerate(schedules):
        _StageCheck(walk, strategy, stage, schedule.micro_batches).run()


class _StageCheck:
    """Symbolic execution of one stage: which values exist when an instruction uses them."""

    def __init__(self, walk: Walk, strategy: Strategy, stage: int, micro_batches: int) -> None:
        self.walk, self.strategy, self.stage, self.micro_batches = walk, strategy, stage, micro_batches
        self.loaded: set[int] = set()
        self.received: set[int] = set()
        self.live: set[int] = set()
        self.buffers: dict[int, int] = {}
        self.cotangents: set[tuple[int, int]] = set()  # (micro-batch, loss): dL/dh_k is known
        self.input_gradients: set[tuple[int, int]] = set()  # (micro-batch, loss): dL/dh_{k-1} is known
        self.sent: list[tuple[int, int]] = []
        self.updated: list[int] = []
        self.reduced = self.stepped = 0
        self.index = 0

    def run(self) -> None:
        """Execute all instructions, then compare the totals with the strategy."""
        for index, instruction in enumerate(self.walk.programs[self.stage]):
            self.index = index
            self._require(self.stepped == 0, "after the optimizer step")
            getattr(self, f"_{type(instruction).__name__}")(instruction)
        self._require(self.stepped == 1, f"the optimizer steps {self.stepped} times")
        expected = sorted(
            (m, loss)
            for loss in range(self.stage, self.strategy.stages)
            for m in range(self.micro_batches)
            if self.strategy.crosses(loss, self.stage)
        )
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
        m, bound = instruction.micro_batch, self.strategy.live_micro_batches(self.stage, self.micro_batches)
        self._require(m in self.loaded, "forward without data")
        self._require(self.stage == 0 or m in self.received, "forward without an input")
        self._require(instruction.buffer_id not in self.buffers, "forward into a buffer that is in use")
        self.buffers[instruction.buffer_id] = m
        self.live.add(m)
        self._require(len(self.live) <= bound, f"{len(self.live)} live micro-batches, the bound is {bound}")
        if self.stage == self.strategy.stages - 1:
            self.cotangents.add((m, self.stage))

    def _SendActivation(self, instruction: SendActivation) -> None:
        self._require_live(instruction)

    def _AuxLoss(self, instruction: AuxLoss) -> None:
        self._require_live(instruction)
        self.cotangents.add((instruction.micro_batch, self.stage))

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

    def _SendGrad(self, instruction: SendGrad) -> None:
        key = (instruction.micro_batch, instruction.loss)
        self._require(key in self.input_gradients, "sends a gradient that was not computed")
        self.sent.append(key)

    def _InterlockedBackward(self, instruction: InterlockedBackward) -> None:
        self._require_live(instruction)
        m = instruction.micro_batch
        self._require(m not in self.updated, "a second update gradient for a micro-batch")
        for loss in self.strategy.weights(self.stage):
            self._require((m, loss) in self.cotangents, f"update without the gradient of loss {loss}")
        if self.strategy.update_gives_input_gradient(self.stage):
            self.input_gradients.add((m, self.strategy.reach(self.stage)))
        self.updated.append(m)
        self.live.remove(m)
        self._require(self.buffers.pop(instruction.buffer_id, None) == m, "frees a buffer of another micro-batch")

    def _ReduceGrads(self, instruction: ReduceGrads) -> None:
        self._require(sorted(self.updated) == list(range(self.micro_batches)), f"reduces after {self.updated}")
        self.reduced += 1

    def _OptimizerStep(self, instruction: OptimizerStep) -> None:
        self._require(self.reduced == 1, "steps without a reduction")
        self.stepped += 1

    def _require_live(self, instruction: PipeInstruction) -> None:
        self._require(instruction.micro_batch in self.live, "uses a micro-batch that is not live")
