"""Whether a model is held as a whole or read layer by layer, and how much then goes through a layer at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import psutil
import torch

from ibp_deepspeed.models.errors import ModelError
from ibp_deepspeed.models.exits.passage import Passage

GIB = 2**30


def free_memory(device: torch.device) -> int:
    """Bytes that a device has free; of a CPU those that a process can have without swapping."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def check_memory(gib: float | None) -> None:
    """Of --memory-gib.

    Raises:
        ModelError: it is none.
    """
    if gib is not None and not gib > 0:
        raise ModelError(f"--memory-gib is {gib:g}: give more than 0, or leave it out for what is free.")


@dataclass(frozen=True)
class Memory:
    """What a model may take of a device's memory.

    Attributes:
        bytes: that there are.
    """

    bytes: int

    @classmethod
    def of(cls, device: torch.device, gib: float | None = None) -> Memory:
        """That much, or what is free.

        Raises:
            ModelError: it is none.
        """
        check_memory(gib)
        return cls(free_memory(device) if gib is None else int(gib * GIB))

    def holds(self, model_bytes: int) -> bool:
        """Whether a model leaves half of it to what is computed."""
        return model_bytes <= self.bytes / 2

    def groups(self, passages: Iterable[Passage], hidden_bytes: int) -> Iterator[list[Passage]]:
        """Passages in their order, as many at once as have hidden states in a quarter of it; at least one.

        Args:
            passages: that are made as they are taken.
            hidden_bytes: of one token's hidden state.
        """
        group: list[Passage] = []
        taken = 0
        for passage in passages:
            size = passage.tokens * hidden_bytes + passage.bytes
            if group and taken + size > self.bytes / 4:
                yield group
                group, taken = [], 0
            group.append(passage)
            taken += size
        if group:
            yield group
