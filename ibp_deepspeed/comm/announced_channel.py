"""Channels for NCCL, where a posted receive is a kernel that spins: messages are announced before they are received.

The sender announces a message on the host when it is computed; the receiver then gives memory and says "go"; only
then is either end posted. So a posted operation waits for nothing but the other end's background thread, and whatever
synchronises the device (the allocator's retry, a kernel that is loaded) waits for it a moment and not for a
computation that may need this rank first. What was never announced is never posted: after a change of width, or at the
end of a run, nothing stays behind. The first meeting of two ranks, which blocks a thread until both are there, happens
in these threads too.

The price is two host messages before each transfer, which the receiver's thread hides by receiving ``ahead`` messages
before they are asked for.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ibp_deepspeed.comm.link_groups import PATIENCE
from ibp_deepspeed.comm.message import META_LENGTH, Header, Memory, TensorSpec
from ibp_deepspeed.comm.sender import Sender, lost

_HEADER = 3
_END = -2  # in the place of a batch: nothing follows


@dataclass(frozen=True)
class Wire:
    """Where the messages of one channel travel.

    Attributes:
        data: the process group of the tensors.
        control: a gloo group that both ends are in, for announcements.
        peer: global rank of the other end.
        tag: of announcements; the next number is that of their answers.
        device: of the tensors.
    """

    data: dist.ProcessGroup
    control: dist.ProcessGroup
    peer: int
    tag: int
    device: torch.device


class AnnouncedSendChannel(Sender):
    """Messages to one neighbour, sent by a background thread when the neighbour is ready; the caller never waits.

    Args:
        wire: where they travel.
        memory: where messages live.
        name: for error messages.
    """

    def __init__(self, wire: Wire, memory: Memory, name: str) -> None:
        super().__init__(name)
        self.wire, self.memory = wire, memory
        self._waiting: queue.SimpleQueue[tuple[TensorSpec, Tensor, Header, Any] | None] = queue.SimpleQueue()
        self._undelivered = 0
        self._thread = threading.Thread(target=self._run, name=f"send {name}", daemon=True)
        self._thread.start()

    def send(self, spec: TensorSpec, tensor: Tensor, header: Header) -> None:
        """Overrides Sender's: into memory that waits for the neighbour."""
        self._raise_error()
        self._is_first(spec)
        payload = self.memory.new(tensor.numel(), tensor.dtype).view(tensor.shape)
        payload.copy_(tensor)
        with self._changed:
            self._undelivered += 1
        self._waiting.put((spec, payload, header, _mark(self.wire.device)))

    def _in_flight(self) -> int:
        return self._undelivered

    def close(self) -> None:
        """Say that nothing follows, behind what is on its way."""
        self._waiting.put(None)
        self._thread.join(PATIENCE)

    def _run(self) -> None:
        try:
            with _side_stream(self.wire.device):
                while (message := self._waiting.get()) is not None:
                    self._deliver(*message)
                    del message
                    with self._changed:
                        self._undelivered -= 1
                        self._changed.notify_all()
                self._announce([_END] + [0] * (_HEADER + META_LENGTH - 1))
        except Exception as error:
            self._fail(error)

    def _deliver(self, spec: TensorSpec, payload: Tensor, header: Header, computed: Any) -> None:
        self._announce([*header, *spec.encode().tolist()])
        dist.recv(torch.empty(1, dtype=torch.int64), self.wire.peer, group=self.wire.control, tag=self.wire.tag + 1)
        if computed is not None:
            torch.cuda.current_stream().wait_event(computed)
        _finish(dist.isend(payload, self.wire.peer, group=self.wire.data), self.wire.device)

    def _announce(self, words: list[int]) -> None:
        dist.send(torch.tensor(words), self.wire.peer, group=self.wire.control, tag=self.wire.tag)


class AnnouncedReceiveChannel:
    """Messages from one neighbour, in order, received by a background thread as they are announced.

    Args:
        wire: where they travel.
        memory: where messages live.
        name: for error messages.
        ahead: messages received before they are asked for.
    """

    def __init__(self, wire: Wire, memory: Memory, name: str, *, ahead: int) -> None:
        self.wire, self.memory, self.name = wire, memory, name
        self._places = threading.Semaphore(max(1, ahead))
        self._arrived: queue.SimpleQueue[tuple[Tensor, Header] | Exception] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"receive {name}", daemon=True)
        self._thread.start()

    def take(self) -> tuple[Tensor, Header]:
        """Wait for the next message.

        Returns:
            its payload, which the caller now owns, and its header.

        Raises:
            PeerLostError: the sender ended or the connection broke.
        """
        arrived = self._arrived.get()
        if isinstance(arrived, Exception):
            self._arrived.put(arrived)
            raise lost(self.name, arrived) from arrived
        self._places.release()
        payload, header = arrived
        if payload.is_cuda:
            payload.record_stream(torch.cuda.current_stream())  # its memory belongs to the thread's stream
        return payload, header

    def is_here(self) -> bool:
        """Whether :meth:`take` would return at once."""
        return not self._arrived.empty()

    def close(self) -> None:
        """Wait for the sender's word that nothing follows: a process must not end inside a receive."""
        self._places.release()
        self._thread.join(PATIENCE)

    def _run(self) -> None:
        try:
            with _side_stream(self.wire.device):
                while (message := self._receive()) is not None:
                    self._arrived.put(message)
                    del message
            self._arrived.put(EOFError("the sender has ended"))
        except Exception as error:
            self._arrived.put(error)

    def _receive(self) -> tuple[Tensor, Header] | None:
        words = torch.empty(_HEADER + META_LENGTH, dtype=torch.int64)
        self._places.acquire()
        dist.recv(words, self.wire.peer, group=self.wire.control, tag=self.wire.tag)
        if words[0] == _END:
            return None
        spec = TensorSpec.decode(words[_HEADER:])
        payload = self.memory.new(spec.payload_bytes // spec.dtype.itemsize, spec.dtype).view(spec.shape)
        dist.send(torch.ones(1, dtype=torch.int64), self.wire.peer, group=self.wire.control, tag=self.wire.tag + 1)
        _finish(dist.irecv(payload, self.wire.peer, group=self.wire.data), self.wire.device)
        batch, micro_batch, key = words[:_HEADER].tolist()
        return payload, (batch, micro_batch, key)


def _mark(device: torch.device) -> Any:
    """The moment at which what was computed so far is there; None where computing is waited for anyway."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record()
    return event


@contextmanager
def _side_stream(device: torch.device) -> Iterator[None]:
    """A thread's own stream, so that its operations wait for none of the computation's."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_device(device)
    with torch.cuda.stream(torch.cuda.Stream(device)):
        yield


def _finish(work: dist.Work | None, device: torch.device) -> None:
    """Block this thread until an operation is done; raises what went wrong with it."""
    assert work is not None
    work.wait()  # on CUDA the thread's stream waits, not the thread
    if device.type == "cuda":
        event = torch.cuda.Event(blocking=True)
        event.record()
        event.synchronize()
