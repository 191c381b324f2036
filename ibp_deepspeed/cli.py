"""How a script starts and ends: errors in one sentence on one rank, and no rank left behind."""

from __future__ import annotations

import argparse
import errno
import io
import logging
import os
import platform
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NoReturn

from ibp_deepspeed.errors import HostsError, InterlockingError, PeerLostError, first_line

if TYPE_CHECKING:
    import torch.distributed as dist

_SKEW_SECONDS = 20.0  # processes may start this far apart
_TURN_SECONDS = 2.0  # a launcher notices the end of a process within a second
_PEER_SECONDS = 4.0
_STORE_SECONDS = 5.0  # a store whose process is stopped never answers
_SPEAKERS = "ibp_speakers"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
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
    others give it time to, and the launcher time to end the job. A rank whose neighbour is gone speaks at once if
    that was killed without a word, and gives the launcher time to end the job otherwise. The exit code is then 1;
    nothing waits for lost messages. Any other exception is shown with its traceback.
    """
    phase = SameOnAllRanks()
    rank = int(os.environ.get("RANK", "0"))
    code = None
    try:
        code = main(phase)
    except PeerLostError as error:
        _end_without_peer(f"rank {rank}: {error}")
    except HostsError as error:  # all ranks know; one speaks on each host
        _wait(_TURN_SECONDS * min(int(os.environ.get("LOCAL_RANK", rank)), 10))
        _leave(f"error: {error}")
    except InterlockingError as error:
        turn = _SKEW_SECONDS * (rank > 0) if phase.holds else _TURN_SECONDS * min(rank, 10)
        _end(str(error) if phase.holds and rank == 0 else f"rank {rank}: {error}", turn)
    except KeyboardInterrupt:
        _leave("error: interrupted." if rank == 0 else "")
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _FULL:
            turn = _TURN_SECONDS * min(rank, 10)
            _end(f"rank {rank} can't write {error.filename or 'a file'}: {error.strerror}.", turn)
        if lost_connection(error):
            where = "".join(f", {note}" for note in getattr(error, "__notes__", []))
            _end_without_peer(f"rank {rank} lost another process: {first_line(error)}{where}")
        speaks_first()
        _leave(f"error: rank {rank} failed:\n{traceback.format_exc()}")
    sys.stdout.flush()
    sys.exit(code or 0)


def parser(description: str | None) -> argparse.ArgumentParser:
    """For a script's command line: its help as it is written, and options by their whole names alone, so that a new one
    never changes what an old command means."""
    raw = argparse.RawDescriptionHelpFormatter
    made = argparse.ArgumentParser(description=description, formatter_class=raw, allow_abbrev=False)
    made.add_argument("--version", action=_Versions, nargs=0, help="show the versions that results depend on, and stop")
    return made


class _Versions(argparse.Action):
    """Looked up when they are asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        of = {name: version(name) for name in ("ibp_deepspeed", "torch", "deepspeed", "transformers")}
        print(", ".join(f"{name} {found}" for name, found in of.items()) + f", Python {platform.python_version()}")
        parser.exit()


def quiet() -> None:
    """Keep from the user what nobody asked for; call it before deepspeed and transformers are imported.

    DeepSpeed says in each process that it found no GPU, and complains of its own learning-rate schedules; Hugging Face
    shows bars while it reads files that take no time.
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("DeepSpeed").addFilter(_is_asked_for)


def outlive_readers() -> None:
    """Go on when nobody reads the output any more: a launcher that is told to end, or a connection to its host, may go
    while a process still saves."""
    sys.stdout, sys.stderr = _lasting(sys.stdout), _lasting(sys.stderr)


class _Lasting(io.FileIO):
    """A file whose reader may end first: what is written then goes nowhere."""

    def write(self, data: Any) -> int:
        """Overrides FileIO's."""
        try:
            return super().write(data) or 0
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return len(data)


def _lasting(stream: Any) -> io.TextIOWrapper:
    stream.flush()
    file = io.BufferedWriter(_Lasting(stream.fileno(), "w", closefd=False))
    how = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
    return io.TextIOWrapper(file, encoding=stream.encoding, errors=stream.errors, **how)


def _is_asked_for(record: logging.LogRecord) -> bool:
    return not any(words in record.getMessage() for words in _UNASKED)


def lost_connection(error: Exception) -> bool:
    """Whether an exception of torch.distributed says that another process is gone."""
    if type(error).__name__ in ("DistNetworkError", "DistBackendError", "DistStoreError"):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and "gloo" in text and ("connection" in text or "timed out" in text)


def speaks_first(store: dist.Store | None = None) -> bool:
    """Whether no rank of this job has said yet why it ends; from now on, one has. True if the job's store is gone.

    Args:
        store: a connection of the caller's own to the job's store; None: torch.distributed's.
    """
    found: list[bool] = []

    def ask() -> None:
        try:
            found.append((store or _default_store()).add(_SPEAKERS, 1) == 1)
        except Exception:  # whatever a store says that has ended, or that there is none
            found.append(True)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_STORE_SECONDS)
    return not found or found[0]


def _default_store() -> dist.Store:
    """Without importing torch, which a script that fails early has not."""
    store: dist.Store = sys.modules["torch.distributed"].distributed_c10d._get_default_store()
    return store


def _end_without_peer(message: str) -> NoReturn:
    """The neighbour was killed without a word, or somebody has said why the job ends."""
    if speaks_first():
        _leave(f"error: {message}")
    _wait(_PEER_SECONDS)
    _leave(f"ends: {message}")


def _end(message: str, after: float) -> NoReturn:
    """Say what is wrong, unless another rank has by then."""
    _wait(after)
    _leave(f"error: {message}" if speaks_first() else f"ends: {message}")


def _wait(seconds: float) -> None:
    """For other ranks to speak, and the launcher to end this process: it may be one that finishes its batch after a
    signal (ibp_deepspeed/commands/training/interruption.py)."""
    if seconds:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        time.sleep(seconds)


def _leave(message: str) -> NoReturn:
    """At once: exit handlers would wait for neighbours that wait for this rank."""
    if message:
        print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)
