"""What a message is: one flat byte tensor, a payload whose shape both ends know and a header of three integers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ibp_deepspeed.errors import BoundaryError

Header = tuple[int, int, int]
_HEADER_BYTES = 24
META_LENGTH = 16
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Frame(NamedTuple):
    """Memory of one message.

    Attributes:
        message: what travels, bytes.
        payload: the tensor in it, a view.
        header: its three integers, a view, which costs a tenth of what a tensor does. Shape [3], int64.
    """

    message: Tensor
    payload: Tensor
    header: np.ndarray


@dataclass(frozen=True)
class Memory:
    """Where messages live: beside the tensors, or in host memory if the backend can't reach the device.

    Attributes:
        device: of the tensors.
        staged: whether messages pass through (pinned) host memory.
    """

    device: torch.device
    staged: bool = False

    @classmethod
    def of(cls, device: torch.device) -> Memory:
        """For the job's backend: gloo sends from host memory only."""
        return cls(device, staged=device.type != "cpu" and dist.get_backend() == "gloo")

    def new(self, size: int, dtype: torch.dtype) -> Tensor:
        """An uninitialised message."""
        if not self.staged:
            return torch.empty(size, dtype=dtype, device=self.device)
        return torch.empty(size, dtype=dtype, pin_memory=self.device.type == "cuda")

    def fetch(self, payload: Tensor) -> Tensor:
        """A staged payload, copied to the device."""
        return torch.empty_like(payload, device=self.device, pin_memory=False).copy_(payload)


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of what crosses a boundary."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: object, stage: int) -> TensorSpec:
        """The spec of a stage's output.

        Raises:
            BoundaryError: it is not one floating tensor.
        """
        if not isinstance(tensor, Tensor) or tensor.dtype not in _DTYPES:
            seen = f"a {tensor.dtype} tensor" if isinstance(tensor, Tensor) else f"a {type(tensor).__name__}"
            raise BoundaryError(
                f"stage {stage} passes {seen} to the next stage; a boundary carries exactly one floating tensor of "
                f"hidden states: make masks, positions and tables again where they are needed."
            )
        return cls(tuple(tensor.shape), tensor.dtype)

    @cached_property
    def payload_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def new_frame(self, memory: Memory) -> Frame:
        """An uninitialised message in host memory: payload padded to 8 bytes, then the header."""
        padded = -(-self.payload_bytes // 8) * 8
        message = memory.new(padded + _HEADER_BYTES, torch.uint8)
        payload = message[: self.payload_bytes].view(self.dtype).view(self.shape)
        return Frame(message, payload, message[padded:].numpy().view(np.int64))

    def encode(self) -> Tensor:
        """The spec as the first message of an activation channel. Shape [16], int64."""
        values = [_DTYPES.index(self.dtype), len(self.shape), *self.shape]
        return torch.tensor(values + [0] * (META_LENGTH - len(values)), dtype=torch.int64)

    @classmethod
    def decode(cls, meta: Tensor) -> TensorSpec:
        """The inverse of :meth:`encode`.

        Raises:
            BoundaryError: no stage has said that.
        """
        dtype, ndim, *shape = meta.tolist()
        if not (0 <= dtype < len(_DTYPES) and 0 <= ndim <= len(shape) and min(shape[:ndim], default=0) >= 0):
            raise BoundaryError(
                f"the shape of a message is announced as {meta.tolist()}, which no stage says: do all processes run "
                "the same version?"
            )
        return cls(tuple(shape[:ndim]), _DTYPES[dtype])
