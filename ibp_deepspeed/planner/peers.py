"""Other systems' pipeline schedules, from their own instruction lists.

``1F1B`` and ``DualPipeV`` are DeepSpeed's ``TrainSchedule`` and ``DualPipeVSchedule``; ``interleaved 1F1B``, ``ZB1``
(interleaved zero bubble) and ``ZBV`` are torch.distributed.pipelining's. A rank holds one or two chunks of the model.
``asynchronous 1F1B`` is PipeDream-2BW's, which never drains: stage k is K-1-k forward passes ahead for ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

from deepspeed.runtime.pipe import schedule as ds

from ibp_deepspeed.errors import PlanError
from ibp_deepspeed.schedule.instructions import BackwardPass

ASYNCHRONOUS = "asynchronous 1F1B"

Message = tuple[str, int, int]
"""("F" or "B", the chunk that sends it, micro-batch)."""


class Step(NamedTuple):
    """Wait for ``waits``, compute ``pieces`` (names of costs, chunk), send ``sends``."""

    waits: tuple[Message, ...] = ()
    pieces: tuple[tuple[str, int], ...] = ()
    sends: tuple[Message, ...] = ()
    begins: int = 0
    """Micro-batches of chunks whose activations are held from here on, less those that are given back."""


@dataclass(frozen=True)
class Peer:
    """The schedule of another system.

    Attributes:
        chunks: of the model, 1 or 2 a rank.
        places: the rank of each chunk.
        programs: the steps of each rank in a batch.
        micro_batches: M; messages with larger numbers are those of the next batches.
        prologues: steps of each rank before its first batch.
    """

    chunks: int
    places: list[int]
    programs: list[list[Step]]
    micro_batches: int
    prologues: list[list[Step]] = field(default_factory=list)

    @property
    def in_flight(self) -> list[int]:
        """The most micro-batches of chunks that each rank holds at once."""
        before = self.prologues or [[] for _ in self.programs]
        return [max(accumulate(s.begins for s in [*a, *b])) for a, b in zip(before, self.programs, strict=True)]

    @property
    def settles_after(self) -> int:
        """Batches after which its beginning is forgotten; one that drains forgets it at once."""
        return 2 * -(-len(self.programs) // self.micro_batches) if self.prologues else 0


def make_peer(name: str, stages: int, micro_batches: int) -> Peer:
    """A peer's schedule.

    Raises:
        PlanError: the peer can't run with so few micro-batches, with what would fit.
    """
    reason = why_not(name, stages, micro_batches)
    if reason:
        raise PlanError(reason)
    own = list(range(stages))
    if name == ASYNCHRONOUS:
        found = [_asynchronous(stages, micro_batches, k) for k in own]
        return Peer(stages, own, [program for program, _ in found], micro_batches, [ahead for _, ahead in found])
    if name == "1F1B":
        return Peer(stages, own, [list(_one_f_one_b(stages, micro_batches, k)) for k in own], micro_batches)
    if name == "DualPipeV":
        programs = [list(_dual_pipe_v(stages, micro_batches, rank)) for rank in range(stages)]
        return Peer(2 * stages, [*range(stages), *range(stages - 1, -1, -1)], programs, micro_batches)
    return _torchs(name, stages, micro_batches)


def why_not(name: str, stages: int, micro_batches: int) -> str | None:
    """One sentence if a peer can't run with K stages and M micro-batches."""
    if name in ("DualPipeV", "ZBV") and micro_batches < 2 * stages:
        return f"{name} needs at least {2 * stages} micro-batches on {stages} stages, {micro_batches} are given."
    if name in ("interleaved 1F1B", "ZB1") and micro_batches % stages:
        below = micro_batches // stages * stages
        fit = f"{below} or {below + stages}" if below else f"{stages}"
        return f"{name} needs a multiple of {stages} micro-batches, {micro_batches} are given: {fit} would fit."
    return None


def _asynchronous(stages: int, micro_batches: int, stage: int) -> tuple[list[Step], list[Step]]:
    """One batch, and the forward passes that are ahead from the start."""

    def forward(number: int) -> Step:
        waits = (("F", stage - 1, number),) if stage else ()
        return Step(waits, (("forward", stage),), (("F", stage, number),), begins=1)

    def backward(number: int) -> Step:
        waits = (("B", stage + 1, number),) if stage < stages - 1 else ()
        return Step(waits, _both(stage), (("B", stage, number),), begins=-1)

    ahead = stages - 1 - stage
    program = [step for number in range(micro_batches) for step in (forward(number + ahead), backward(number))]
    return program, [forward(number) for number in range(ahead)]


