"""Micro-batches of samples, in an order that is a function of the seed and the micro-batch's index."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from ibp_deepspeed.data.share import Share, at_least
from ibp_deepspeed.errors import DataError

MicroBatch = tuple[torch.Tensor, ...]
"""Inputs, labels and sample ids [B], and position ids [B, S] where a row may hold several documents."""

Indices = npt.NDArray[np.int64]


class Countable(Protocol):
    """Samples of a split."""

    def __len__(self) -> int: ...

    def require(self, count: int, what: str, way: str = "") -> None:
        """Raises DataError when there are fewer than `count` samples, which `what` needs; `way` is one more way out."""
        ...


class SampleLoader(ABC):
    """An endless iterator over micro-batches (inputs, labels, sample ids) of one data-parallel rank, on the CPU.

    Each epoch is a new permutation of the samples (their own order when `shuffle` is False). Global
    micro-batch b of an epoch takes the b-th B * data_parallel_size entries of it, and each rank its own B of
    these; the entries that do not fill a last global micro-batch are left out in that epoch. The only state
    is the index of the next micro-batch, which counts on over the epochs: `start=n`, or load_state_dict of a
    loader that has yielded n, continues exactly as a loader that was never interrupted.

    Raises DataError when an argument is out of range or the data have less than one global micro-batch.
    """

    def __init__(self, samples: Countable, share: Share, *, seed: int, shuffle: bool, start: int) -> None:
        at_least("seed", seed, 0)
        at_least("start", start, 0)
        self._count, self._share, self._seed, self._shuffle = len(samples), share, seed, shuffle
        self._permutation: tuple[int, Indices] | None = None  # of the epoch used last
        self._next = start
        samples.require(share.global_size, "one micro-batch")

    @abstractmethod
    def _take(self, samples: Indices, epoch: int) -> MicroBatch:
        """These samples, as they come in an epoch."""

    @property
    def micro_batches_per_epoch(self) -> int:
        """How many micro-batches this rank (and every other) yields in one pass over the data."""
        return self._count // self._share.global_size

    def __iter__(self) -> Iterator[MicroBatch]:
        return self

    def __next__(self) -> MicroBatch:
        micro_batch = self._micro_batch(self._next)
        self._next += 1
        return micro_batch

    def held_out(self, max_micro_batches: int | None = None) -> Iterator[MicroBatch]:
        """One pass over the first epoch (or its first `max_micro_batches`), the same at every call.

        The position of the endless iterator does not move.
        """
        count = self.micro_batches_per_epoch
        if max_micro_batches is not None:
            count = min(count, max_micro_batches)
        return (self._micro_batch(index) for index in range(count))

    def sample_ids(self, micro_batches_ago: int, count: int) -> list[int]:
        """Ids of the samples of `count` micro-batches, those of all data-parallel ranks, in their order.

        The first is `micro_batches_ago` before the next one (1: the one yielded last). The position does not move.
        """
        ids: list[int] = []
        for index in range(self._next - micro_batches_ago, self._next - micro_batches_ago + count):
            epoch, global_micro_batch = divmod(index, self.micro_batches_per_epoch)
            first = global_micro_batch * self._share.global_size
            ids += self._order(epoch, slice(first, first + self._share.global_size)).tolist()
        return ids

    def state_dict(self) -> dict[str, int]:
        """The epoch, and how many of its samples all data-parallel ranks together have used."""
        epoch, global_micro_batch = divmod(self._next, self.micro_batches_per_epoch)
        return {"epoch": epoch, "samples": global_micro_batch * self._share.global_size}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues where `state_dict` says, also that of a loader with other micro-batch and data-parallel sizes.

        Samples that do not fill a global micro-batch of this loader are counted as one: they are passed over.

        Raises DataError when an entry is missing, no number or negative, or an epoch of these data has fewer samples.
        """
        names = ("epoch", "samples")
        if not isinstance(state, dict) or any(type(state.get(name)) is not int for name in names):
            raise DataError(f"the state of a loader is {state!r:.60}, it has the numbers {' and '.join(names)}")
        epoch, used = state["epoch"], state["samples"]
        at_least("epoch", epoch, 0)
        at_least("samples", used, 0)
        if used > self._count:
            raise DataError(
                f"the state says {used} samples of an epoch are used, these data have {self._count}: "
                "load it with the data and the sequence length that it was saved with"
            )
        # The last samples of an epoch may fill no micro-batch here: the next epoch follows.
        in_epoch = min(-(-used // self._share.global_size), self.micro_batches_per_epoch)
        self._next = epoch * self.micro_batches_per_epoch + in_epoch

    def _micro_batch(self, index: int) -> MicroBatch:
        epoch, global_micro_batch = divmod(index, self.micro_batches_per_epoch)
        return self._take(self._order(epoch, self._share.entries(global_micro_batch)), epoch)

    def _order(self, epoch: int, entries: slice) -> Indices:
        """Some entries of the epoch's order of samples."""
        if not self._shuffle:
            return np.arange(entries.start, entries.stop, dtype=np.int64)
        if self._permutation is None or self._permutation[0] != epoch:
            generator = np.random.Generator(np.random.PCG64([self._seed, epoch]))
            self._permutation = (epoch, generator.permutation(self._count).astype(np.int64, copy=False))
        return self._permutation[1][entries]
