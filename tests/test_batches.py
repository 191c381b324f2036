"""Nests of tensors: moved whole, compared by content, refused where nobody could compare them."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from ibp_deepspeed.batches import checksum, position_ids, to_device, unpack
from ibp_deepspeed.errors import BatchError


class Both(NamedTuple):
    """Two entries."""

    one: Any
    other: Any


def long(changed: int | None = None) -> torch.Tensor:
    """More elements than torch prints."""
    tensor = torch.arange(4096.0)
    if changed is not None:
        tensor[changed] = -1
    return tensor


@pytest.mark.parametrize(
    "nest", [lambda t: t, lambda t: {"a": {"b": t}}, lambda t: [t, 1], lambda t: Both(1, {"x": (t, None)})]
)
def test_one_element_of_many_is_another_content(nest: Any) -> None:
    assert checksum(nest(long())) == checksum(nest(long().clone()))
    assert checksum(nest(long())) != checksum(nest(long(changed=2000)))
    assert checksum(nest(long().numpy())) != checksum(nest(long(changed=2000).numpy()))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int32)),
        ({"a": torch.ones(1)}, {"b": torch.ones(1)}),
        ({"a": 1, "b": 2}, {"a": 2, "b": 1}),
        ([1, 2], [2, 1]),
        ("text", "texts"),
        (None, 0),
    ],
)
def test_shapes_types_names_and_order_count(one: Any, other: Any) -> None:
    assert checksum(one) != checksum(other)


@pytest.mark.parametrize(
    "value", [torch.tensor(True), torch.zeros(0), torch.zeros(2, dtype=torch.bfloat16), np.int64(3)]
)
def test_every_kind_of_tensor_has_a_checksum(value: Any) -> None:
    assert 0 <= checksum({"x": value}) < 2**32


@pytest.mark.parametrize("value", [object(), {"x": {1, 2}}, np.array([object()])])
def test_what_nobody_can_compare_is_refused(value: Any) -> None:
    with pytest.raises(BatchError, match="which stages can't compare: give tensors"):
        checksum(value)


def test_nests_move_whole_and_keep_their_types() -> None:
    tensor = torch.ones(1, requires_grad=True)
    nest = {"a": Both([tensor], OrderedDict(b=(tensor, "text"))), "c": 3}
    moved = to_device(nest, torch.device("meta"))
    assert isinstance(moved["a"], Both) and isinstance(moved["a"].other, OrderedDict) and moved["c"] == 3
    for found in (moved["a"].one[0], moved["a"].other["b"][0]):
        assert found.device.type == "meta" and not found.requires_grad
    assert moved["a"].other["b"][1] == "text"


def test_a_micro_batch_is_a_pair_a_triple_or_a_dictionary_with_labels() -> None:
    x, y, ids = torch.zeros(2), torch.ones(2), torch.arange(2)
    for given in ((x, y), [x, y], Both(x, y)):
        assert unpack(given) == (x, y, checksum(y))
    assert unpack((x, y, ids)) == (x, y, checksum(ids))
    named = {"input_ids": x, "attention_mask": ids, "labels": y}
    assert unpack(named) == ({"input_ids": x, "attention_mask": ids}, y, checksum(y))
    assert unpack({**named, "sample_ids": ids})[2] == checksum(ids)
    for wrong, seen in (({"x": x, "y": y}, "a dict of x, y"), ((x,), "a tuple of 1 entries"), (x, "a Tensor")):
        with pytest.raises(BatchError, match=f"or a dictionary with labels, not {seen}"):
            unpack(wrong)


def test_positions_of_documents_are_the_fourth_entry() -> None:
    x, y, ids, positions = torch.zeros(1, 2), torch.ones(1, 2), torch.arange(1), torch.zeros(1, 2, dtype=torch.long)
    assert unpack((x, y, ids, positions)) == (x, y, checksum(ids))
    assert position_ids((x, y, ids, positions)) is positions
    assert all(position_ids(row) is None for row in ((x, y), (x, y, ids), {"x": x, "labels": y, "position_ids": x}))
    with pytest.raises(BatchError, match=r"position ids of a micro-batch are a list: give a tensor \[B, S\]"):
        position_ids((x, y, ids, [0, 0]))
