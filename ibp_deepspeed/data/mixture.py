"""A mixture of several sources by weights, in an order that is a function of the seed and the sample's number."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ibp_deepspeed.data.joined import Joined
from ibp_deepspeed.data.loader import MicroBatch, micro_batch
from ibp_deepspeed.data.samples import Indices
from ibp_deepspeed.data.share import Share, at_least
from ibp_deepspeed.data.token_file import TokenFile
from ibp_deepspeed.errors import DataError

BLOCK = 4096
"""Samples in which every source has its share, within one sample."""
_SOURCES = 1 << 32  # in the seeds of the order of the sources, where those of samples have a source's number


class MixtureLoader:
    """An endless iterator over micro-batches of one data-parallel rank, as a MicroBatchLoader of several sources.

    Samples are numbered on for ever, n = 0, 1, …; global micro-batch b is the samples b·B·R … of all R ranks. Of the
    samples before number BLOCK · j source s has ⌊BLOCK · j · w_s⌋ or one more, and inside a block they come in an order
    that the seed and the block decide. The samples of a source come epoch by epoch, each another permutation, whatever
    the other sources do: a small one is read again while a large one is not through.

    So sample n follows from the seed and n alone, on every stage, on any number of replicas, and when resumed. Sample
    ids are those of the sources joined, see `Joined`.

    Args:
        token_files, weights: of the sources; weights are shares, whatever their sum.
        names: of the sources, for reports.
        sequence_length, micro_batch_size: S and B.
        data_parallel_rank, data_parallel_size, seed, start, document_masks: as MicroBatchLoader's.

    Raises:
        DataError: other tokenizers, a source without a sample, a weight that is not positive or too small, or an
            argument out of range.
    """

    def __init__(
        self,
        token_files: Sequence[TokenFile],
        weights: Sequence[float],
        names: Sequence[str],
        sequence_length: int,
        micro_batch_size: int,
        *,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
        seed: int = 0,
        start: int = 0,
        document_masks: bool | None = None,
    ) -> None:
        at_least("sequence_length", sequence_length, 1)
        at_least("seed", seed, 0)
        at_least("start", start, 0)
        self._share = Share(micro_batch_size, data_parallel_rank, data_parallel_size)
        self.names, self.shares = list(names), shares_of(weights, names)
        self.samples = Joined(token_files, sequence_length, document_masks)
        self.samples.require(1, "a mixture")
        self._seed = seed
        self._next = start
        self._block: tuple[int, Indices, Indices] | None = None  # number, sources, and how many of each came before
        self._permutations: dict[int, tuple[int, Indices]] = {}  # of each source its epoch used last

    def __iter__(self) -> Iterator[MicroBatch]:
        return self

    def __next__(self) -> MicroBatch:
        found = micro_batch(self.samples, self._ids(self._share.entries(self._next)))
        self._next += 1
        return found

    def sample_ids(self, micro_batches_ago: int, count: int) -> list[int]:
        """As MicroBatchLoader's."""
        first, size = self._next - micro_batches_ago, self._share.global_size
        ids: list[int] = self._ids(slice(first * size, (first + count) * size)).tolist()
        return ids

    def drawn(self, micro_batches_ago: int, count: int) -> dict[str, int]:
        """Tokens (inputs that are no padding) of each source in these micro-batches of all ranks, as sample_ids."""
        ids = np.array(self.sample_ids(micro_batches_ago, count), dtype=np.int64)
        tokens = np.bincount(self.samples.part_of(ids), self.samples.filled(ids), minlength=len(self.names))
        return dict(zip(self.names, tokens.astype(int).tolist(), strict=True))

    def state_dict(self) -> dict[str, int]:
        """How many samples all data-parallel ranks together have used; there is one epoch without an end."""
        return {"epoch": 0, "samples": self._next * self._share.global_size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` says; samples that do not fill a global micro-batch are passed over.

        Raises DataError when the number of samples is missing or negative.
        """
        if not isinstance(state, dict) or type(state.get("samples")) is not int:
            raise DataError(f"the state of a mixture is {state!r:.60}, it has the number samples")
        at_least("samples", state["samples"], 0)
        self._next = -(-state["samples"] // self._share.global_size)

    def _ids(self, numbers: slice) -> Indices:
        """The ids of the samples of these numbers."""
        found = np.empty(numbers.stop - numbers.start, dtype=np.int64)
        for at, number in enumerate(range(numbers.start, numbers.stop)):
            sources, before = self._in_block(number // BLOCK)
            source, drawn = int(sources[number % BLOCK]), int(before[number % BLOCK])
            found[at] = self.samples.offsets[source] + self._sample(source, drawn)
        return found

    def _sample(self, source: int, drawn: int) -> int:
        """Of a source, behind so many that were drawn of it."""
        epoch, index = divmod(drawn, len(self.samples.parts[source]))
        if source not in self._permutations or self._permutations[source][0] != epoch:
            generator = np.random.Generator(np.random.PCG64([self._seed, source, epoch]))
            order = generator.permutation(len(self.samples.parts[source])).astype(np.int64, copy=False)
            self._permutations[source] = (epoch, order)
        return int(self._permutations[source][1][index])

    def _in_block(self, block: int) -> tuple[Indices, Indices]:
        """The source of each sample of a block, and how many samples of that source come before it."""
        if self._block is None or self._block[0] != block:
            begun, counts = self._begun(block), self._begun(block + 1) - self._begun(block)
            sources = np.repeat(np.arange(len(counts)), counts)
            np.random.Generator(np.random.PCG64([self._seed, _SOURCES, block])).shuffle(sources)
            before = np.empty(BLOCK, dtype=np.int64)
            for source, first in enumerate(begun):
                mine = np.flatnonzero(sources == source)
                before[mine] = first + np.arange(len(mine))
            self._block = (block, sources, before)
        return self._block[1], self._block[2]

    def _begun(self, block: int) -> Indices:
        """Samples of each source before a block: the whole numbers, and one more where the rest is largest."""
        exact = self.shares * (BLOCK * block)
        found = np.floor(exact).astype(np.int64)
        missing = BLOCK * block - int(found.sum())
        found[np.argsort(found - exact, kind="stable")[:missing]] += 1
        return found


def shares_of(weights: Sequence[float], names: Sequence[str]) -> np.ndarray:
    """Weights divided by their sum.

    Raises DataError when one is not positive, or a source would not come once in a block.
    """
    for name, weight in zip(names, weights, strict=True):
        if not 0 < weight < float("inf"):
            raise DataError(f"the weight of {name} is {weight}: give a positive number, or leave it out")
    shares = np.array(weights, dtype=np.float64) / sum(weights)
    if (shares * BLOCK < 1).any():
        name, share = names[int(shares.argmin())], shares.min()
        raise DataError(f"{name} has a share of {share:.2g} in the mixture: give it 1/{BLOCK} or more, or leave it out")
    return shares
