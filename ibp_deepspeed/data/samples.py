"""Samples of prepared data: windows of a text, with its documents apart or not, or the rows of dialogues."""

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ibp_deepspeed.data.packing import Packing
from ibp_deepspeed.data.spread import IGNORED
from ibp_deepspeed.data.token_file import COUNTS, FIRST, TokenFile
from ibp_deepspeed.errors import DataError

_NO_BOUNDS = "was prepared by an earlier version, without the bounds of its documents"

Indices = npt.NDArray[np.int64]


class Samples(Protocol):
    """Samples of S inputs and S labels each; what the loader needs of them."""

    def __len__(self) -> int: ...

    def take(self, indices: Indices) -> tuple[Indices, Indices]:
        """Inputs and labels of samples [B], each [B, S] of its own memory; labels[b, s] follows inputs[b, s]."""
        ...

    def positions(self, indices: Indices) -> Indices | None:
        """Positions of the inputs in their documents, [B, S], where a sample may have several; None: it has one."""
        ...

    def filled(self, indices: Indices) -> Indices:
        """How many inputs of each sample are no padding, [B]."""
        ...

    def require(self, count: int, what: str, way: str = "") -> None:
        """Raises DataError when there are fewer than `count` samples, which `what` needs; `way` is one more way out."""
        ...

    def remarks(self) -> list[str]:
        """Sentences on data that are left out or cut off."""
        ...


def keeps_documents_apart(token_file: TokenFile, wanted: bool | None = None) -> bool:
    """Whether windows of a text are packed with whole documents that don't see each other.

    Args:
        token_file: with bounds of documents, or from an earlier version, or of dialogues, which have a row a sample.
        wanted: None: if there are bounds.

    Raises:
        DataError: it is wanted and can't be.
    """
    if wanted and token_file.bounds is None:
        why = "holds dialogues, of which each is a sample" if token_file.marks is not None else _NO_BOUNDS
        raise DataError(f"{token_file.path} {why}: leave --document-masks out, or prepare text again")
    return token_file.bounds is not None and wanted is not False


def samples_of(token_file: TokenFile, sequence_length: int, document_masks: bool | None = None) -> Samples:
    """The samples that a token file has at S = sequence_length.

    `Dialogues` if it has marks, else `PackedWindows` or `Windows`, see `keeps_documents_apart`.
    """
    if keeps_documents_apart(token_file, document_masks):
        return PackedWindows(token_file, sequence_length)
    return Windows(token_file, sequence_length) if token_file.marks is None else Dialogues(token_file, sequence_length)


class PackedWindows:
    """Sample i of a text is window i of its `Packing`: pieces of documents, each with positions from 0, and padding.

    Padding is on the right and has no label. It goes on with the positions of the last piece, whose tokens don't see
    what comes after them, so that a window of one document needs no mask.

    In training a loss is a mean over the labels of its micro-batch, and all micro-batches weigh the same.
    """

    def __init__(self, token_file: TokenFile, sequence_length: int) -> None:
        assert token_file.bounds is not None
        self._path = token_file.path
        self._tokens = token_file.tokens
        self._eos_id = token_file.manifest.eos_id
        self._length = sequence_length
        self.packing = Packing.of(token_file.bounds, sequence_length)

    def __len__(self) -> int:
        return len(self.packing)

    def take(self, indices: Indices) -> tuple[Indices, Indices]:
        inputs = np.full((len(indices), self._length), self._eos_id, dtype=np.int64)
        labels = np.full_like(inputs, IGNORED)
        for row, at, start, length in self._pieces(indices):
            tokens = self._tokens[start : start + length + 1]
            inputs[row, at : at + length] = tokens[:-1]
            labels[row, at : at + length] = tokens[1:]
        return inputs, labels

    def positions(self, indices: Indices) -> Indices:
        found = np.tile(np.arange(self._length), (len(indices), 1))
        for row, at, _, _ in self._pieces(indices):
            found[row, at:] = np.arange(self._length - at)
        return found

    def filled(self, indices: Indices) -> Indices:
        return self.packing.filled(indices)

    def require(self, count: int, what: str, way: str = "") -> None:
        if len(self) < count:
            raise DataError(
                f"{self._path} has {len(self._tokens)} tokens, packed into {len(self)} windows of {self._length}, "
                f"{what} needs {count}: prepare more text, or lower the sequence length or the micro-batch size{way}"
            )

    def remarks(self) -> list[str]:
        return [
            f"{self._path}: documents are packed into {len(self):,} windows of {self._length}, padding is "
            f"{self.packing.padding:.2%}"
        ]

    def _pieces(self, indices: Indices) -> Iterator[tuple[int, int, int, int]]:
        """Row, where it stands in the window, where it begins in the file, and positions, of all pieces."""
        packing = self.packing
        for row, window in enumerate(indices):
            pieces, at = slice(packing.firsts[window], packing.firsts[window + 1]), 0
            for start, length in zip(packing.starts[pieces].tolist(), packing.lengths[pieces].tolist(), strict=True):
                yield row, at, start, length
                at += length


