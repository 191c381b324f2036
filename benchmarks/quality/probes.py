"""What each layer of a trained model knows of the next token: a fresh linear readout of its frozen output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

BATCHES, RATE = 400, 2e-3
Batch = tuple[Tensor, Tensor]


def probes(
    layers: Sequence[nn.Module], batches: Iterator[Batch], held_out: Sequence[Batch], vocabulary: int, width: int
) -> list[float]:
    """Held-out loss in nats of a norm and a matrix behind each layer but the last, each trained for itself by AdamW.

    Args:
        layers: all of the model; the last one is its own readout.
        batches: of training, ``BATCHES`` of them are taken.
        held_out: what is measured.
        vocabulary, width: of the readouts.
    """
    inner = list(layers)[:-1]
    readouts = [nn.Sequential(nn.RMSNorm(width), nn.Linear(width, vocabulary, bias=False)) for _ in inner]
    optimizer = torch.optim.AdamW([p for each in readouts for p in each.parameters()], lr=RATE, weight_decay=0.01)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 2 * (1 - step / BATCHES)))
    for _ in range(BATCHES):
        losses = _losses(inner, readouts, *next(batches))
        torch.stack(losses).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
    with torch.no_grad():
        rows = [torch.stack(_losses(inner, readouts, *batch)) for batch in held_out]
    return [round(loss, 5) for loss in torch.stack(rows).mean(0).tolist()]


def _losses(layers: Sequence[Callable[[Any], Any]], readouts: Sequence[nn.Module], ids: Any, labels: Any) -> list[Any]:
    hidden, losses = ids, []
    for layer, readout in zip(layers, readouts, strict=True):
        with torch.no_grad():
            hidden = layer(hidden)
        losses.append(functional.cross_entropy(readout(hidden).flatten(0, 1), labels.flatten()))
    return losses
