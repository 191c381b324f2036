"""The instructions of a stage. Each carries what generator, validator, simulator, engine and drawings know of it.

They are DeepSpeed's pipeline instructions (``deepspeed.runtime.pipe.schedule``) with these facts, and a few of our own.
F, B and W are the forward pass, the input gradient and the weight gradient of a trunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import Enum
from typing import ClassVar, NamedTuple, Protocol

from deepspeed.runtime.pipe import schedule as deepspeed_schedule
from deepspeed.runtime.pipe.schedule import BufferOpInstruction, OptimizerStep, PipeInstruction, ReduceGrads

from ibp_deepspeed.strategy.strategy import StageStrategy

__all__ = [
    "AuxLoss",
    "BackwardBorrowed",
    "BackwardInput",
    "BackwardPass",
    "BackwardThrough",
    "BackwardWeight",
    "ForwardPass",
    "Instruction",
    "Link",
    "LoadMicroBatch",
    "OptimizerStep",
    "PipeInstruction",
    "RecvActivation",
    "RecvGrad",
    "ReduceGrads",
    "Release",
    "Schedule",
    "SendActivation",
    "SendGrad",
    "UpdateInput",
    "Value",
    "message_of",
]


class Link(Enum):
    """The direction of a message across a boundary."""

    ACTIVATIONS = 1
    """From stage k to stage k+1."""
    GRADIENTS = -1
    """From stage k to stage k-1."""


class Value(NamedTuple):
    """Something that an instruction makes and another one uses, on one stage."""

    kind: str
    micro_batch: int
    loss: int | None = None


class Instruction(BufferOpInstruction):
    """An instruction about one micro-batch (buffer_id, micro_batch, and loss where one is meant).

    Attributes:
        letter: its name in grids; empty: it is not drawn, because it takes no time.
        meaning: its name in drawings.
        costs: the fields of ``Costs`` whose sum it takes.
        receives, sends: the link whose next message it waits for, or sends on.
        begins, ends: whether the micro-batch is in flight on this stage from here on, or up to here.
        updates: of one that ends it, whether the trunk's gradient is accumulated by then.
    """

    letter: ClassVar[str] = ""
    meaning: ClassVar[str] = ""
    costs: ClassVar[tuple[str, ...]] = ()
    receives: ClassVar[Link | None] = None
    sends: ClassVar[Link | None] = None
    begins: ClassVar[bool] = False
    ends: ClassVar[bool] = False
    updates: ClassVar[bool] = False

    buffer_id: int
    micro_batch: int
    loss: int

    def uses(self, table: StageStrategy) -> list[Value]:
        """What must be there before it, by the strategy of its micro-batch on its stage."""
        return [Value("output", self.micro_batch)]

    def makes(self, table: StageStrategy) -> list[Value]:
        """What is there after it."""
        return []


class LoadMicroBatch(Instruction, deepspeed_schedule.LoadMicroBatch):
    """Read inputs and labels."""

    def uses(self, table: StageStrategy) -> list[Value]:
        return []

    def makes(self, table: StageStrategy) -> list[Value]:
        return [Value("data", self.micro_batch)]


class RecvActivation(Instruction, deepspeed_schedule.RecvActivation):
    """Receive h_{k-1}."""

    receives = Link.ACTIVATIONS

    def uses(self, table: StageStrategy) -> list[Value]:
        return [Value("data", self.micro_batch)]

    def makes(self, table: StageStrategy) -> list[Value]:
        return [Value("input", self.micro_batch)]


class ForwardPass(Instruction, deepspeed_schedule.ForwardPass):
    """F: h_k = f_k(h_{k-1}); on the last stage its loss too."""

    letter, meaning = "F", "forward pass (F)"
    costs = ("forward",)
    begins = True

    def uses(self, table: StageStrategy) -> list[Value]:
        data = Value("data", self.micro_batch)
        return [data, Value("input", self.micro_batch)] if table.stage > 0 else [data]

    def makes(self, table: StageStrategy) -> list[Value]:
        output = Value("output", self.micro_batch)
        own = Value("output gradient", self.micro_batch, table.stage)
        return [output, own] if table.is_last else [output]


class SendActivation(Instruction, deepspeed_schedule.SendActivation):
    """Send h_k."""

    sends = Link.ACTIVATIONS


class AuxLoss(Instruction):
    """Forward and backward of a head: its gradient, and that of its loss at the states that it reads."""

    letter, meaning = "L", "head, forward and backward"
    costs = ("head",)

    def makes(self, table: StageStrategy) -> list[Value]:
        kind = "borrowed gradient" if self.loss < table.stage else "output gradient"
        return [Value(kind, self.micro_batch, self.loss)]


class RecvGrad(Instruction, deepspeed_schedule.RecvGrad):
    """Receive dL_loss/dh_k."""

    receives = Link.GRADIENTS

    def makes(self, table: StageStrategy) -> list[Value]:
        return [Value("output gradient", self.micro_batch, self.loss)]


class BackwardInput(Instruction):
    """B: dL_loss/dh_{k-1} from dL_loss/dh_k; the graph stays."""

    letter, meaning = "B", "input gradient (B), for the stage before"
    costs = ("input_gradient",)

    def uses(self, table: StageStrategy) -> list[Value]:
        return [Value("output", self.micro_batch), Value("output gradient", self.micro_batch, self.loss)]

    def makes(self, table: StageStrategy) -> list[Value]:
        return [Value("input gradient", self.micro_batch, self.loss)]


class BackwardBorrowed(BackwardInput):
    """B of the loss before this stage's, through the stage's first layers, behind which its head stands."""

    letter, meaning = "Q", "input gradient through borrowed layers"
    costs = ("borrowed_gradient",)

    def uses(self, table: StageStrategy) -> list[Value]:
        return [Value("output", self.micro_batch), Value("borrowed gradient", self.micro_batch, self.loss)]


class _Update(Instruction):
    """The backward pass of what trains the trunk."""

    def uses(self, table: StageStrategy) -> list[Value]:
        values = [Value("output gradient", self.micro_batch, loss) for loss in table.terms]
        if table.borrowed_share:
            values.append(Value("borrowed gradient", self.micro_batch, table.stage - 1))
        return [Value("output", self.micro_batch), *values]

    def makes(self, table: StageStrategy) -> list[Value]:
        given = table.update_gives_input_gradient
        return [Value("input gradient", self.micro_batch, table.reach)] if given else []


class BackwardPass(_Update, deepspeed_schedule.BackwardPass):
    """B and W in one: accumulate the trunk's gradient, and free the micro-batch's graph and buffer."""

    letter, meaning = "BW", "backward pass (B and W)"
    costs = ("input_gradient", "weight_gradient", "at_once")
    ends = updates = True


class BackwardThrough(_Update):
    """B of a trunk with nothing to train, for the last gradient that goes through it; frees the micro-batch."""

    letter, meaning = "B", "input gradient (B), for the stage before"
    costs = ("input_gradient",)
    ends = True


class Release(Instruction):
    """Free a micro-batch for which no gradient comes: nothing to train here, nor before."""

    ends = True


class UpdateInput(_Update):
    """B of the update: the gradient that goes upstream, and what the weight gradients are made of later."""

    letter, meaning = "B", "input gradient (B), for the stage before"
    costs = ("input_gradient",)

    def makes(self, table: StageStrategy) -> list[Value]:
        return [*super().makes(table), Value("weight gradient's factors", self.micro_batch)]


class BackwardWeight(Instruction):
    """W: accumulate the trunk's gradient, and free the micro-batch's graph and buffer.

    At the latest here: a stage that waits for a message works off the oldest of those that are due.
    """

    letter, meaning = "W", "weight gradient (W)"
    costs = ("weight_gradient",)
    ends = updates = True

    def uses(self, table: StageStrategy) -> list[Value]:
        return [Value("weight gradient's factors", self.micro_batch)]


class SendGrad(Instruction, deepspeed_schedule.SendGrad):
    """Send dL_loss/dh_{k-1}."""

    sends = Link.GRADIENTS

    def uses(self, table: StageStrategy) -> list[Value]:
        return [Value("input gradient", self.micro_batch, self.loss)]


class Schedule(Protocol):
    """What one stage does in a batch: any object with such a method can be validated, simulated and executed."""

    def steps(self) -> Iterator[Sequence[PipeInstruction]]:
        """The instructions in order, in groups."""
        ...


def message_of(instruction: PipeInstruction) -> tuple[int, int | None]:
    """What a message is: its micro-batch, and the loss whose gradient it carries (None: an activation)."""
    return instruction.micro_batch, getattr(instruction, "loss", None)
