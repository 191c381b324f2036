"""What an evaluation reads: spread over the split, each sample once, however it is batched."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ibp_deepspeed.data import DataError, HeldOut
from ibp_deepspeed.data.samples import IGNORED
from tests.prepared_data import UNHURRIED, token_file

LENGTH = 4


def held_out(tokens: int, size: int, ranks: int = 1, samples: int | None = None) -> list[HeldOut]:
    """Of each rank."""
    file = token_file(np.arange(tokens))
    return [
        HeldOut(file, LENGTH, size, data_parallel_rank=rank, data_parallel_size=ranks, samples=samples)
        for rank in range(ranks)
    ]


def counted(parts: list[HeldOut]) -> list[int]:
    """The ids of samples whose labels count, over all ranks."""
    rows = [row for part in parts for row in part]
    return sorted(int(i) for _, labels, ids in rows for i, label in zip(ids, labels, strict=True) if (label >= 0).all())


@given(tokens=st.integers(LENGTH + 1, 200), size=st.integers(1, 5), ranks=st.integers(1, 3), data=st.data())
@UNHURRIED
def test_every_sample_counts_once(tokens: int, size: int, ranks: int, data: st.DataObject) -> None:
    available = (tokens - 1) // LENGTH
    samples = data.draw(st.none() | st.integers(1, available + 3))
    parts = held_out(tokens, size, ranks, samples)
    want = min(available if samples is None else samples, available)
    ids = counted(parts)
    assert ids == sorted(set(ids)) and len(ids) == want == parts[0].samples
    assert parts[0].tokens == want * LENGTH
    assert len({len(list(part)) for part in parts} | {len(part) for part in parts}) == 1, "all ranks take as many steps"
    gaps = np.diff([*ids, available + ids[0]])
    assert gaps.max() - gaps.min() <= 1, "evenly spread"
    for part in parts:
        assert all(inputs.shape == labels.shape == (size, LENGTH) for inputs, labels, _ in part), "one shape"


def test_the_sample_does_not_depend_on_how_it_is_batched() -> None:
    assert counted(held_out(100, 2, 2, 8)) == counted(held_out(100, 5, 1, 8)) == [i * 24 // 8 for i in range(8)]


def test_filled_up_samples_do_not_count() -> None:
    [part] = held_out(3 * LENGTH + 1, 2)
    *_, (inputs, labels, _) = part
    assert (labels[0] >= 0).all() and (labels[1] == IGNORED).all() and inputs.shape == (2, LENGTH)


def test_it_says_how_much_it_reads() -> None:
    assert held_out(101, 2, samples=5)[0].describe() == "5 of 25 samples spread over the split, 20 tokens"
    assert held_out(101, 2)[0].describe() == "all 25 samples, 100 tokens"


def test_nothing_to_read_is_refused() -> None:
    with pytest.raises(DataError, match="on 0 samples: give 1 or more"):
        held_out(101, 2, samples=0)
    with pytest.raises(DataError, match="an evaluation needs 5"):
        held_out(LENGTH, 2)


@pytest.mark.parametrize(
    ("length", "size", "rank", "ranks", "message"),
    [
        (0, 2, 0, 1, "sequence_length is 0: give 1 or more"),
        (LENGTH, 0, 0, 1, "micro_batch_size is 0: give 1 or more"),
        (LENGTH, 2, 0, 0, "data_parallel_size is 0: give 1 or more"),
        (LENGTH, 2, 3, 3, "data_parallel_rank is 3 of data_parallel_size 3: give a rank from 0 to 2"),
    ],
)
def test_arguments_out_of_range_are_named(length: int, size: int, rank: int, ranks: int, message: str) -> None:
    """As by the loader."""
    with pytest.raises(DataError, match=message):
        HeldOut(token_file(np.arange(30)), length, size, data_parallel_rank=rank, data_parallel_size=ranks)
