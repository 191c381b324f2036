"""Ctrl-C, SIGTERM, the end of the launcher: the batch is finished and saved; a second signal, or the end of patience,
ends at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType

EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: what was interrupted and saved, and goes on with --resume."""
_ONE = 3.0
"""Seconds within which signals are one: a terminal and a launcher both pass a Ctrl-C on."""


class Interruption:
    """Of one process; listens from its making on.

    A thread reads what Python writes into a pipe when a signal comes (``signal.set_wakeup_fd``), because the training
    thread may be waiting for a message, where no Python code runs.

    Args:
        grace: seconds between the first signal and the end of the process, whatever it does.
        speaks: whether this process says what happens.
    """

    def __init__(self, grace: float, *, speaks: bool) -> None:
        self._grace, self._speaks = grace, speaks
        self._first, self._is_saved = 0.0, False
        self.asked = False
        """Whether training is to end after a batch."""
        self._read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _nothing)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def _listen(self) -> None:
        while True:
            for number in os.read(self._read, 64):
                if number in (signal.SIGINT, signal.SIGTERM):
                    self._heard(signal.Signals(number).name)

    def ask(self, why: str) -> None:
        """Have the training end after a batch, as a first signal does; nothing if that was asked for already.

        Args:
            why: what is said of it.
        """
        if self.asked or self._is_saved:
            return
        self._first, self.asked = time.monotonic(), True
        self._say(f"{why}: finishes the batch and saves it, within {self._grace:g} s; once more ends at once")
        timer = threading.Timer(self._grace, self._lose_patience)
        timer.daemon = True
        timer.start()

    def saved(self) -> None:
        """All batches are trained, or the last one before the end: what is left to do is short, and no signal ends it.

        A launcher sends them as soon as the first rank has ended, when another may still write the page of the run.
        """
        self._is_saved = True

    def _lose_patience(self) -> None:
        if not self._is_saved:
            self._leave(f"not saved within --grace-seconds {self._grace:g}")

    def _heard(self, name: str) -> None:
        if self._is_saved:
            return
        if self.asked and time.monotonic() - self._first >= _ONE:
            self._leave(f"{name} again: ends at once")
        self.ask(name)

    def _say(self, text: str) -> None:
        if self._speaks:
            print(f"\n{text}", file=sys.stderr, flush=True)

    def _leave(self, text: str) -> None:
        self._say(f"error: {text}.")
        os._exit(1)


def _nothing(number: int, frame: FrameType | None) -> None:
    """The thread does it."""
