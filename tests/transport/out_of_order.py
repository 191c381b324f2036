"""gloo whose channels are late, each by its own chance: order holds within a channel and between none.

A channel is what one rank sends another in one process group under one tag. Some are fast, some are late now and then,
some always, drawn anew for each transport, so that messages overtake those of other channels that were sent long
before them. Nothing else promises an order across channels: neither gloo's sockets nor NCCL's streams.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor

_LATE = (0.0, 0.002, 0.02)  # seconds: the most that a channel holds a message, drawn for each channel

_isend, _send = dist.isend, dist.send


class Delays:
    """How long each message of a channel is held."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed)
        self._most = self._random.choice(_LATE)

    def __call__(self) -> float:
        """Seconds, none for half of the messages."""
        return self._random.choice((0.0, self._random.random())) * self._most


class Work:
    """What ``isend`` returns: done when the message is delivered; raises what went wrong with it."""

    def __init__(self) -> None:
        self._done = threading.Event()
        self._error: BaseException | None = None

    def wait(self, timeout: Any = None) -> bool:
        self._done.wait()
        if self._error is not None:
            raise self._error
        return True

    def is_completed(self) -> bool:
        return self._done.is_set()

    def run(self, send: Callable[[], Any]) -> None:
        try:
            send().wait()
        except BaseException as error:
            self._error = error
        self._done.set()


class _Channel:
    """Messages of one channel, one after the other, each held a while."""

    def __init__(self, delays: Delays) -> None:
        self._delays = delays
        self._posted: queue.SimpleQueue[tuple[Callable[[], Any], Work] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def post(self, send: Callable[[], Any]) -> Work:
        work = Work()
        self._posted.put((send, work))
        return work

    def end(self) -> None:
        """Behind what was posted."""
        self._posted.put(None)

    def _run(self) -> None:
        while (posted := self._posted.get()) is not None:
            send, work = posted
            time.sleep(self._delays())
            work.run(send)


class OutOfOrder:
    """The transport of one process.

    Args:
        seed: of all delays.
    """

    def __init__(self, seed: int) -> None:
        self._seed = f"{seed} {dist.get_rank()}"
        self._channels: dict[Any, _Channel] = {}

    @contextmanager
    def installed(self) -> Iterator[None]:
        """In the place of torch's sends; receives are posted as they are."""
        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(dist, "isend", self._isend))
            stack.enter_context(mock.patch.object(dist, "send", self._send))
            stack.callback(self._end)
            yield

    def _end(self) -> None:
        for channel in self._channels.values():
            channel.end()

    def _isend(self, tensor: Tensor, dst: int | None = None, group: Any = None, tag: int = 0, **kwargs: Any) -> Work:
        key = (group, dst, kwargs.get("group_dst"), tag)
        if key not in self._channels:
            self._channels[key] = _Channel(Delays(f"{self._seed} {len(self._channels)}"))
        return self._channels[key].post(lambda: _isend(tensor, dst, group, tag, **kwargs))

    def _send(self, *args: Any, **kwargs: Any) -> None:
        self._isend(*args, **kwargs).wait()
