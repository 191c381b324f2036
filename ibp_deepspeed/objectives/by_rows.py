"""A function of logits, row by row and by ordinary autograd, while one chunk of the logits exists at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ibp_deepspeed.objectives.cross_entropy import CHUNK_LOGITS, LazyLogits, Readout


def by_rows(function: Callable[..., Tensor], outputs: LazyLogits | Tensor, *others: Tensor) -> Tensor:
    """``function(logits, *others)`` of all rows.

    Args:
        function: of logits [n, V] and rows [n, …] of the others, [n, …].
        outputs: logits [t, V], lazy ones in chunks of 64 MiB in fp32, which are computed again backward.
        others: [t, …] each.
    """
    if not isinstance(outputs, LazyLogits):
        return function(outputs, *others)
    size = max(1, CHUNK_LOGITS // outputs.vocabulary)
    if len(outputs.hidden) <= size:
        return function(outputs.readout(outputs.hidden), *others)
    parts: list[Tensor] = []
    for rows in (slice(start, start + size) for start in range(0, len(outputs.hidden), size)):
        cut = [other[rows] for other in others]
        if torch.is_grad_enabled():
            options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
            parts.append(checkpoint(_read, function, outputs.readout, outputs.hidden[rows], *cut, **options))
        else:
            parts.append(_read(function, outputs.readout, outputs.hidden[rows], *cut))
    return torch.cat(parts)


def _read(function: Callable[..., Tensor], readout: Readout, rows: Tensor, *others: Tensor) -> Tensor:
    return function(readout(rows), *others)
