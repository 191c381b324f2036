"""Where a rank is: for a debug hook before each instruction, and for the words of an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from deepspeed.runtime.pipe.schedule import PipeInstruction

from ibp_deepspeed.engine.watchdog import Position, in_words
from ibp_deepspeed.errors import PeerLostError


class Moment(NamedTuple):
    """An instruction that a rank is about to execute.

    Attributes:
        rank, stage, replica: who.
        batch: from 1.
        instruction: the name of its class in ``ibp_deepspeed.schedule.instructions``.
        micro_batch: from 0; None: it is about the whole batch.
        loss: the index of the loss that it computes or carries; None: it does neither.
    """

    rank: int
    stage: int
    replica: int
    batch: int
    instruction: str
    micro_batch: int | None
    loss: int | None

    @classmethod
    def of(cls, command: PipeInstruction, batch: int, rank: int, stage: int, replica: int) -> Moment:
        """Of an instruction of a batch."""
        micro_batch, loss = command.kwargs.get("micro_batch"), command.kwargs.get("loss")
        return cls(rank, stage, replica, batch, type(command).__name__, micro_batch, loss)


Hook = Callable[[Moment], None]


def place_of(position: Position, stage: int, rank_of: Callable[[int], int]) -> str:
    """Where a rank is, and whom it waits for, in words.

    Args:
        position: of the rank.
        stage: of the rank.
        rank_of: the rank of a stage of the same pipeline.
    """
    doing, awaited = in_words(position, stage)
    place = f"stage {stage}, {doing}" if doing else f"stage {stage}"
    return place if awaited is None else f"{place}, waiting for stage {awaited} (rank {rank_of(awaited)})"


def locate(error: BaseException, place: str) -> None:
    """Have an error that is being raised say where its rank was: a lost peer in its sentence, others in a note."""
    if isinstance(error, PeerLostError):
        error.args = (f"{place}: {error}",)
    else:
        error.add_note(f"in {place}")
