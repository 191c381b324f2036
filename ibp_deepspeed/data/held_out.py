"""What an evaluation reads: samples spread evenly over a split, each once, in micro-batches of one shape."""

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ibp_deepspeed.data.joined import Joined
from ibp_deepspeed.data.loader import MicroBatch, micro_batch
from ibp_deepspeed.data.samples import IGNORED, PackedWindows, Samples, samples_of
from ibp_deepspeed.data.share import Share, at_least
from ibp_deepspeed.data.token_file import TokenFile
from ibp_deepspeed.errors import DataError


class HeldOut:
    """The same micro-batches at every iteration, of one data-parallel rank, in the form of the loader's.

    The samples are number 0, n/m, 2n/m, … of the n that the split has, so that no odd document decides.
    Which they are depends on their number alone, not on how they are batched: with a loss that weights micro-batches by
    the labels that count in them, evaluations of other batch sizes and numbers of ranks give the same means. Where
    the last micro-batches are not full they are filled up with samples without labels that count.

    Args:
        token_file: the split, or those of several sources made with one tokenizer, which are joined.
        sequence_length: S.
        micro_batch_size: B.
        data_parallel_rank, data_parallel_size: whose part of each global micro-batch this is.
        samples: how many, all ranks together; None, or more than there are: all.
        document_masks: whether documents are kept apart, see MicroBatchLoader.

    Raises:
        DataError: there is none, or an argument is out of range.
    """

    def __init__(
        self,
        token_file: TokenFile | Sequence[TokenFile],
        sequence_length: int,
        micro_batch_size: int,
        *,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
        samples: int | None = None,
        document_masks: bool | None = None,
    ) -> None:
        at_least("sequence_length", sequence_length, 1)
        if samples is not None and samples < 1:
            raise DataError(f"an evaluation on {samples} samples: give 1 or more")
        self._share = Share(micro_batch_size, data_parallel_rank, data_parallel_size)
        self._samples: Samples
        if isinstance(token_file, TokenFile):
            self._samples = samples_of(token_file, sequence_length, document_masks)
        else:
            self._samples = Joined(token_file, sequence_length, document_masks)
        self._samples.require(1, "an evaluation", ", or hold more out: prepare_data.py --held-out-fraction")
        self.available = len(self._samples)
        self.samples = self.available if samples is None else min(samples, self.available)
        self._ids = np.arange(self.samples, dtype=np.int64) * self.available // self.samples

    def __len__(self) -> int:
        """Micro-batches of each rank."""
        return -(-self.samples // self._share.global_size)

    def __iter__(self) -> Iterator[MicroBatch]:
        for index in range(len(self)):
            yield self._micro_batch(self._ids[self._share.entries(index)])

    @cached_property
    def tokens(self) -> int:
        """Labels that count, in the micro-batches of all ranks."""
        chunks = np.array_split(self._ids, max(1, self.samples // 1024))
        return sum(int((self._samples.take(chunk)[1] != IGNORED).sum()) for chunk in chunks)

    def remarks(self) -> list[str]:
        """Sentences on data that are left out or cut off."""
        return self._samples.remarks()

    def describe(self) -> str:
        """How much of the split that is, in words."""
        part = "all" if self.samples == self.available else f"{self.samples:,} of"
        spread = "" if self.samples == self.available else " spread over the split"
        parts = self._samples.parts if isinstance(self._samples, Joined) else [self._samples]
        apart = ", documents apart" if any(isinstance(part, PackedWindows) for part in parts) else ""
        return f"{part} {self.available:,} samples{spread}, {self.tokens:,} tokens{apart}"

    def _micro_batch(self, ids: npt.NDArray[np.int64]) -> MicroBatch:
        size = self._share.micro_batch_size
        missing = size - len(ids)
        ids = np.append(ids, np.repeat(self._ids[:1], missing))
        found = micro_batch(self._samples, ids)
        found[1][size - missing :] = IGNORED
        return found
