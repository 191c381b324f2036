"""A micro-batch on its way through the layers of a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ibp_deepspeed.batches import position_ids
from ibp_deepspeed.documents import Documents, reading


@dataclass(eq=False)
class Passage:
    """Hidden states, first of all tokens, with what goes with them.

    Attributes:
        hidden: tokens [B, S], behind the first layer hidden states [B, S, H].
        labels: the tokens that follow. Shape [B, S].
        documents: of the rows; None: each is one.
    """

    hidden: Tensor
    labels: Tensor
    documents: Documents | None

    @classmethod
    def of(cls, micro_batch: tuple[Tensor, ...], device: torch.device) -> Passage:
        """The start of a micro-batch."""
        documents = Documents.of(position_ids(micro_batch), device)
        return cls(micro_batch[0].to(device), micro_batch[1].to(device), documents)

    @property
    def tokens(self) -> int:
        """B x S."""
        return self.labels.numel()

    @property
    def bytes(self) -> int:
        """Of what goes along with hidden states."""
        positions = 0 if self.documents is None else self.documents.positions.nbytes
        return self.labels.nbytes + positions

    def run(self, part: Callable[[Tensor], Any]) -> Any:
        """What a layer or a head makes of it."""
        with reading(self.documents):
            return part(self.hidden)

    def forget_masks(self) -> None:
        """What layers have made of the documents; it is larger than hidden states, and is made again when asked for."""
        if self.documents is not None:
            self.documents = Documents(self.documents.positions)
