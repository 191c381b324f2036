"""Other systems' pipeline schedules, executed from their own instruction lists, without devices.

``1F1B`` and ``DualPipeV`` are DeepSpeed's ``TrainSchedule`` and ``DualPipeVSchedule``; ``interleaved 1F1B``, ``ZB1``
(interleaved zero bubble) and ``ZBV`` are torch.distributed.pipelining's. A rank holds one or two chunks of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

from deepspeed.runtime.pipe import schedule as ds

from ibp_deepspeed.errors import PlanError, ScheduleError
from ibp_deepspeed.schedule.instructions import BackwardPass
from ibp_deepspeed.schedule.simulator import Boundary, Costs

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
    """

    chunks: int
    places: list[int]
    programs: list[list[Step]]

    @property
    def in_flight(self) -> list[int]:
        """The most micro-batches of chunks that each rank holds at once."""
        return [max(accumulate(step.begins for step in program)) for program in self.programs]


def make_peer(name: str, stages: int, micro_batches: int) -> Peer:
    """A peer's schedule.

    Raises:
        PlanError: the peer can't run with so few micro-batches, with what would fit.
    """
    reason = why_not(name, stages, micro_batches)
    if reason:
        raise PlanError(reason)
    if name == "1F1B":
        return Peer(stages, list(range(stages)), [list(_one_f_one_b(stages, micro_batches, k)) for k in range(stages)])
    if name == "DualPipeV":
        programs = [list(_dual_pipe_v(stages, micro_batches, rank)) for rank in range(stages)]
        return Peer(2 * stages, [*range(stages), *range(stages - 1, -1, -1)], programs)
    return _torchs(name, stages, micro_batches)


def why_not(name: str, stages: int, micro_batches: int) -> str | None:
    """One sentence if a peer can't run with K stages and M micro-batches."""
    if name in ("DualPipeV", "ZBV") and micro_batches < 2 * stages:
        return f"{name} needs at least {2 * stages} micro-batches on {stages} stages, {micro_batches} are given."
    if name in ("interleaved 1F1B", "ZB1") and micro_batches % stages:
        return f"{name} needs a multiple of {stages} micro-batches, {micro_batches} are given."
    return None


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
                    yield Step(pieces=_whole(stage), begins=-1)


def _whole(chunk: int) -> tuple[tuple[str, int], ...]:
    """A backward pass in one piece."""
    return tuple((name, chunk) for name in BackwardPass.costs)


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
                    yield Step(pieces=_whole(chunk[phase]), begins=-1)
    yield from commit()


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
    return Peer(chunks, places, [[_step(action, chunks) for action in row if action is not None] for row in lists])


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


@dataclass(frozen=True)
class Execution:
    """What a peer's batch takes, in the unit of the costs.

    Attributes:
        batch_time: a batch, when batches follow each other.
        idle: share of each rank's time.
    """

    batch_time: float
    idle: list[float]


def execute(
    peer: Peer, costs: Sequence[Costs], boundaries: Sequence[Boundary] | None = None, batches: int = 4
) -> Execution:
    """Execute a peer's schedule over some batches; a rank begins the next one when it has ended its own.

    Args:
        peer: the schedule.
        costs: of each chunk.
        boundaries: between neighbouring ranks, K-1; none costs anything if None.
        batches: the last one is measured.
    """
    ranks = len(peer.programs)
    clock, position = [0.0] * ranks, [0] * ranks
    arrived: dict[tuple[int, Message], float] = {}
    free: dict[tuple[int, int], float] = {}
    busy = [0.0] * ranks
    ends: list[list[float]] = [[] for _ in range(ranks)]
    moving = True
    while moving:
        moving = False
        for rank, program in enumerate(peer.programs):
            while position[rank] < batches * len(program):
                batch, index = divmod(position[rank], len(program))
                step = program[index]
                times = [arrived.get((batch, message)) for message in step.waits]
                if None in times:
                    break
                start = max([clock[rank], *(t for t in times if t is not None)])
                work = sum(getattr(costs[chunk], piece) for piece, chunk in step.pieces)
                clock[rank] = start + work
                busy[rank] += work if batch == batches - 1 else 0.0
                for message in step.sends:
                    arrived[batch, message] = _arrival(peer, message, rank, clock[rank], boundaries, free)
                position[rank] += 1
                moving = True
                if index == len(program) - 1:
                    ends[rank].append(clock[rank])
    if any(len(row) < batches for row in ends):
        raise ScheduleError(f"a peer's schedule waits for ever at steps {position}")
    spans = [row[-1] - row[-2] for row in ends]
    return Execution(max(spans), [1 - b / max(spans) for b in busy])


def _arrival(
    peer: Peer,
    message: Message,
    rank: int,
    now: float,
    boundaries: Sequence[Boundary] | None,
    free: dict[tuple[int, int], float],
) -> float:
    kind, chunk, _ = message
    target = chunk + (1 if kind == "F" else -1)
    if not 0 <= target < peer.chunks or peer.places[target] == rank or boundaries is None:
        return now
    other = peer.places[target]
    boundary = boundaries[min(rank, other)] if abs(rank - other) == 1 else max(boundaries, key=lambda b: b.sending)
    free[rank, other] = max(now, free.get((rank, other), 0.0)) + boundary.sending
    return free[rank, other] + boundary.latency
