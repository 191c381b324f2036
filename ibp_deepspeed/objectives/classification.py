"""The loss of a classifier of whole samples, and how often it is right."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100


class ClassificationLoss:
    """Mean cross-entropy in nats of logits [B, C] and classes [B]; those that are -100 do not count."""

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """A scalar in fp32 or more; 0 with zero gradients if no label counts."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum") / self.weight(labels).clamp(min=1)

    @staticmethod
    def weight(labels: Tensor) -> Tensor:
        """Labels that count: the weight of a micro-batch's mean in the mean over several. A scalar."""
        return (labels != IGNORED).sum()


class LossAndAccuracy(ClassificationLoss):
    """What an evaluation of a classifier measures: the loss, and how often the likeliest class is the sample's."""

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Both, [2]."""
        right = ((logits.argmax(-1) == labels) & (labels != IGNORED)).sum() / self.weight(labels).clamp(min=1)
        loss = super().__call__(logits, labels)
        return torch.stack([loss, right.to(loss.dtype)])
