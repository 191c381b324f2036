"""The one schedule of all widths: what a stage does in a batch, as DeepSpeed pipeline instructions.

1F1B is this schedule at N = K. Whatever depends on the mathematics is asked of :class:`Strategy`; the order is that
of docs/how-it-works.md.
"""

from __future__ import annotations

from collections.abc import Iterator

from deepspeed.runtime.pipe.schedule import (
    BufferOpInstruction,
    ForwardPass,
    LoadMicroBatch,
    OptimizerStep,
    PipeInstruction,
    PipeSchedule,
    RecvActivation,
    RecvGrad,
    ReduceGrads,
    SendActivation,
    SendGrad,
)

from ibp_deepspeed.config import Mode
from ibp_deepspeed.strategy import Strategy

__all__ = [
    "AuxLoss",
    "ForwardPass",
    "InputProduct",
    "InterlockedBackward",
    "InterlockedTrainSchedule",
    "LoadMicroBatch",
    "OptimizerStep",
    "PipeInstruction",
    "RecvActivation",
    "ReduceGrads",
    "RelayGrad",
    "RecvGrad",
    "SendActivation",
    "SendGrad",
]


class AuxLoss(BufferOpInstruction):
    """Forward and backward of this stage's head: the head's gradient and dL_k/dh_k (buffer_id, micro_batch)."""


class RelayGrad(BufferOpInstruction):
    """Receive dL_loss/dh_k of a loss that does not end in an update here yet (buffer_id, micro_batch, loss)."""


class InputProduct(BufferOpInstruction):
    """Vector-Jacobian product of dL_loss/dh_k to the stage's input (buffer_id, micro_batch, loss)."""


class InterlockedBackward(BufferOpInstruction):
    """Accumulate the trunk's gradient and free the micro-batch's graph and buffers (buffer_id, micro_batch)."""


class InterlockedTrainSchedule(PipeSchedule):
    """The instructions of one stage in one batch.

    Args:
        micro_batches: M, micro-batches in a batch.
        stages: K, pipeline stages.
        stage_id: k, the stage that executes the schedule.
        width: N, the interlocking width.
        hop_slack: extra slots for a gradient's travel over each boundary.
        mode: ``furthest`` or ``window``.
        aux_heads: whether stages before the last have heads (only backpropagation works without).
    """

    def __init__(
        self,
        micro_batches: int,
        stages: int,
        stage_id: int,
        width: int,
        hop_slack: int = 0,
        mode: Mode = "furthest",
        aux_heads: bool = True,
    ) -> None:
        super().__init__(micro_batches, stages, stage_id)
        self.strategy = Strategy(stages, width, mode, hop_slack, aux_heads=aux_heads)

    def num_pipe_buffers(self) -> int:
        """Micro-batches whose activations are live at once: the bound of the strategy."""
        return self.strategy.live_micro_batches(self.stage_id, self.micro_batches)

    def steps(self) -> Iterator[list[PipeInstruction]]:
        """Yield the instructions of slot 0 … M-1 + d·hop, the optimizer step after the last."""
        distance, hop = self.strategy.distance(self.stage_id), self.strategy.hop
        slots = self.micro_batches + distance * hop
        for slot in range(slots):
            commands: list[PipeInstruction] = []
            if slot < self.micro_batches:
                commands += self._forward(slot)
            for hops in range(1, distance + 1):
                micro_batch = slot - hops * hop
                if not self._valid_micro_batch(micro_batch):
                    continue
                if hops < distance:
                    commands += self._relay(micro_batch, self.stage_id + hops)
                else:
                    commands += self._update(micro_batch)
            if slot == slots - 1:
                commands += [ReduceGrads(), OptimizerStep()]
            yield commands

    def _forward(self, micro_batch: int) -> list[PipeInstruction]:
        """Forward, own loss, and its product upstream at once; without a reach, the update too."""
        k, strategy = self.stage_id, self.strategy
        at = self._at(micro_batch)
        commands: list[PipeInstruction] = [LoadMicroBatch(**at)]
        if not self.is_first_stage:
            commands.append(RecvActivation(**at))
        commands.append(ForwardPass(**at))
        if not self.is_last_stage:
            commands.append(SendActivation(**at))
            if strategy.has_loss(k):
                commands.append(AuxLoss(**at))
        if strategy.distance(k) == 0:
            commands += self._update(micro_batch)
        elif strategy.crosses(k, k):
            commands += [InputProduct(**at, loss=k), SendGrad(**at, loss=k)]
        return commands

    def _relay(self, micro_batch: int, loss: int) -> list[PipeInstruction]:
        """Receive the gradient of a nearer loss and pass it on, if anybody here or upstream uses it."""
        at = self._at(micro_batch)
        if not self.strategy.crosses(loss, self.stage_id + 1):
            return []
        commands: list[PipeInstruction] = [RelayGrad(**at, loss=loss)]
        if self.strategy.crosses(loss, self.stage_id):
            commands += [InputProduct(**at, loss=loss), SendGrad(**at, loss=loss)]
        return commands

    def _update(self, micro_batch: int) -> list[PipeInstruction]:
        """The trunk's one update gradient of a micro-batch; what upstream uses is sent as early as it exists."""
        k, strategy, reach = self.stage_id, self.strategy, self.strategy.reach(self.stage_id)
        at = self._at(micro_batch)
        commands: list[PipeInstruction] = [] if reach == k else [RecvGrad(**at, loss=reach)]
        send = [SendGrad(**at, loss=reach)] if strategy.crosses(reach, k) else []
        if send and not strategy.update_gives_input_gradient(k):
            return [*commands, InputProduct(**at, loss=reach), *send, InterlockedBackward(**at)]
        return [*commands, InterlockedBackward(**at), *send]

    def _at(self, micro_batch: int) -> dict[str, int]:
        return {"buffer_id": self._buffer_idx(micro_batch), "micro_batch": micro_batch}
