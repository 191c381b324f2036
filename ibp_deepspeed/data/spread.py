"""Samples spread evenly over a split, each once, in micro-batches of one shape."""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np

from ibp_deepspeed.data.sample_loader import Indices, MicroBatch
from ibp_deepspeed.data.share import Share
from ibp_deepspeed.errors import DataError

IGNORED = -100  # a label that does not count in the loss


class Spread(ABC):
    """The same micro-batches at every iteration, of one data-parallel rank, in the form of the loader's.

    The samples are number 0, n/m, 2n/m, … of the n that the split has. Which they are depends on their number alone,
    not on how they are batched. Where the last micro-batches are not full they are filled up with samples without
    labels that count.

    Args:
        available: n.
        share: whose part of each global micro-batch this is.
        samples: m, all ranks together; None, or more than there are: all.

    Raises:
        DataError: less than one sample is asked for.
    """

    def __init__(self, available: int, share: Share, samples: int | None) -> None:
        if samples is not None and samples < 1:
            raise DataError(f"an evaluation on {samples} samples: give 1 or more")
        self._share, self.available = share, available
        self.samples = available if samples is None else min(samples, available)
        self._ids = np.arange(self.samples, dtype=np.int64) * available // self.samples

    @abstractmethod
    def _take(self, ids: Indices) -> MicroBatch:
        """These samples."""

    def __len__(self) -> int:
        """Micro-batches of each rank."""
        return -(-self.samples // self._share.global_size)

    def __iter__(self) -> Iterator[MicroBatch]:
        for index in range(len(self)):
            yield self._micro_batch(self._ids[self._share.entries(index)])

    def _micro_batch(self, ids: Indices) -> MicroBatch:
        size = self._share.micro_batch_size
        missing = size - len(ids)
        found = self._take(np.append(ids, np.repeat(self._ids[:1], missing)))
        found[1][size - missing :] = IGNORED
        return found