def _one_f_one_b(stages: int, micro_batches: int, stage: int) -> Iterator[Step]:
    count = {"F": 0, "B": 0, "recv F": 0, "recv B": 0, "send F": 0, "send B": 0}

    def number(what: str) -> int:
        count[what] += 1
        return count[what] - 1

    for step in ds.TrainSchedule(micro_batches, stages, stage).steps():
        for command in step:
            match command:
                case ds.RecvActivation():
                    yield Step(waits=(("F", stage - 1, number("recv F")),))
                case ds.RecvGrad():
                    yield Step(waits=(("B", stage + 1, number("recv B")),))
                case ds.SendActivation():
                    yield Step(sends=(("F", stage, number("send F")),))
                case ds.SendGrad():
                    yield Step(sends=(("B", stage, number("send B")),))
                case ds.ForwardPass():
                    yield Step(pieces=(("forward", stage),), begins=1)
                case ds.BackwardPass():
                    yield Step(pieces=_both(stage), begins=-1)


def _dual_pipe_v(stages: int, micro_batches: int, rank: int) -> Iterator[Step]:
    """Messages are launched, and waited for, at the next ``CommitP2P`` (and at the end)."""
    waits: list[Message] = []
    sends: list[Message] = []
    chunk = (rank, 2 * stages - 1 - rank)

    def number(command: Any) -> int:
        return int(command.buffer_id) % micro_batches

    def commit() -> Iterator[Step]:
        yield Step(sends=tuple(sends))
        yield Step(waits=tuple(waits))
        sends.clear()
        waits.clear()

    for step in ds.DualPipeVSchedule(micro_batches, stages, rank).steps():
        for command in step:
            phase = getattr(command, "phase", 0)
            match command:
                case ds.CommitP2P():
                    yield from commit()
                case ds.RecvActivation():
                    waits.append(("F", chunk[phase] - 1, number(command)))
                case ds.RecvGrad():
                    waits.append(("B", chunk[phase] + 1, number(command)))
                case ds.SendActivation():
                    sends.append(("F", chunk[phase], number(command)))
                case ds.SendGrad():
                    sends.append(("B", chunk[phase], number(command)))
                case ds.ForwardPass():
                    yield Step(pieces=(("forward", chunk[phase]),), begins=1)
                case ds.BackwardPass():
                    yield Step(pieces=_both(chunk[phase]), begins=-1)
    yield from commit()


def _both(chunk: int) -> tuple[tuple[str, int], ...]:
    """B and W in one piece."""
    return tuple((name, chunk) for name in BackwardPass.costs)


_TORCHS = {"interleaved 1F1B": "Interleaved1F1B", "ZB1": "InterleavedZeroBubble", "ZBV": "ZBVZeroBubble"}


def _torchs(name: str, stages: int, micro_batches: int) -> Peer:
    try:
        from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops
    except ImportError as error:
        raise PlanError(f"this torch does not show its schedules ({error}), so {name} can't be predicted.") from error
    chunks = 2 * stages
    turning = name == "ZBV"
    places = [*range(stages), *(range(stages - 1, -1, -1) if turning else range(stages))]
    lists = get_schedule_ops(_TORCHS[name], stages, micro_batches, 2)
    return Peer(
        chunks,
        places,
        [[_step(action, chunks) for action in row if action is not None] for row in lists],
        micro_batches,
    )


_PIECES = {
    "FORWARD": ("forward",),
    "BACKWARD_INPUT": ("input_gradient",),
    "BACKWARD_WEIGHT": ("weight_gradient",),
    "FULL_BACKWARD": BackwardPass.costs,
}


def _step(action: Any, chunks: int) -> Step:
    kind, chunk, micro_batch = action.computation_type.name, action.stage_index, action.microbatch_index
    pieces = tuple((name, chunk) for name in _PIECES[kind])
    if kind == "FORWARD":
        waits = (("F", chunk - 1, micro_batch),) if chunk else ()
        return Step(waits, pieces, (("F", chunk, micro_batch),), begins=1)
    if kind == "BACKWARD_WEIGHT":
        return Step(pieces=pieces, begins=-1)
    waits = (("B", chunk + 1, micro_batch),) if chunk < chunks - 1 else ()
    return Step(waits, pieces, (("B", chunk, micro_batch),), begins=-1 if kind == "FULL_BACKWARD" else 0)
