"""What one stage does with tensors that later stages sent some batches ago."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class LatePart(ABC):
    """One kind of them. Batches decide alone what is taken and used, not when messages arrive.

    Attributes:
        load_report: what the last :meth:`load` had to change, for the user; empty if nothing.
    """

    load_report: Sequence[str] = ()

    @abstractmethod
    def begin_batch(self, batch: int) -> None:
        """Take and send, or use, what the rule names for the beginning of ``batch`` (from 0).

        Raises:
            PeerLostError: it can't come any more.
        """

    @abstractmethod
    def save(self, folder: str, batch: int, checkpoint_engine: Any) -> None:
        """Write what is taken but not yet used before ``batch`` to a checkpoint."""

    @abstractmethod
    def settle(self, batch: int) -> None:
        """Wait until nothing is on its way, before another checkpoint than that of ``batch`` is loaded."""

    @abstractmethod
    def load(self, folder: str, batch: int, checkpoint_engine: Any, *, strict: bool = True) -> None:
        """Have what a run that resumes at ``batch`` needs, and nothing else, from a checkpoint.

        Args:
            folder: of the checkpoint.
            batch: the next one.
            checkpoint_engine: DeepSpeed's.
            strict: refuse a checkpoint that lacks something.

        Raises:
            InterlockingError: it does.
        """

    @abstractmethod
    def close(self, *, wait: bool) -> None:
        """End the background thread; ``wait`` until the stage that sends has no more to send."""


def on_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies that can be sent and kept while the tensors change."""
    contiguous = torch.contiguous_format
    return [tensor.detach().to("cpu", copy=True, memory_format=contiguous) for tensor in tensors]


def shapes(tensors: Sequence[Tensor]) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each, for stages to compare."""
    return [(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
