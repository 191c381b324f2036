"""torch's random generators of this process: dropout at a recomputation and after a resume repeats itself."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

import torch
from torch import Tensor


def generator_of(*where: int) -> torch.Generator:
    """A generator on the CPU that depends on these numbers alone: runs repeat, and ranks agree without a message."""
    digest = hashlib.sha256("/".join(map(str, where)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7]))


class RandomState:
    """The generators' states of the moment it is made: of the CPU, and of the current GPU if there is one."""

    def __init__(self) -> None:
        self.cpu: Tensor = torch.get_rng_state()
        self.accelerator: Tensor | None = torch.cuda.get_rng_state() if torch.cuda.is_available() else None

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors, for a file."""
        return {"cpu": self.cpu} | ({} if self.accelerator is None else {"accelerator": self.accelerator})

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor]) -> Self:
        """The inverse of :meth:`state_dict`."""
        made = cls()
        made.cpu, made.accelerator = state["cpu"], state.get("accelerator")
        return made

    def set(self) -> None:
        """Have the generators continue from here."""
        torch.set_rng_state(self.cpu)
        if self.accelerator is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(self.accelerator)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """A context with these states; the generators continue undisturbed after it."""
        devices = [torch.cuda.current_device()] if self.accelerator is not None else []
        with torch.random.fork_rng(devices=devices):
            self.set()
            yield
