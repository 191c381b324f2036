"""What every sending channel has: one shape of messages, a count of those on their way, and what went wrong."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod

from torch import Tensor

from ibp_deepspeed.comm.message import Header, TensorSpec
from ibp_deepspeed.errors import BoundaryError, InterlockingError, PeerLostError, first_line


class Sender(ABC):
    """Messages to one neighbour, delivered by a background thread that reports under ``_changed``.

    Args:
        name: for error messages, such as ``activations from stage 0 to stage 1``.

    Attributes:
        spec: shape and dtype of all messages; None before the first.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.spec: TensorSpec | None = None
        self._changed = threading.Condition()
        self._error: Exception | None = None

    @abstractmethod
    def send(self, spec: TensorSpec, tensor: Tensor, header: Header) -> None:
        """Copy ``tensor`` and have it sent; returns at once.

        Raises:
            BoundaryError: the shape or dtype differs from the first message's.
            PeerLostError: an earlier message could not be delivered.
        """

    @abstractmethod
    def close(self) -> None:
        """End the background thread behind what is on its way."""

    def wait_in_flight(self, at_most: int, timeout: float | None = None) -> bool:
        """Wait until no more than ``at_most`` messages are on their way; False if ``timeout`` seconds pass first.

        Raises:
            PeerLostError: a message could not be delivered.
        """
        with self._changed:
            done = self._changed.wait_for(lambda: self._in_flight() <= at_most or self._error is not None, timeout)
        self._raise_error()
        return done

    @abstractmethod
    def _in_flight(self) -> int:
        """Messages on their way; called under ``_changed``."""

    def _is_first(self, spec: TensorSpec) -> bool:
        """Whether this is the first message's, which all others then have to have; raises a BoundaryError."""
        if self.spec not in (None, spec):
            raise BoundaryError(
                f"{self.name} changed from {self.spec} to {spec}: every micro-batch needs the same shape, pad or "
                f"drop the odd one (drop_last=True of a DataLoader)."
            )
        first, self.spec = self.spec is None, spec
        return first

    def _fail(self, error: Exception) -> None:
        """In the background thread: nothing more will be delivered."""
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise lost(self.name, self._error) from self._error


def lost(name: str, error: Exception) -> InterlockingError:
    """What a channel says when its connection broke, the other end ended, or said what no end says."""
    if isinstance(error, BoundaryError):
        return BoundaryError(f"{name}: {error}")
    said = first_line(error).partition(". This is typically")[0]  # gloo guesses why, at length
    return PeerLostError(f"lost the connection for {name}: {said}")
