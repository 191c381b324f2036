"""The documents of a micro-batch whose rows hold several, so that no token sees another document's.

Layers get hidden states alone, and so does what travels between stages. Every stage reads the data, so positions and
masks are made again where they are needed: who runs layers on a micro-batch says :func:`reading`, and a layer that
has to know asks :func:`at_hand`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(eq=False)
class Documents:
    """Where the documents of the rows are.

    Attributes:
        positions: of each token in its document, from 0; a document begins where the position is not one more than
            the one before. Shape [B, S], int64, on the stage's device.
        made: what layers have made of them, by a key of theirs; it goes with the micro-batch.
    """

    positions: Tensor
    made: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, positions: Tensor | None, device: torch.device) -> Documents | None:
        """None where every row is one document from its start on: then layers do as without documents.

        Args:
            positions: [B, S], still on the CPU, where looking at them holds up no device.
            device: where they go.
        """
        if positions is None:
            return None
        alone = torch.arange(positions.shape[1], device=positions.device).expand_as(positions)
        return None if torch.equal(positions, alone) else cls(positions.to(device))

    @cached_property
    def same(self) -> Tensor:
        """Whether two tokens of a row are of one document. Shape [B, 1, S, S], bool."""
        begins = torch.diff(self.positions, dim=-1) != 1
        numbers = torch.nn.functional.pad(begins.cumsum(-1), (1, 0))
        return (numbers[:, None, :, None] == numbers[:, None, None, :]).contiguous()


_AT_HAND: ContextVar[Documents | None] = ContextVar("documents at hand", default=None)


def at_hand() -> Documents | None:
    """Those of the micro-batch that layers are run on; None: each row is one document."""
    return _AT_HAND.get()


@contextmanager
def reading(documents: Documents | None) -> Iterator[None]:
    """Inside, layers are run on a micro-batch with these documents."""
    token = _AT_HAND.set(documents)
    try:
        yield
    finally:
        _AT_HAND.reset(token)
