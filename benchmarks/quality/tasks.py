"""What the models of the study learn: p-hop induction, or text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ibp_deepspeed.data import MicroBatchLoader, TokenFile, open_tokens

Batch = tuple[Tensor, Tensor]


class Task(Protocol):
    """Batches of token ids [B, S] and labels [B, S] (-100: not counted)."""

    @property
    def sequence_length(self) -> int:
        """S."""
        ...

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        ...

    def token_counts(self) -> Tensor:
        """How often each token occurs, about. [V]"""
        ...

    def batches(self, seed: int, size: int) -> Iterator[Batch]:
        """An endless iterator, the same for the same seed."""
        ...

    def held_out(self) -> list[Batch]:
        """The same held-out batches for all runs."""
        ...


@dataclass(frozen=True)
class HopTask:
    """p-hop induction: go p times from a token to the one after its previous occurrence.

    Random sequences; the label at i is the token where p hops from i end, and there is none where a hop finds no
    previous occurrence. One layer finds nothing but frequencies; one hop takes two layers that cooperate.
    """

    hops: int
    sequence_length: int = 32
    alphabet: int = 4

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        return self.alphabet

    def token_counts(self) -> Tensor:
        """All alike."""
        return torch.ones(self.alphabet, dtype=torch.int64)

    def batches(self, seed: int, size: int) -> Iterator[Batch]:
        """An endless iterator, the same for the same seed."""
        generator = torch.Generator().manual_seed(7919 * (seed + 1))
        while True:
            yield self._draw(size, generator)

    def held_out(self) -> list[Batch]:
        """512 sequences that no training draws."""
        return [self._draw(512, torch.Generator().manual_seed(1))]

    def _draw(self, size: int, generator: torch.Generator) -> Batch:
        tokens = torch.randint(self.alphabet, (size, self.sequence_length), generator=generator)
        previous = _previous_occurrence(tokens, self.alphabet)
        place = torch.arange(self.sequence_length).expand_as(tokens)
        found = torch.ones_like(tokens, dtype=torch.bool)
        for _ in range(self.hops):
            before = previous.gather(1, place)
            found &= before >= 0
            place = (before + 1).clamp(min=0)
        return tokens, tokens.gather(1, place).masked_fill(~found, -100)


def _previous_occurrence(tokens: Tensor, alphabet: int) -> Tensor:
    """Index of the last equal token before each one, -1 if there is none. [B, S]"""
    previous = torch.full_like(tokens, -1)
    latest = torch.full((tokens.shape[0], alphabet), -1, dtype=tokens.dtype)
    for i in range(tokens.shape[1]):
        column = tokens[:, i : i + 1]
        previous[:, i : i + 1] = latest.gather(1, column)
        latest.scatter_(1, column, i)
    return previous


@dataclass(frozen=True)
class TextTask:
    """Next tokens of prepared text (scripts/prepare_data.py), in windows that cross documents."""

    folder: str
    sequence_length: int = 128
    held_out_batches: int = 16

    @cached_property
    def vocabulary(self) -> int:
        """Number of tokens."""
        return self._tokens("train").manifest.vocabulary_size

    def token_counts(self) -> Tensor:
        """In the training text."""
        return torch.from_numpy(self._tokens("train").counts(self.vocabulary))

    def batches(self, seed: int, size: int) -> Iterator[Batch]:
        """An endless iterator, the same for the same seed."""
        return self._pairs(self._loader("train", size, seed=seed))

    def held_out(self) -> list[Batch]:
        """The first held-out windows."""
        return list(self._pairs(self._loader("heldout", 16, shuffle=False).held_out(self.held_out_batches)))

    def _loader(self, split: Any, size: int, **options: Any) -> MicroBatchLoader:
        return MicroBatchLoader(self._tokens(split), self.sequence_length, size, document_masks=False, **options)

    def _tokens(self, split: Any) -> TokenFile:
        return open_tokens(Path(self.folder), split, verify=False)

    @staticmethod
    def _pairs(rows: Iterator[tuple[Tensor, ...]]) -> Iterator[Batch]:
        return ((inputs, labels) for inputs, labels, _ in rows)
