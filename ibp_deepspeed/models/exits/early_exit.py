"""Early exit by confidence: each position leaves at the first exit that is sure enough. What it saves and costs.

Quality is that of positions on given text, the states of all layers being there. A position that leaves early has no
keys and values in the layers above; whoever generates so has to compute these later for the positions that go deeper
(self-speculation does), or to do without.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ibp_deepspeed.models.exits.predictions import Predictions

LEVELS = (0.9, 0.95, 0.98, 0.99)
"""Shares of agreement for which the table gives what can be saved."""
_POINTS = 60


@dataclass(frozen=True)
class EarlyExit:
    """What a rule for leaving gives on a split.

    Attributes:
        threshold: the confidence at which a position leaves; None: all leave at one exit.
        saved: share of the model's decoder layers that are not computed, mean over positions. Blocks in heads count as
            computed, readouts are not counted. Below 0 where heads have more blocks than is saved.
        agreement: share of positions whose token is the model's.
        perplexity: of the probabilities at the exits where the positions leave.
        leaving: share of positions that leave at each exit, in the order of the predictions' exits.
    """

    threshold: float | None
    saved: float
    agreement: float
    perplexity: float
    leaving: tuple[float, ...]


def early_exit(predictions: Predictions, threshold: float) -> EarlyExit:
    """Every position leaves at the first exit whose confidence is at least ``threshold``, else at the last."""
    sure = predictions.confidences >= threshold
    sure[-1] = True
    # a block of a head is computed for that head alone, for each exit that is asked
    layers = [
        trunk + asked
        for trunk, asked in zip(predictions.trunk_layers, accumulate(predictions.head_layers), strict=True)
    ]
    return _leaving(predictions, sure.int().argmax(0), layers, threshold)  # argmax: the first of equals


def fixed_exits(predictions: Predictions) -> list[EarlyExit]:
    """For each exit, all positions leaving there; no other exit's head is computed."""
    layers = [trunk + own for trunk, own in zip(predictions.trunk_layers, predictions.head_layers, strict=True)]
    rows = range(len(predictions.exits))
    return [_leaving(predictions, torch.full_like(predictions.labels, row), layers, None) for row in rows]


def curve(predictions: Predictions) -> list[EarlyExit]:
    """From most saved to least, over thresholds spread evenly over the confidences that occur before the last exit."""
    occurring = predictions.confidences[:-1].flatten().sort().values
    if len(occurring) == 0:
        return []
    at = torch.linspace(0, len(occurring) - 1, _POINTS).long()
    return [early_exit(predictions, value) for value in occurring[at].unique().tolist()]


def cheapest(points: Sequence[EarlyExit], agreement: float) -> EarlyExit | None:
    """The point of a curve that saves most among those that agree at least so often; None: there is none."""
    return max((p for p in points if p.agreement >= agreement), key=lambda point: point.saved, default=None)


def _leaving(predictions: Predictions, at: Tensor, layers: Sequence[int], threshold: float | None) -> EarlyExit:
    """What follows from the row [N] of the exit where each position leaves, and what layers leaving at each takes."""
    chosen = at.unsqueeze(0)
    tokens = predictions.tokens.gather(0, chosen).squeeze(0)
    losses = predictions.losses.double().gather(0, chosen).squeeze(0)
    share = torch.bincount(at, minlength=len(predictions.exits)).double() / len(at)
    return EarlyExit(
        threshold,
        1 - (share * torch.tensor(layers)).sum().item() / predictions.trunk_layers[-1],
        (tokens == predictions.tokens[-1]).double().mean().item(),
        math.exp(losses.mean().item()),
        tuple(share.tolist()),
    )
