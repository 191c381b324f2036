"""How a script starts and ends: errors in one sentence on one rank, and no rank left behind."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

from ibp_deepspeed.errors import InterlockingError, PeerLostError

_GRACE_SECONDS = 20.0


class SameOnAllRanks:
    """Whether an error now would be the same one on every rank: before the processes have met, it is."""

    def __init__(self) -> None:
        self.holds = True

    def ends(self) -> None:
        """From here on ranks do different things, and each speaks for itself."""
        self.holds = False


def run(main: Callable[[SameOnAllRanks], None]) -> NoReturn:
    """Run a script's ``main`` and end the process.

    An :class:`InterlockingError` becomes one sentence on stderr: on rank 0 if all ranks see the same error, else on the
    rank that saw it. A rank whose neighbour is gone, or that sees what rank 0 reports, gives the other one time
    to speak and the launcher time to end the job. The exit code is then 1; nothing waits for lost messages.
    """
    phase = SameOnAllRanks()
    rank = int(os.environ.get("RANK", "0"))
    try:
        main(phase)
    except PeerLostError as error:
        time.sleep(_GRACE_SECONDS)
        _end(f"error: rank {rank}: {error}")
    except InterlockingError as error:
        if phase.holds and rank != 0:
            time.sleep(_GRACE_SECONDS)
            _end("")
        _end(f"error: {error}" if phase.holds else f"error: rank {rank}: {error}")
    except KeyboardInterrupt:
        _end("error: interrupted." if rank == 0 else "")
    except Exception:
        _end(f"error: rank {rank} failed:\n{traceback.format_exc()}")
    sys.stdout.flush()
    sys.exit(0)


def _end(message: str) -> NoReturn:
    """Leave at once: exit handlers would wait for neighbours that wait for this rank."""
    if message:
        print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)
