"""How far an exit can be believed: agreement with the model, calibration, and thresholds of its confidence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ibp_deepspeed.models.exits.predictions import Predictions

LEVELS = (0.95, 0.99)
"""Shares of agreement for which thresholds are sought."""
_BINS = 15  # those of Guo et al. 2017, On Calibration of Modern Neural Networks (arXiv:1706.04599)


@dataclass(frozen=True)
class Threshold:
    """The lowest confidence at and above which an exit agrees with the model at a given share of positions.

    Attributes:
        agreement: that share.
        confidence: in the exit's probability of its likeliest token; None: no threshold reaches the share.
        share: of all positions, those at or above it.
    """

    agreement: float
    confidence: float | None
    share: float


@dataclass(frozen=True)
class Confidence:
    """Of one exit.

    Attributes:
        agreement: share of positions whose likeliest token is the model's.
        calibration_error: expected calibration error of the likeliest token's probability: the mean distance, over
            15 equally wide bins weighted by their positions, between that probability and how often the token comes.
        thresholds: one for each level.
    """

    agreement: float
    calibration_error: float
    thresholds: tuple[Threshold, ...]


def confidences(predictions: Predictions, levels: Sequence[float] = LEVELS) -> dict[int, Confidence]:
    """Exit → how far it can be believed. The thresholds are those of these positions, fitted and counted on them."""
    found = {}
    for row, exit_ in enumerate(predictions.exits):
        confident, tokens = predictions.confidences[row], predictions.tokens[row]
        agrees = tokens == predictions.tokens[-1]
        found[exit_] = Confidence(
            agrees.double().mean().item(),
            calibration_error(confident, tokens == predictions.labels),
            tuple(threshold(confident, agrees, level) for level in levels),
        )
    return found


def calibration_error(confidence: Tensor, correct: Tensor) -> float:
    """The expected calibration error of confidences [N] in 0 … 1 in tokens that came or did not [N]."""
    bins = (confidence * _BINS).long().clamp(max=_BINS - 1)
    gaps = torch.zeros(_BINS, dtype=torch.float64).index_add_(0, bins, correct.double() - confidence.double())
    return (gaps.abs().sum() / len(confidence)).item()


def threshold(confidence: Tensor, agrees: Tensor, level: float) -> Threshold:
    """The lowest threshold of confidences [N] that leaves agreement [N] at ``level`` or above, ties together."""
    ordered, order = confidence.sort(descending=True)
    positions = torch.arange(1, len(ordered) + 1, dtype=torch.float64)
    agreed = agrees[order].double().cumsum(0)
    is_last_of_its_value = torch.ones(len(ordered), dtype=torch.bool)
    is_last_of_its_value[:-1] = ordered[:-1] != ordered[1:]
    possible = (is_last_of_its_value & (agreed / positions >= level)).nonzero().flatten()
    if len(possible) == 0:
        return Threshold(level, None, 0.0)
    last = int(possible[-1])
    return Threshold(level, ordered[last].item(), (last + 1) / len(ordered))
