"""An emulated latency: messages leave late, nobody is held up by it."""

from __future__ import annotations

import queue
import threading
import time
from typing import Any

from torch import Tensor

from ibp_deepspeed.comm.channel import SendChannel
from ibp_deepspeed.comm.message import Frame


class _Late:
    """Calls ``send(message)`` in order, each ``seconds`` after it was given."""

    def __init__(self, send: Any, seconds: float) -> None:
        self._send, self._seconds = send, seconds
        self._queue: queue.SimpleQueue[tuple[float, Any]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="late messages", daemon=True).start()

    def give(self, message: Any) -> None:
        self._queue.put((time.monotonic() + self._seconds, message))

    def _run(self) -> None:
        while True:
            due, message = self._queue.get()
            time.sleep(max(0.0, due - time.monotonic()))
            self._send(message)


class LateChannel(SendChannel):
    """A channel whose messages need that much longer (they count as on their way from the moment they leave)."""

    def __init__(self, channel: SendChannel, seconds: float) -> None:
        super().__init__(channel.group, channel.peer, channel.memory, channel.name, announce=channel.announce)
        post = super()._post
        self._late = _Late(lambda given: post(*given), seconds)

    def _post(self, message: Tensor, frame: Frame | None = None) -> None:
        self._late.give((message, frame))


def delay_engine(engine: Any, seconds: float) -> None:
    """Add a latency to all messages of one of our engines, before its first batch."""
    for name in ("down", "up"):
        channel = getattr(engine.links, name)
        if channel is not None:
            setattr(engine.links, name, LateChannel(channel, seconds))


def delay_deepspeed(seconds: float) -> None:
    """Add a latency to all messages of DeepSpeed's engines in this process; their senders don't wait for it."""
    from deepspeed.runtime.pipe import p2p

    send = p2p.send
    late: dict[int, _Late] = {}

    def send_late(tensor: Tensor, dest_stage: int, async_op: bool = False) -> None:
        if dest_stage not in late:
            late[dest_stage] = _Late(lambda message: send(message, dest_stage), seconds)
        late[dest_stage].give(tensor.detach().clone())

    p2p.send = send_late
