"""Micro-batches, and the proof that all stages look at the same ones: every message says which it belongs to."""

from __future__ import annotations

import zlib
from typing import Any, NoReturn

import torch
from torch import Tensor

from ibp_deepspeed.comm.message import Header
from ibp_deepspeed.errors import BatchError


class SampleLedger:
    """Headers that came with messages, beside what this stage expected them to say: compared before each step."""

    def __init__(self, stage: int) -> None:
        self.stage = stage
        self._rows: list[tuple[Header, Header]] = []

    def add(self, header: Header, batch: int, micro_batch: int, key: int) -> None:
        """Remember a message's header and what it should hold; ``key``: sample checksum, or a gradient's loss."""
        self._rows.append((header, (batch, micro_batch, key)))

    def check(self) -> None:
        """Compare and forget all headers.

        Raises:
            BatchError: a neighbour is at another micro-batch or looks at other samples.
        """
        rows, self._rows = self._rows, []
        for got, want in rows:
            if got != want:
                self._fail(got, want)

    def _fail(self, got: Header, want: Header) -> NoReturn:
        if got[:2] != want[:2]:
            raise BatchError(
                f"stage {self.stage} is at batch {want[0] + 1}, micro-batch {want[1]}, its neighbour sent batch "
                f"{got[0] + 1}, micro-batch {got[1]}: call train_batch and eval_batch in the same order on every rank."
            )
        raise BatchError(
            f"stages {self.stage - 1} and {self.stage} look at different samples in batch {want[0] + 1}, "
            f"micro-batch {want[1]}: give every stage the same data in the same order."
        )


def unpack(micro_batch: Any) -> tuple[Any, Any, int]:
    """Inputs, labels, and the checksum of the sample ids, or of the labels where there are none.

    Raises:
        BatchError: the micro-batch is not (inputs, labels) or (inputs, labels, sample ids).
    """
    if not isinstance(micro_batch, list | tuple) or len(micro_batch) not in (2, 3):
        raise BatchError(f"a micro-batch must be (inputs, labels) or (inputs, labels, ids), not {type(micro_batch)}.")
    return micro_batch[0], micro_batch[1], checksum(micro_batch[-1])


def to_device(value: Any, device: torch.device) -> Any:
    """All tensors in a nest of lists and tuples, on a device and without a graph."""
    if isinstance(value, Tensor):
        return value.detach().to(device)
    if isinstance(value, list | tuple):
        return type(value)(to_device(item, device) for item in value)
    return value


def checksum(value: Any) -> int:
    """CRC-32 over the bytes of all tensors in a nest of lists and tuples."""
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        return zlib.crc32(data.tobytes())
    if isinstance(value, list | tuple):
        return zlib.crc32(b"".join(checksum(item).to_bytes(4, "little") for item in value))
    return zlib.crc32(repr(value).encode())
