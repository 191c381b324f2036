"""Weights that are not finite are not saved: the newest checkpoint can always be trained on, and none that can is
removed for one that can't."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ibp_deepspeed.errors import NonFiniteError


def not_finite(named: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of the tensors in which a value is infinite or not a number, in their order."""
    return [name for name, tensor in named if not bool(torch.isfinite(tensor).all())]


def require_finite(named: Iterable[tuple[str, Tensor]], batches: int) -> None:
    """Before a checkpoint is written: that its weights can be trained on.

    Args:
        named: what this rank would save, by the names in the model.
        batches: trained so far.

    Raises:
        NonFiniteError: they can't, and none is written.
    """
    found = not_finite(named)
    if found:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise NonFiniteError(
            f"after batch {batches} weight {found[0]}{more} of the model is not finite, so no checkpoint is written; "
            "go on from the last one with a smaller learning rate or other data."
        )