class Windows:
    """Sample i of a text is the window tokens[i*S : i*S + S + 1], S = sequence_length, whatever ends in it."""

    def __init__(self, token_file: TokenFile, sequence_length: int) -> None:
        self._path = token_file.path
        self._tokens = token_file.tokens
        self._length = sequence_length

    def __len__(self) -> int:
        return max(len(self._tokens) - 1, 0) // self._length

    def take(self, indices: Indices) -> tuple[Indices, Indices]:
        span = self._length
        windows = np.stack([self._tokens[i * span : i * span + span + 1] for i in indices]).astype(np.int64)
        # Copies, because slices of one array would share memory and not be contiguous.
        return windows[:, :-1].copy(), windows[:, 1:].copy()

    def positions(self, indices: Indices) -> None:
        return None

    def filled(self, indices: Indices) -> Indices:
        return np.full(len(indices), self._length, dtype=np.int64)

    def require(self, count: int, what: str, way: str = "") -> None:
        if len(self) < count:
            raise DataError(
                f"{self._path} has {len(self._tokens)} tokens, {what} needs {count * self._length + 1} for {count} "
                f"windows of {self._length}: prepare more text, or lower the sequence length or the micro-batch "
                f"size{way}"
            )

    def remarks(self) -> list[str]:
        return []


class Dialogues:
    """A sample is one row: S = sequence_length inputs, and labels at the tokens that count, -100 elsewhere.

    A row is padded on its right with the manifest's eos_id, or cut off, to S + 1 tokens. Rows of which no token
    that counts is among these are not samples.

    Padding on the right needs neither an attention mask nor position ids: a causal model's output at a position
    does not depend on what comes after it, and positions count from the left. So at every token of the row it is
    what Hugging Face computes with `attention_mask` and `position_ids`, and padding has no label.

    In training a loss is a mean over the labels of its micro-batch, and all micro-batches weigh the same.

    Attributes:
        left_out: rows that are not samples, because no token of a response is among their first S + 1.
        cut: samples whose rows are longer than S + 1 tokens.
    """

    def __init__(self, token_file: TokenFile, sequence_length: int) -> None:
        assert token_file.marks is not None
        self._path = token_file.path
        self._tokens, self._marks = token_file.tokens, token_file.marks
        self._eos_id = token_file.manifest.eos_id
        self._length = sequence_length
        starts = np.flatnonzero(self._marks & FIRST)
        ends = np.append(starts[1:], len(self._tokens))
        counted = np.append(np.flatnonzero(self._marks & COUNTS), len(self._tokens))
        first_counted = counted[np.searchsorted(counted, starts, side="right")]
        kept = first_counted < np.minimum(ends, starts + sequence_length + 1)
        self._starts, self._ends = starts[kept], ends[kept]
        self.left_out = int(len(starts) - kept.sum())
        self.cut = int((self._ends - self._starts > sequence_length + 1).sum())

    def __len__(self) -> int:
        return len(self._starts)

    def take(self, indices: Indices) -> tuple[Indices, Indices]:
        inputs = np.full((len(indices), self._length), self._eos_id, dtype=np.int64)
        labels = np.full_like(inputs, IGNORED)
        for row, sample in enumerate(indices):
            start = self._starts[sample]
            end = min(self._ends[sample], start + self._length + 1)
            tokens = self._tokens[start:end].astype(np.int64)
            inputs[row, : len(tokens)] = tokens[: self._length]
            counts = self._marks[start + 1 : end] & COUNTS != 0
            labels[row, : len(tokens) - 1] = np.where(counts, tokens[1:], IGNORED)
        return inputs, labels

    def positions(self, indices: Indices) -> None:
        return None

    def filled(self, indices: Indices) -> Indices:
        return np.minimum(self._ends[indices] - self._starts[indices], self._length)

    def require(self, count: int, what: str, way: str = "") -> None:
        if len(self) < count:
            raise DataError(
                f"{self._path} has {len(self)} rows with a response in their first {self._length + 1} tokens, {what} "
                f"needs {count}: prepare more rows, raise the sequence length, or lower the micro-batch size{way}"
            )

    def remarks(self) -> list[str]:
        if not self.left_out + self.cut:
            return []
        return [
            f"{self._path}: {self.left_out} of {self.left_out + len(self)} rows left out, no token of a response is "
            f"among their first {self._length + 1}; {self.cut} cut off there"
        ]
