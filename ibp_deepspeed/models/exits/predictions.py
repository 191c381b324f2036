"""What every exit predicts at every position of a split: its likeliest token, that token's probability, its loss."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ibp_deepspeed.models.exits.exits import Exits
from ibp_deepspeed.objectives.cross_entropy import LazyLogits


@dataclass(frozen=True, eq=False)
class Predictions:
    """Of E exits at the N positions whose label counts.

    Attributes:
        exits: their numbers, ascending; the last one is the model.
        trunk_layers: the model's decoder layers before each; of the last one, all.
        head_layers: decoder layers in the head of each.
        tokens: the likeliest token. Shape [E, N].
        confidences: its probability. Shape [E, N], fp32.
        losses: minus the logarithm of the label's probability, in nats. Shape [E, N], fp32.
        labels: the tokens that follow. Shape [N].
    """

    exits: list[int]
    trunk_layers: list[int]
    head_layers: list[int]
    tokens: Tensor
    confidences: Tensor
    losses: Tensor
    labels: Tensor


class WatchedExits:
    """A checkpoint's exits whose evaluation also keeps what they predict: 12 bytes an exit and position.

    Args:
        exits: of a checkpoint.
    """

    def __init__(self, exits: Exits) -> None:
        self._exits = exits
        self._seen: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {exit_: [] for exit_ in sorted(exits.objectives)}
        self._labels: list[Tensor] = []

    def eval_batch(self, data_iter: Iterator[Any], num_micro_batches: int) -> Tensor:
        """Held-out losses of the K exits, as :meth:`Exits.eval_batch`."""
        return self._exits.eval_batch(data_iter, num_micro_batches, self._watch)

    def predictions(self) -> Predictions:
        """Those of all evaluations until now."""
        columns = [[torch.cat(parts) for parts in zip(*seen, strict=True)] for seen in self._seen.values()]
        tokens, confidences, losses = (torch.stack(rows) for rows in zip(*columns, strict=True))
        in_heads = [self._exits.objectives[exit_].inner_layers for exit_ in self._seen]
        before = [self._exits.depth(exit_) - inner for exit_, inner in zip(self._seen, in_heads, strict=True)]
        return Predictions(list(self._seen), before, in_heads, tokens, confidences, losses, torch.cat(self._labels))

    def _watch(self, exit_: int, made: LazyLogits, labels: Tensor) -> None:
        counted = labels != -100
        if exit_ == len(self._exits):  # every micro-batch comes once with every exit
            self._labels.append(labels[counted].cpu())
        of_counted = LazyLogits(made.hidden[counted], made.readout, ())
        self._seen[exit_].append(predict(of_counted, labels[counted]))


@torch.no_grad()
def predict(logits: LazyLogits, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Likeliest tokens (int32), their probabilities and the labels' losses in nats (both fp32), on the CPU.

    Args:
        logits: of shape [N, V], which are read out in chunks.
        labels: the tokens that follow. Shape [N].
    """
    parts, done = [], 0
    for chunk in logits.chunks():
        log_probabilities = torch.log_softmax(chunk.float(), -1)
        best, tokens = log_probabilities.max(-1)
        label = labels[done : done + len(chunk), None]
        losses = -log_probabilities.gather(1, label).squeeze(1)
        parts.append((tokens.int().cpu(), best.exp().cpu(), losses.cpu()))
        done += len(chunk)
    if not parts:
        return torch.empty(0, dtype=torch.int32), torch.empty(0), torch.empty(0)
    tokens, confidences, losses = (torch.cat(column) for column in zip(*parts, strict=True))
    return tokens, confidences, losses
