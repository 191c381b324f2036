"""Samples of prepared data: windows of a text, or the rows of dialogues. All have one length."""

from typing import Protocol

import numpy as np
import numpy.typing as npt

from ibp_deepspeed.data.spread import IGNORED
from ibp_deepspeed.data.token_file import COUNTS, FIRST, TokenFile
from ibp_deepspeed.errors import DataError

Indices = npt.NDArray[np.int64]


class Samples(Protocol):
    """Samples of S inputs and S labels each; what the loader needs of them."""

    def __len__(self) -> int: ...

    def take(self, indices: Indices) -> tuple[Indices, Indices]:
        """Inputs and labels of samples [B], each [B, S] of its own memory; labels[b, s] follows inputs[b, s]."""
        ...

    def require(self, count: int, what: str, way: str = "") -> None:
        """Raises DataError when there are fewer than `count` samples, which `what` needs; `way` is one more way out."""
        ...

    def remarks(self) -> list[str]:
        """Sentences on data that are left out or cut off."""
        ...


def samples_of(token_file: TokenFile, sequence_length: int) -> Samples:
    """The samples that a token file has at S = sequence_length: `Dialogues` if it has marks, otherwise `Windows`."""
    kind = Windows if token_file.marks is None else Dialogues
    return kind(token_file, sequence_length)


class Windows:
    """Sample i of a text is the window tokens[i*S : i*S + S + 1], with S = sequence_length."""

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
