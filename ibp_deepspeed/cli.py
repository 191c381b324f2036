"""How a script starts and ends: errors in one sentence on one rank, and no rank left behind."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

from ibp_deepspeed.errors import InterlockingError, PeerLostError, first_line

_SKEW_SECONDS = 20.0  # processes may start this far apart
_TURN_SECONDS = 2.0  # a launcher notices the end of a process within a second
_PEER_SECONDS = 4.0
_UNASKED = (
    "Setting accelerator to CPU",
    "Attempting to get learning rate from scheduler before it has started",
    "nobody reads",  # train_lm.py has said it, before the processes met
)


class SameOnAllRanks:
    """Whether an error now would be the same one on every rank: before the processes have met, it is."""

    def __init__(self) -> None:
        self.holds = True

    def ends(self) -> None:
        """From here on ranks do different things, and each speaks for itself."""
        self.holds = False


def run(main: Callable[[SameOnAllRanks], int | None]) -> NoReturn:
    """Run a script's ``main`` and end the process with the exit code that it returns, 0 if it returns none.

    An :class:`InterlockingError` becomes one sentence on stderr. If several ranks see it, the lowest speaks: the
    others give it time to, and the launcher time to end the job. So does a rank whose neighbour is gone. The exit
    code is then 1; nothing waits for lost messages. Any other exception is shown with its traceback.
    """
    phase = SameOnAllRanks()
    rank = int(os.environ.get("RANK", "0"))
    code = None
    try:
        code = main(phase)
    except PeerLostError as error:
        _end(f"error: rank {rank}: {error}", _PEER_SECONDS)
    except InterlockingError as error:
        turn = _SKEW_SECONDS * (rank > 0) if phase.holds else _TURN_SECONDS * min(rank, 10)
        _end(f"error: {error}" if phase.holds and rank == 0 else f"error: rank {rank}: {error}", turn)
    except KeyboardInterrupt:
        _end("error: interrupted." if rank == 0 else "")
    except Exception as error:
        if lost_connection(error):
            _end(f"error: rank {rank} lost another process: {first_line(error)}", _PEER_SECONDS)
        _end(f"error: rank {rank} failed:\n{traceback.format_exc()}")
    sys.stdout.flush()
    sys.exit(code or 0)


def parser(description: str | None) -> argparse.ArgumentParser:
    """For a script's command line: its help as it is written, and options by their whole names alone, so that a new one
    never changes what an old command means."""
    raw = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=description, formatter_class=raw, allow_abbrev=False)


def quiet() -> None:
    """Keep from the user what nobody asked for; call it before deepspeed and transformers are imported.

    DeepSpeed says in each process that it found no GPU, and complains of its own learning-rate schedules; Hugging Face
    shows bars while it reads files that take no time.
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("DeepSpeed").addFilter(_is_asked_for)


def _is_asked_for(record: logging.LogRecord) -> bool:
    return not any(words in record.getMessage() for words in _UNASKED)


def lost_connection(error: Exception) -> bool:
    """Whether an exception of torch.distributed says that another process is gone."""
    if type(error).__name__ in ("DistNetworkError", "DistBackendError", "DistStoreError"):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and "gloo" in text and ("connection" in text or "timed out" in text)


def _end(message: str, after: float = 0.0) -> NoReturn:
    """Leave at once: exit handlers would wait for neighbours that wait for this rank."""
    time.sleep(after)
    if message:
        print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)
