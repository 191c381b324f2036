"""How long a stage waits for others, by what it waits for."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from ibp_deepspeed.measures import WAITING_FOR

T = TypeVar("T")


class Waits:
    """Seconds of the calling thread since the last :meth:`take`; two readings of a clock for each wait.

    Over NCCL a message counts as received when its transfer is done (announced_channel.py), so that these are waits for
    the other stage there too, and not for the kernels of this one.
    """

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(WAITING_FOR, 0.0)

    def during(self, cause: str, wait: Callable[[], T]) -> T:
        """What ``wait`` returns, its time counted under ``cause``, a key of ``measures.WAITING_FOR``."""
        began = time.perf_counter()
        result = wait()
        self._seconds[cause] += time.perf_counter() - began
        return result

    def take(self) -> dict[str, float]:
        """Cause → seconds, and begin again."""
        seconds, self._seconds = self._seconds, dict.fromkeys(self._seconds, 0.0)
        return seconds
