"""The samples of several token files as one sequence: those of the first, then those of the second, …"""

from collections.abc import Sequence

import numpy as np

from ibp_deepspeed.data.samples import Indices, Samples, samples_of
from ibp_deepspeed.data.token_file import TokenFile
from ibp_deepspeed.errors import DataError


class Joined:
    """Sample i of part p is sample offsets[p] + i. Parts may be texts and dialogues.

    Args:
        token_files: made with one tokenizer, see `check_same_tokenizer`.
        sequence_length: S.
        document_masks: of the texts among them, see `samples_of`.
    """

    def __init__(self, token_files: Sequence[TokenFile], sequence_length: int, document_masks: bool | None) -> None:
        check_same_tokenizer(token_files)
        self.parts: list[Samples] = [
            samples_of(file, sequence_length, document_masks if file.marks is None else None) for file in token_files
        ]
        self.offsets = np.cumsum([0, *map(len, self.parts)])
        self._length = sequence_length

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def take(self, indices: Indices) -> tuple[Indices, Indices]:
        inputs = np.empty((len(indices), self._length), dtype=np.int64)
        labels = np.empty_like(inputs)
        for samples, rows, own in self._by_part(indices):
            inputs[rows], labels[rows] = samples.take(own)
        return inputs, labels

    def positions(self, indices: Indices) -> Indices | None:
        found = np.tile(np.arange(self._length), (len(indices), 1))
        several = False
        for samples, rows, own in self._by_part(indices):
            positions = samples.positions(own)
            if positions is not None:
                found[rows], several = positions, True
        return found if several else None

    def filled(self, indices: Indices) -> Indices:
        found = np.empty(len(indices), dtype=np.int64)
        for samples, rows, own in self._by_part(indices):
            found[rows] = samples.filled(own)
        return found

    def require(self, count: int, what: str, way: str = "") -> None:
        for samples in self.parts:
            samples.require(1, what, way)
        if len(self) < count:
            raise DataError(
                f"the data have {len(self)} samples together, {what} needs {count}: prepare more, or lower the "
                f"micro-batch size{way}"
            )

    def remarks(self) -> list[str]:
        return [remark for samples in self.parts for remark in samples.remarks()]

    def part_of(self, indices: Indices) -> Indices:
        """The number of the part of each sample."""
        return np.searchsorted(self.offsets, indices, side="right") - 1

    def _by_part(self, indices: Indices) -> list[tuple[Samples, Indices, Indices]]:
        """Of each part that has some: its samples, their rows, and their numbers in it."""
        parts = self.part_of(indices)
        found = []
        for part, samples in enumerate(self.parts):
            rows = np.flatnonzero(parts == part)
            if len(rows):
                found.append((samples, rows, indices[rows] - self.offsets[part]))
        return found


def check_same_tokenizer(token_files: Sequence[TokenFile]) -> None:
    """Raises DataError when the same token ids mean other tokens in one of the files."""
    first, *others = token_files
    kept = (first.path.parent / first.manifest.tokenizer_file).read_bytes()
    for other in others:
        if (other.path.parent / other.manifest.tokenizer_file).read_bytes() != kept:
            raise DataError(
                f"{other.path.parent} was made with another tokenizer than {first.path.parent}: prepare it again with "
                f"--tokenizer {first.path.parent / 'tokenizer'}"
            )


def joined_entropy(token_files: Sequence[TokenFile]) -> float:
    """Unigram entropy in nats per held-out token, each under the frequencies of its own training text."""
    splits = [(file.manifest.heldout, file.manifest.unigram_entropy_nats) for file in token_files]
    tokens = [split.tokens if split.marks is None else split.marks.counted_tokens for split, _ in splits]
    return sum(n * entropy for n, (_, entropy) in zip(tokens, splits, strict=True)) / sum(tokens)
