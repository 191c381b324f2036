"""Ends a job that stands still, on every rank, and says who was waited for.

The training thread notes where it is; a background thread of each rank looks at that, and writes it under a key of the
job's store for the others to see. A rank that has stood still for too long follows the waits from stage to stage to
the one that does not wait, and names it.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from typing import NoReturn

import torch.distributed as dist
from deepspeed.runtime.pipe.schedule import PipeInstruction

from ibp_deepspeed import cli
from ibp_deepspeed.schedule.instructions import Instruction

_BEAT = 2.0
"""Seconds between two looks, at most."""
_PATIENCE = timedelta(seconds=5)
"""With a store whose process is stopped."""
_SILENT = 3
"""Beats without a word after which a process counts as stopped or gone."""
_TELL = 60.0
"""Seconds of standing still after which rank 0 says so."""


class Position:
    """Where the training thread is; written by it alone.

    Attributes:
        count: rises with every step.
        what: an instruction, words for something else, None between batches, when nothing is watched.
        batch: from 1.
        awaits_credit: whether a forward pass waits until the next stage has received enough.
    """

    def __init__(self) -> None:
        self.count = 0
        self.what: PipeInstruction | str | None = None
        self.batch = 0
        self.awaits_credit = False

    def at(self, what: PipeInstruction | str | None) -> None:
        """A step."""
        self.what = what
        self.count += 1


@dataclass(frozen=True)
class Status:
    """What a rank says of itself.

    Attributes:
        rank, stage, replica, host: who.
        beat: rises with every word; one that does not rise is of a process that is stopped or gone.
        doing: in words; empty: between batches.
        awaits: the stage whose message it waits for; None: it does not wait for one.
        seconds: how long it has stood there.
    """

    rank: int
    stage: int
    replica: int
    host: str
    beat: int
    doing: str
    awaits: int | None
    seconds: float

    @classmethod
    def of(cls, position: Position, rank: int, stage: int, replica: int, beat: int, seconds: float) -> Status:
        """Of a position."""
        doing, awaits = in_words(position, stage)
        return cls(rank, stage, replica, platform.node(), beat, doing, awaits, seconds)


def in_words(position: Position, stage: int) -> tuple[str, int | None]:
    """What a stage does, and the stage that it waits for, if it does."""
    what, batch = position.what, position.batch
    if what is None:
        return "", None
    if isinstance(what, str):
        return f"{what}, batch {batch}", None
    words = type(what).__name__
    if isinstance(what, Instruction):
        loss = what.kwargs.get("loss")
        words += f" of micro-batch {what.micro_batch}" + ("" if loss is None else f" (loss {loss})")
    awaits = stage - what.receives.value if isinstance(what, Instruction) and what.receives is not None else None
    if position.awaits_credit:
        words, awaits = f"{words}, behind what the next stage has received", stage + 1
    return f"{words}, batch {batch}", awaits


def explain(statuses: Mapping[int, Status], silent: set[int], rank: int) -> str:
    """Whom a rank waits for in the end, in one sentence.

    Args:
        statuses: by rank, the newest of each.
        silent: ranks that have said nothing for some beats.
        rank: that stands still.
    """
    places = {(status.replica, status.stage): status.rank for status in statuses.values()}
    words, seen = [], {rank}
    now = statuses[rank]
    while True:
        who = f"stage {now.stage} (rank {now.rank} on {now.host})"
        if now.rank in silent:
            words.append(f"{who} is stopped or gone, last seen in {now.doing or 'nothing, between batches'}")
            break
        if not now.doing:
            words.append(f"{who} is between batches")
            break
        words.append(f"{who} has been in {now.doing} for {now.seconds:.0f} s")
        following = places.get((now.replica, now.awaits)) if now.awaits is not None else None
        if following is None or following in seen:
            break
        seen.add(following)
        now = statuses[following]
    return ", waiting for a message: ".join(words)


class Watchdog:
    """Of one rank.

    Args:
        position: of its training thread.
        stage, replica: its place.
        seconds: that a step may take; infinity: rank 0 tells, and nothing ends.
        store: of the job, for this engine alone.
        speaks_first: whether no other rank has said why the job ends; asked once.
        leave: how the process ends.
    """

    def __init__(
        self,
        position: Position,
        stage: int,
        replica: int,
        seconds: float,
        store: dist.Store,
        speaks_first: Callable[[], bool],
        leave: Callable[[int], NoReturn] = os._exit,
    ) -> None:
        self._position, self._stage, self._replica, self._seconds = position, stage, replica, seconds
        self._store, self._speaks_first, self._leave = store, speaks_first, leave
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._pause = min(_BEAT, seconds / 8)
        self._beat = 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    @classmethod
    def of_engine(cls, position: Position, stage: int, replica: int, seconds: float) -> Watchdog:
        """For the next engine of this job, on all ranks; 0 seconds: no limit."""
        store = dist.distributed_c10d._get_default_store()
        number = store.add(f"ibp_watchdogs/{dist.get_rank()}", 1)  # the same on all ranks
        own = store.clone()  # type: ignore[attr-defined]
        own.set_timeout(_PATIENCE)
        of_this = dist.PrefixStore(f"ibp_watchdog/{number}", own)
        return cls(position, stage, replica, seconds or math.inf, of_this, partial(cli.speaks_first, own))

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        self._thread.join(2 * _PATIENCE.total_seconds())

    def _watch(self) -> None:
        count, since, told = -1, time.monotonic(), False
        self._say(0.0)
        while not self._closed.wait(self._pause):
            now, position = time.monotonic(), self._position
            if position.count != count or position.what is None:
                count, since, told = position.count, now, False
            self._say(now - since)
            if position.what is None:
                continue
            if self._rank == 0 and not told and now - since > min(_TELL, self._seconds / 2):
                told = True
                print(f"\nstands still: {self._explanation(now - since)}", file=sys.stderr, flush=True)
            elif now - since > self._seconds:
                self._end(now - since)

    def _say(self, seconds: float) -> None:
        """Write this rank's status; a store that has ended, or is stopped, reads nothing."""
        self._beat += 1
        status = Status.of(self._position, self._rank, self._stage, self._replica, self._beat, seconds)
        try:
            self._store.set(str(self._rank), json.dumps(asdict(status)))
        except (RuntimeError, dist.DistError):
            return

    def _say_on(self, seconds: float) -> None:
        """For as long as it takes to see who is silent: this rank is not, whatever its training thread does."""
        for _ in range(2 * _SILENT):
            time.sleep(self._pause / 2)
            self._say(seconds)

    def _explanation(self, seconds: float) -> str:
        """Whom this rank waits for; of itself alone, if the store does not answer."""
        own = Status.of(self._position, self._rank, self._stage, self._replica, self._beat, seconds)
        try:
            before = self._read()
            self._say_on(seconds)
            statuses = self._read()
        except (RuntimeError, dist.DistError):
            return explain({self._rank: own}, set(), self._rank) + "; the job's store does not answer"
        silent = {rank for rank, status in statuses.items() if rank in before and status.beat == before[rank].beat}
        return explain({**statuses, self._rank: own}, silent - {self._rank}, self._rank)

    def _read(self) -> dict[int, Status]:
        keys = [key for key in map(str, range(self._world)) if self._store.check([key])]
        rows = self._store.multi_get(keys) if keys else []
        return {status.rank: status for status in (Status(**json.loads(row)) for row in rows)}

    def _end(self, seconds: float) -> None:
        """Speak, if no other rank has, and leave: the training thread can't be woken."""
        text = self._explanation(seconds)
        if not self._speaks_first():
            self._say_on(seconds)
        elif not self._closed.is_set():
            limit = f'the limit is "interlocking.watchdog_seconds": {self._seconds:g}'
            print(f"error: rank {self._rank}: nothing goes on: {text}; {limit}.", file=sys.stderr, flush=True)
        self._leave(1)
