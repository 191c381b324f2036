"""What an evaluation reads: samples spread evenly over a split, each once, in micro-batches of one shape."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from ibp_deepspeed.data.joined import Joined
from ibp_deepspeed.data.loader import micro_batch
from ibp_deepspeed.data.sample_loader import Indices, MicroBatch
from ibp_deepspeed.data.samples import PackedWindows, Samples, samples_of
from ibp_deepspeed.data.share import Share, at_least
from ibp_deepspeed.data.spread import IGNORED, Spread
from ibp_deepspeed.data.token_file import TokenFile


class HeldOut(Spread):
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
        share = Share(micro_batch_size, data_parallel_rank, data_parallel_size)
        self._samples: Samples
        if isinstance(token_file, TokenFile):
            self._samples = samples_of(token_file, sequence_length, document_masks)
        else:
            self._samples = Joined(token_file, sequence_length, document_masks)
        self._samples.require(1, "an evaluation", ", or hold more out: prepare_data.py --held-out-fraction")
        super().__init__(len(self._samples), share, samples)

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

    def _take(self, ids: Indices) -> MicroBatch:
        return micro_batch(self._samples, ids)
