"""The rule by which the heads follow the last stage's LM head.

The last stage's LM head as it stands when batch r·R begins there (r = 1, 2, …) is used by every head from batch
r·R + delay on. The rule knows batches only, not when messages arrive, so a run repeats exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ibp_deepspeed.config.interlocking import InterlockingConfig
from ibp_deepspeed.errors import InterlockingError


@runtime_checkable
class HasReadout(Protocol):
    """A model's last layer, or a head with a copy of that layer's readout."""

    def readout_tensors(self) -> list[Tensor]:
        """The LM head's tensors, in one order in the last layer and in all heads; empty: nothing is shared."""
        ...


@dataclass(frozen=True)
class RefreshRule:
    """When copies of the last stage's LM head are taken and used, or those of layers (:mod:`.slow_layers`).

    Attributes:
        interval: R.
        delay: batches between taking and using a copy.
        average: β of the exponential average of copies, or None.
    """

    interval: int
    delay: int
    average: float | None = None

    @classmethod
    def from_config(cls, interlocking: InterlockingConfig, stages: int, micro_batches: int) -> RefreshRule | None:
        """The rule of a configuration; None if no head is refreshed."""
        head = interlocking.aux_head
        if head is None or head.readout != "shared":
            return None
        return cls(head.refresh_interval, head.delay(stages, micro_batches), head.average)

    def takes(self, batch: int) -> bool:
        """Whether a copy is taken as batch ``batch`` (from 0) begins on the last stage."""
        return batch > 0 and batch % self.interval == 0

    def used_from(self, batch: int) -> int | None:
        """The batch at whose beginning the copy was taken that heads use from ``batch`` on, if it is a new one."""
        taken = batch - self.delay
        return taken if self.takes(taken) else None

    def pending(self, batch: int) -> list[int]:
        """The batches of the copies that are taken, and not yet used, before ``batch`` begins."""
        return [taken for taken in range(batch - self.delay, batch) if self.takes(taken)]


class ReadoutSource:
    """The last stage's side: makes the copies that heads are given.

    Args:
        initial: the LM head before the first batch, on the device where copies are made.
        average: β of the exponential average, or None.

    Attributes:
        average: the average at the newest copy, in fp32 at least (bf16 would lose small steps); None without one.
    """

    def __init__(self, initial: Sequence[Tensor], average: float | None) -> None:
        self._beta = average
        self.average: list[Tensor] | None = None
        if average is not None:
            self.average = [t.detach().to(torch.promote_types(t.dtype, torch.float32), copy=True) for t in initial]

    def take(self, readout: Sequence[Tensor]) -> list[Tensor]:
        """A copy of the LM head, or of β·average + (1-β)·readout, which is the average from now on."""
        if self.average is None or self._beta is None:
            return [tensor.detach().clone() for tensor in readout]
        for mean, new in zip(self.average, readout, strict=True):
            mean.lerp_(new.detach().to(mean.dtype), 1 - self._beta)
        return [mean.to(new.dtype, copy=True) for mean, new in zip(self.average, readout, strict=True)]


def fill_pending(taken: dict[int, list[Tensor]], pending: Sequence[int], now: Sequence[Tensor]) -> None:
    """For batches whose copies were never taken, the newest taken before them, or the LM head as it is ``now``."""
    for lacking in pending:
        if lacking not in taken:
            before = [other for other in taken if other <= lacking]
            taken[lacking] = taken[max(before)] if before else [tensor.detach().clone() for tensor in now]


def install(copies: Sequence[Tensor], newest: Sequence[Tensor]) -> None:
    """Overwrite a head's copies."""
    with torch.no_grad():
        for copy, new in zip(copies, newest, strict=True):
            copy.copy_(new)


def source_readout(last_stage: nn.Module, but: nn.Module | None = None) -> list[Tensor]:
    """The LM head of the model's last layer; ``but``: a head inside the stage, which is no layer of the model.

    Raises:
        InterlockingError: no layer of the stage offers one.
    """
    others = set(but.modules()) if but is not None else set()
    offers = [module for module in last_stage.modules() if isinstance(module, HasReadout) and module not in others]
    if not offers:
        raise InterlockingError(
            'readout "shared" or "frozen" needs a last layer with a method readout_tensors(), this model has none.'
        )
    return offers[-1].readout_tensors()


def head_readout(head: nn.Module) -> list[Tensor]:
    """The tensors of a head that are a copy of the last stage's readout.

    Raises:
        InterlockingError: the head has none.
    """
    tensors = head.readout_tensors() if isinstance(head, HasReadout) else []
    if not tensors:
        raise InterlockingError(
            'readout "shared" or "frozen" needs heads with a method readout_tensors() that names their copy of the '
            f"last stage's readout, a {type(head).__name__} has none."
        )
    return tensors
