"""One-directional channels over gloo between neighbouring stages: receives posted ahead, sends that never block.

A boundary costs one message a micro-batch, and its header lets the receiver prove what it was given. Activations and
gradients have a process group each, so that neither can hold up the other.
"""

from __future__ import annotations

import threading
from collections import deque

import torch
import torch.distributed as dist
from torch import Tensor

from ibp_deepspeed.comm.message import META_LENGTH, Frame, Header, Memory, TensorSpec
from ibp_deepspeed.comm.sender import Sender, lost
from ibp_deepspeed.errors import BoundaryError

_SPARE_FRAMES = 2  # that a channel keeps for its next messages
_NOT_YET = -1  # in the header's last place until a message comes: neither a checksum nor a loss is negative


class SendChannel(Sender):
    """Messages to one neighbour, posted by the caller.

    A background thread waits for the messages in order, so that their memory serves the next ones as soon as they are
    received (or is given back, beyond what two messages need), and keeps the count that backpressure asks for.

    Args:
        group: process group of this direction alone.
        peer: global rank of the receiver.
        memory: where messages live.
        name: for error messages, such as ``activations from stage 0 to stage 1``.
        announce: whether the first message tells the receiver the shape.
    """

    def __init__(self, group: dist.ProcessGroup, peer: int, memory: Memory, name: str, *, announce: bool) -> None:
        super().__init__(name)
        self.group, self.peer, self.memory, self.announce = group, peer, memory, announce
        self._pending: deque[tuple[dist.Work, Tensor, Frame | None]] = deque()
        self._spare: list[Frame] = []
        self._closed = False
        self._thread: threading.Thread | None = None

    def send(self, spec: TensorSpec, tensor: Tensor, header: Header) -> None:
        """Overrides Sender's: into a message of its own, posted at once."""
        if self._is_first(spec) and self.announce:
            meta = self.memory.new(META_LENGTH, torch.int64)
            self._post(meta.copy_(spec.encode()))
        frame = self._spare.pop() if self._spare else spec.new_frame(self.memory)
        frame.payload.copy_(tensor)
        frame.header[:] = header
        self._post(frame.message, frame)

    def _in_flight(self) -> int:
        return len(self._pending)

    def close(self) -> None:
        """Let the background thread end once everything is delivered; wait for that if everything is."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            delivered = not self._pending
        if self._thread is not None and delivered:
            self._thread.join()

    def _post(self, message: Tensor, frame: Frame | None = None) -> None:
        self._raise_error()
        try:
            work = dist.isend(message, self.peer, group=self.group)
        except RuntimeError as error:
            raise lost(self.name, error) from error
        assert work is not None
        with self._changed:
            self._pending.append((work, message, frame))
            self._changed.notify_all()
        if self._thread is None:
            self._thread = threading.Thread(target=self._reap, name=f"reap {self.name}", daemon=True)
            self._thread.start()

    def _reap(self) -> None:
        """Wait for the oldest message, keep or drop its memory, tell whoever waits; until closed."""
        while True:
            with self._changed:
                while not self._pending and not self._closed:
                    self._changed.wait()
                if not self._pending:
                    return
                work, _, frame = self._pending[0]
            try:
                work.wait()
            except Exception as error:
                self._fail(error)
                return
            if frame is not None and len(self._spare) < _SPARE_FRAMES:
                self._spare.append(frame)
            del work, frame
            with self._changed:
                self._pending.popleft()
                self._changed.notify_all()


class ReceiveChannel:
    """Messages from one neighbour, in order; ``ahead`` receives are always posted.

    Args:
        group: process group of this direction alone.
        peer: global rank of the sender.
        memory: where messages live.
        name: for error messages.
        ahead: receives posted beyond the one in use.
        spec: shape of the messages; None waits for the sender's announcement.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        peer: int,
        memory: Memory,
        name: str,
        *,
        ahead: int,
        spec: TensorSpec | None = None,
    ) -> None:
        self.group, self.peer, self.memory, self.name, self.ahead = group, peer, memory, name, ahead
        self.spec = spec
        self._posted: deque[tuple[dist.Work, Frame]] = deque()
        self._spare: list[Frame] = []  # of staged messages, which nobody owns once they are copied
        if spec is not None:
            self._post_ahead(spec)

    def take(self) -> tuple[Tensor, Header]:
        """Wait for the next message.

        Returns:
            its payload, memory that the caller now owns, and its header.

        Raises:
            PeerLostError: the sender ended or the connection broke.
        """
        if self.spec is None:
            self.spec = self._receive_spec()
            self._post_ahead(self.spec)
        self._post(self.spec)
        work, frame = self._posted.popleft()
        self._wait(work)
        batch, micro_batch, key = frame.header.tolist()
        header = (batch, micro_batch, key)
        if not self.memory.staged:
            return frame.payload, header
        payload = self.memory.fetch(frame.payload)
        if len(self._spare) < _SPARE_FRAMES:
            self._spare.append(frame)
        return payload, header

    def is_here(self) -> bool:
        """Whether :meth:`take` would return at once (also if it has to wait for the first message's shape).

        gloo's Work knows that only once it was waited for, but bytes arrive in order, and the header is the last.
        """
        return not self._posted or bool(self._posted[0][1].header[-1] != _NOT_YET)

    def _receive_spec(self) -> TensorSpec:
        meta = self.memory.new(META_LENGTH, torch.int64)
        work = dist.irecv(meta, self.peer, group=self.group)
        assert work is not None
        self._wait(work)
        try:
            return TensorSpec.decode(meta.cpu())
        except BoundaryError as error:
            raise lost(self.name, error) from error

    def _post_ahead(self, spec: TensorSpec) -> None:
        while len(self._posted) < self.ahead:
            self._post(spec)

    def _post(self, spec: TensorSpec) -> None:
        frame = self._spare.pop() if self._spare else spec.new_frame(self.memory)
        frame.header[-1] = _NOT_YET
        try:
            work = dist.irecv(frame.message, self.peer, group=self.group)
        except RuntimeError as error:
            raise lost(self.name, error) from error
        assert work is not None
        self._posted.append((work, frame))

    def _wait(self, work: dist.Work) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            raise lost(self.name, error) from error
