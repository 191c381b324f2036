"""The loader of micro-batches."""

import json
import math
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ibp_deepspeed.data import MicroBatchLoader
from ibp_deepspeed.errors import DataError
from tests.prepared_data import UNHURRIED, token_file


def _same(one: Any, two: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@st.composite
def _shapes(draw: st.DrawFn) -> dict[str, int]:
    """A loader's shape and a token count of at least one global micro-batch."""
    shape = {name: draw(st.integers(1, 4)) for name in ("sequence_length", "micro_batch_size", "data_parallel_size")}
    smallest = math.prod(shape.values()) + 1
    return {**shape, "tokens": draw(st.integers(smallest, smallest + 120)), "seed": draw(st.integers(0, 3))}


def _ranks(shape: dict[str, Any], **options: Any) -> list[MicroBatchLoader]:
    shape = dict(shape)
    data = token_file(np.arange(shape.pop("tokens")))
    ranks = range(shape["data_parallel_size"])
    return [MicroBatchLoader(data, data_parallel_rank=rank, **shape, **options) for rank in ranks]


@given(_shapes(), st.booleans())
@UNHURRIED
def test_micro_batch_holds_the_windows_of_its_samples(shape: dict[str, int], shuffle: bool) -> None:
    loader = _ranks(shape, shuffle=shuffle)[-1]
    length, size = shape["sequence_length"], shape["micro_batch_size"]
    for inputs, labels, samples in islice(loader, 2 * loader.micro_batches_per_epoch):
        assert inputs.shape == labels.shape == (size, length) and samples.shape == (size,)
        assert {inputs.dtype, labels.dtype, samples.dtype} == {torch.int64}
        assert inputs.is_contiguous() and labels.is_contiguous()
        expected = samples[:, None] * length + torch.arange(length)  # token t of the file is t
        assert torch.equal(inputs, expected) and torch.equal(labels, expected + 1)


@given(_shapes(), st.booleans(), st.integers(0, 2))
@UNHURRIED
def test_epoch_covers_each_sample_at_most_once_over_all_ranks(shape: dict[str, int], shuffle: bool, epoch: int) -> None:
    loaders = _ranks(shape, shuffle=shuffle)
    per_epoch = loaders[0].micro_batches_per_epoch
    seen: list[int] = []
    for loader in loaders:
        loader.load_state_dict({"epoch": epoch, "samples": 0})
        seen += torch.cat([samples for _, _, samples in islice(loader, per_epoch)]).tolist()
    samples = (shape["tokens"] - 1) // shape["sequence_length"]
    global_size = shape["micro_batch_size"] * shape["data_parallel_size"]
    assert len(seen) == len(set(seen)) == samples - samples % global_size
    assert set(seen) <= set(range(samples))


@given(_shapes(), st.booleans(), st.integers(0, 100))
@UNHURRIED
def test_restart_is_continuation_across_epochs(shape: dict[str, int], shuffle: bool, start: int) -> None:
    whole = _ranks(shape, shuffle=shuffle)[0]
    for _ in range(start):
        next(whole)
    restarted = _ranks(shape, shuffle=shuffle, start=start)[0]
    loaded = _ranks(shape, shuffle=shuffle)[0]
    next(loaded)
    loaded.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    count = whole.micro_batches_per_epoch + 2
    for one, two, three in islice(zip(whole, restarted, loaded, strict=True), count):
        assert _same(one, two) and _same(one, three)
    epoch, micro_batches = divmod(start + count, whole.micro_batches_per_epoch)
    used = micro_batches * shape["micro_batch_size"] * shape["data_parallel_size"]
    assert whole.state_dict() == restarted.state_dict() == loaded.state_dict() == {"epoch": epoch, "samples": used}


@given(st.integers(0, 12), st.integers(1, 5), st.integers(1, 3), st.booleans())
@UNHURRIED
def test_state_goes_on_with_other_sizes(micro_batches: int, size: int, ranks: int, shuffle: bool) -> None:
    """24 samples in micro-batches of 2 × 3, then of other sizes: no sample of the epoch comes twice."""
    before = _ranks(
        {"sequence_length": 1, "micro_batch_size": 2, "data_parallel_size": 3, "tokens": 25}, shuffle=shuffle
    )
    first = micro_batches - micro_batches % 4  # of this epoch
    seen = [i for loader in before for _, _, ids in list(islice(loader, micro_batches))[first:] for i in ids.tolist()]
    shape = {"sequence_length": 1, "micro_batch_size": size, "data_parallel_size": ranks, "tokens": 25}
    after = _ranks(shape, shuffle=shuffle)
    for loader in after:
        loader.load_state_dict(before[0].state_dict())
    state, total = after[0].state_dict(), size * ranks
    used = len(seen)
    if -(-used // total) < 24 // total:
        assert state == {"epoch": first // 4, "samples": -(-used // total) * total}
        rest = 24 // total - state["samples"] // total
        seen += [i for loader in after for _, _, ids in islice(loader, rest) for i in ids.tolist()]
        assert len(seen) == len(set(seen)), "no sample comes twice"
    else:
        assert state == {"epoch": first // 4 + 1, "samples": 0}, "what is left does not fill a micro-batch"


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"epoch": -1, "samples": 0}, "epoch is -1"),
        ({"epoch": 0, "samples": -6}, "samples is -6"),
        ({"epoch": 0, "samples": 25}, "25 samples of an epoch are used, these data have 24"),
    ],
)
def test_states_of_other_data(state: dict[str, int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        MicroBatchLoader(token_file(np.arange(25)), 1, 6).load_state_dict(state)


@given(st.integers(1, 3), st.integers(0, 40), st.integers(0, 3))
@UNHURRIED
def test_global_micro_batch_does_not_depend_on_data_parallel_size(length: int, start: int, seed: int) -> None:
    def stream(data_parallel_size: int) -> list[list[int]]:
        shape = {
            "sequence_length": length, "micro_batch_size": 12 // data_parallel_size,
            "data_parallel_size": data_parallel_size, "tokens": 150, "seed": seed,
        }  # fmt: skip
        micro_batches = zip(*_ranks(shape, start=start), strict=True)
        return [torch.cat([s for _, _, s in ranks]).tolist() for ranks in islice(micro_batches, 6)]

    assert stream(1) == stream(2) == stream(3) == stream(12)


def test_order_differs_by_epoch_and_seed_and_is_in_file_order_without_shuffle() -> None:
    data = token_file(np.arange(201))

    def epochs(**options: Any) -> list[list[int]]:
        loader = MicroBatchLoader(data, 2, 10, **options)
        return [torch.cat([s for _, _, s in islice(loader, 10)]).tolist() for _ in range(2)]

    first, second = epochs(seed=1)
    other, _ = epochs(seed=2)
    assert len({tuple(first), tuple(second), tuple(other)}) == 3
    assert sorted(first) == sorted(second) == sorted(other) == list(range(100))
    assert epochs(shuffle=False) == [list(range(100))] * 2


@pytest.mark.parametrize("shuffle", [True, False])
def test_held_out_is_one_pass_that_does_not_move_the_stream(shuffle: bool) -> None:
    data = token_file(np.arange(100))
    loader, untouched = (MicroBatchLoader(data, 4, 3, shuffle=shuffle, start=11) for _ in range(2))
    passes = [list(loader.held_out()) for _ in range(2)]
    assert len(passes[0]) == loader.micro_batches_per_epoch == 8  # 24 samples of 4 tokens
    assert all(_same(one, two) for one, two in zip(*passes, strict=True))
    assert len({int(i) for _, _, samples in passes[0] for i in samples}) == 24
    assert [int(s[0]) for _, _, s in loader.held_out(2)] == [int(s[0]) for _, _, s in passes[0][:2]]
    assert len(list(loader.held_out(99))) == 8
    assert _same(next(loader), next(untouched))


def test_loader_needs_one_global_micro_batch() -> None:
    options: dict[str, Any] = {"sequence_length": 5, "micro_batch_size": 2, "data_parallel_size": 3}
    assert MicroBatchLoader(token_file(np.arange(31)), **options).micro_batches_per_epoch == 1
    with pytest.raises(
        DataError, match=r"data/train\.bin has 30 tokens, one micro-batch needs 31 for 6 windows of 5: "
    ):
        MicroBatchLoader(token_file(np.arange(30)), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence_length": 0}, "sequence_length is 0: give 1 or more"),
        ({"micro_batch_size": -1}, "micro_batch_size is -1"),
        ({"data_parallel_size": 0}, "data_parallel_size is 0"),
        ({"data_parallel_rank": 2, "data_parallel_size": 2}, "give a rank from 0 to 1"),
        ({"data_parallel_rank": -1}, "data_parallel_rank is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"start": -1}, "start is -1"),
    ],
)
def test_loader_arguments_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        MicroBatchLoader(token_file(np.arange(100)), **{"sequence_length": 4, "micro_batch_size": 2, **options})
