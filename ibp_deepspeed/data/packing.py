"""Documents packed into windows of one length: no document is cut that fits, and little is padded.

Ding et al. 2024, "Fewer Truncations Improve Language Modeling" (arXiv:2404.10830): best-fit-decreasing bin packing, in
time that grows with the documents, because lengths are small whole numbers.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Packing:
    """Windows of S positions; each has one or more pieces of documents one after the other, and the rest is padding.

    A piece of n positions is n + 1 tokens: n inputs, and n labels that follow them. So the last token of a document is
    a label alone, and no position would have to predict another document's first token. A document of more than S
    positions is divided into pieces of S and a rest, and none of its labels is lost.

    Attributes:
        length: S.
        starts: of the pieces, in the file of tokens. Shape [pieces], in the order of the windows.
        lengths: of the pieces in positions, 1 … S. Shape [pieces].
        firsts: window w has the pieces firsts[w] … firsts[w+1]-1. Shape [windows + 1].
    """

    length: int
    starts: Numbers
    lengths: Numbers
    firsts: Numbers

    @classmethod
    def of(cls, bounds: npt.NDArray[np.integer], length: int) -> Packing:
        """Pack documents.

        Args:
            bounds: document d is the tokens bounds[d] … bounds[d+1]-1.
            length: S.
        """
        starts, lengths = _pieces(np.asarray(bounds, dtype=np.int64), length)
        windows = best_fit(lengths, length)
        order = np.lexsort((starts, windows))
        starts, lengths, windows = starts[order], lengths[order], windows[order]
        firsts = np.flatnonzero(np.diff(windows, prepend=-1))
        counts = np.diff(np.append(firsts, len(windows)))
        # windows in the order of the file, so that samples spread over them are spread over the file
        by_file = np.argsort(starts[firsts], kind="stable")
        counts = counts[by_file]
        ends = np.cumsum(counts)
        pieces = np.arange(len(starts)) + np.repeat(firsts[by_file] - (ends - counts), counts)
        return cls(length, starts[pieces], lengths[pieces], np.append(0, ends).astype(np.int64))

    def __len__(self) -> int:
        """Windows."""
        return len(self.firsts) - 1

    @property
    def padding(self) -> float:
        """Share of all positions that is padding."""
        return 1 - int(self.lengths.sum()) / (len(self) * self.length) if len(self) else 0.0

    def filled(self, windows: Numbers) -> Numbers:
        """Positions of some windows that are no padding."""
        rows = zip(self.firsts[windows].tolist(), self.firsts[windows + 1].tolist(), strict=True)
        return np.array([self.lengths[first:end].sum() for first, end in rows], dtype=np.int64)


def best_fit(lengths: Numbers, capacity: int) -> Numbers:
    """The number of the bin of each item, by best-fit-decreasing.

    From the longest item on, each goes into the fullest bin that has room for it, or else into a new one. Items of one
    length are placed together: a bin that takes one of them is then the fullest, and takes all that it has room for.

    Args:
        lengths: of the items, 1 … capacity.
        capacity: of a bin.
    """
    order = np.argsort(-lengths, kind="stable")
    sizes, counts = np.unique(lengths, return_counts=True)
    bins = np.empty(len(lengths), dtype=np.int64)
    rooms = _Rooms()
    opened = placed = 0
    for size, count in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        items = order[placed : placed + count]
        placed += count
        while len(items):
            room, found = rooms.take(size)
            if not room:
                room = capacity
                found = np.arange(opened, opened - (-len(items) // (capacity // size)))
                opened += len(found)
            fit = room // size
            used, rest = found[: -(-len(items) // fit)], found[-(-len(items) // fit) :]
            now, items = items[: fit * len(used)], items[fit * len(used) :]
            bins[now] = np.repeat(used, fit)[: len(now)]
            full = len(now) // fit
            rooms.put(room, rest)
            rooms.put(room - fit * size, used[:full])
            rooms.put(room - (len(now) % fit) * size, used[full:])
    return bins


class _Rooms:
    """Bins by the room that is left in them."""

    def __init__(self) -> None:
        self._bins: dict[int, list[Numbers]] = {}
        self._sorted: list[int] = []

    def put(self, room: int, bins: Numbers) -> None:
        if room == 0 or not len(bins):
            return
        if room not in self._bins:
            self._bins[room] = []
            insort(self._sorted, room)
        self._bins[room].append(bins)

    def take(self, size: int) -> tuple[int, Numbers]:
        """The smallest room of at least this size, and all bins that have it; 0: there is none."""
        index = bisect_left(self._sorted, size)
        if index == len(self._sorted):
            return 0, np.empty(0, dtype=np.int64)
        room = self._sorted.pop(index)
        return room, np.concatenate(self._bins.pop(room))


def _pieces(bounds: Numbers, length: int) -> tuple[Numbers, Numbers]:
    """Where the pieces of all documents begin, and their positions; a document of one token has none."""
    positions = np.diff(bounds) - 1
    counts = -(-positions // length)
    ends = np.cumsum(counts)
    number = np.arange(int(counts.sum())) - np.repeat(ends - counts, counts)  # of a piece in its document
    starts = np.repeat(bounds[:-1], counts) + number * length
    return starts, np.minimum(np.repeat(positions, counts) - number * length, length)
