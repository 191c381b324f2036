"""What a stage of an image classifier costs, from counted multiply-adds: for balance, predictions and MFU."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from ibp_deepspeed.config.interlocking import InterlockingConfig
from ibp_deepspeed.models.vision.image_classifier import ImageClassifier
from ibp_deepspeed.schedule.simulator import Costs
from ibp_deepspeed.strategy.head_placement import HeadPlacement


def stage_costs(model: ImageClassifier, interlocking: InterlockingConfig, bounds: Sequence[int]) -> list[Costs]:
    """Of each stage, where the mean stage's forward pass takes 1.

    F, B and W of a convolution are of the same size; heads are computed forward and twice backward.
    """
    work, placement = model.layer_operations, _placement(interlocking, len(bounds) - 1)
    unit = sum(work) / (len(bounds) - 1)
    found = []
    for stage, (low, high) in enumerate(pairwise(bounds)):
        forward = sum(work[low:high]) / unit
        borrowed = sum(work[low : low + placement.borrowed_from(stage)]) / unit
        head = _head(model, interlocking, bounds, placement.head_at(stage)) / unit
        costs = Costs(forward, forward, forward, 3 * head, borrowed_gradient=borrowed)
        found.append(costs)
    return found


def training_flops(model: ImageClassifier, interlocking: InterlockingConfig, bounds: Sequence[int]) -> float:
    """Floating-point operations that training on one image needs, heads among them: two a multiply-add, three times."""
    placement = _placement(interlocking, len(bounds) - 1)
    heads = sum(_head(model, interlocking, bounds, loss) for loss in placement.heads)
    return 6 * (sum(model.layer_operations) + heads)


def _placement(interlocking: InterlockingConfig, stages: int) -> HeadPlacement:
    return HeadPlacement.from_config(interlocking, stages, interlocking.aux_head is not None)


def _head(model: ImageClassifier, interlocking: InterlockingConfig, bounds: Sequence[int], loss: int | None) -> float:
    if loss is None or interlocking.aux_head is None:
        return 0.0
    placement = _placement(interlocking, len(bounds) - 1)
    return model.head_operations(interlocking.aux_head, placement.boundary(loss, bounds) - 1)
