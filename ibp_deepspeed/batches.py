"""What a micro-batch is, and the nests of tensors that it is made of: lists, tuples, named tuples and dictionaries."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from accelerate.utils import recursively_apply
from torch import Tensor

from ibp_deepspeed.errors import BatchError

LABELS, SAMPLE_IDS = "labels", "sample_ids"
"""Of a micro-batch that is a dictionary; all that it has beside them is what the first stage reads."""


def unpack(micro_batch: Any) -> tuple[Any, Any, int]:
    """Inputs, labels, and the checksum of the sample ids, or of the labels where there are none.

    Args:
        micro_batch: (inputs, labels), (inputs, labels, sample ids), (inputs, labels, sample ids, position ids), as a
            named tuple too, or a dictionary with ``labels``, perhaps ``sample_ids``, and inputs, which stay a
            dictionary.

    Raises:
        BatchError: it is something else.
    """
    if isinstance(micro_batch, Mapping) and LABELS in micro_batch:
        inputs = {name: value for name, value in micro_batch.items() if name not in (LABELS, SAMPLE_IDS)}
        labels = micro_batch[LABELS]
        return inputs, labels, checksum(micro_batch.get(SAMPLE_IDS, labels))
    if not isinstance(micro_batch, list | tuple) or len(micro_batch) not in (2, 3, 4):
        seen = f"a {type(micro_batch).__name__}"
        if isinstance(micro_batch, list | tuple | Mapping):
            of = ", ".join(map(str, micro_batch)) if isinstance(micro_batch, Mapping) else f"{len(micro_batch)} entries"
            seen += f" of {of}"
        raise BatchError(
            "a micro-batch must be (inputs, labels), (inputs, labels, sample ids), perhaps with position ids behind "
            f"them, or a dictionary with {LABELS}, not {seen}."
        )
    return micro_batch[0], micro_batch[1], checksum(micro_batch[min(2, len(micro_batch) - 1)])


def position_ids(micro_batch: Any) -> Tensor | None:
    """The fourth entry of a micro-batch: where its tokens are in their documents, as all stages have to know.

    See :class:`ibp_deepspeed.documents.Documents`. None: it has none, or is a dictionary, whose inputs are all for the
    first stage.

    Raises:
        BatchError: it is no tensor.
    """
    if not isinstance(micro_batch, list | tuple) or len(micro_batch) != 4:
        return None
    if not isinstance(micro_batch[3], Tensor):
        kind = type(micro_batch[3]).__name__
        raise BatchError(f"the position ids of a micro-batch are a {kind}: give a tensor [B, S].")
    return micro_batch[3]


def to_device(value: Any, device: torch.device) -> Any:
    """All tensors in a nest, on a device and without a graph; what else is in it stays as it is."""
    return recursively_apply(lambda tensor: tensor.detach().to(device), value)


def checksum(value: Any) -> int:
    """CRC-32 over a nest: bytes, shapes and types of all tensors and arrays, numbers, texts, and names.

    Raises:
        BatchError: it has something else in it, of which nobody can say whether it is the same on another stage.
    """
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        return zlib.crc32(data.tobytes(), zlib.crc32(f"{value.dtype} {tuple(value.shape)}".encode()))
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return zlib.crc32(value.tobytes(), zlib.crc32(f"{value.dtype} {value.shape}".encode()))
    if isinstance(value, Mapping):
        return _joined(checksum(part) for pair in value.items() for part in pair)
    if isinstance(value, list | tuple):
        return _joined(map(checksum, value))
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | np.generic):
        return zlib.crc32(repr(value).encode())
    raise BatchError(
        f"a micro-batch has a {type(value).__name__} among its labels or sample ids, which stages can't compare: give "
        "tensors, arrays, numbers or texts in lists, tuples and dictionaries."
    )


def _joined(parts: Any) -> int:
    return zlib.crc32(b"".join(part.to_bytes(4, "little") for part in parts))
