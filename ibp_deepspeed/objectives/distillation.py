"""Distillation from the next exit, whose likeliest tokens come some batches later.

G. Hinton, O. Vinyals, J. Dean 2015, arXiv:1503.02531; from deeper exits of the same network L. Zhang et al. 2019,
arXiv:1905.08094.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ibp_deepspeed.config.interlocking import AuxHeadConfig
from ibp_deepspeed.config.objectives import DistillationOptions
from ibp_deepspeed.objectives.by_rows import by_rows
from ibp_deepspeed.objectives.cross_entropy import LazyLogits
from ibp_deepspeed.objectives.head import LossFn, Objective
from ibp_deepspeed.objectives.late_targets import LateTargets

IGNORED = -100


@dataclass(frozen=True)
class LikeliestTokens(LateTargets):
    """The likeliest tokens of an exit at some positions, ln of their probabilities, and ln of all others' sum.

    Attributes:
        top: how many; at most the vocabulary counts.
        temperature: that the logits are divided by.
    """

    top: int = 32
    temperature: float = 1.0

    def of(self, outputs: Any, labels: Tensor) -> list[Tensor]:
        """Overrides LateTargets': int32 [t, k], fp32 [t, k], and fp32 [t] unless k is the vocabulary."""
        chunks: Iterable[Tensor] = outputs.chunks() if isinstance(outputs, LazyLogits) else [outputs]
        said = [likeliest(logits / self.temperature, self.top) for logits in chunks]
        return [torch.cat(part) for part in zip(*said, strict=True)]


class Distillation(Objective):
    """Cross-entropy; some batches later λ · τ² · KL(next exit, this one) for the head. Measured by cross-entropy."""

    name = "distillation"
    _options = DistillationOptions()

    def configured(self, options: AuxHeadConfig | None, loss_fn: LossFn | None) -> Self:
        """Overrides Objective's: with the options."""
        super().configured(options, loss_fn)
        if options is not None and isinstance(options.objective, DistillationOptions):
            self._options = own = options.objective
            late = LikeliestTokens(own.tokens, own.delay, options.aux_tokens_seed, own.top, own.temperature)
            self.needs = replace(self.needs, late=late)
        return self

    def late_loss(self, states: Tensor, labels: Tensor, targets: list[Tensor]) -> Tensor:
        """Overrides Objective's: the mean over positions whose label counts."""
        temperature = self._options.temperature

        def compared(logits: Tensor, *wanted: Tensor) -> Tensor:
            return divergences(logits / temperature, *wanted)

        losses, counted = by_rows(compared, self.module(states), *targets), labels != IGNORED
        mean = losses.masked_fill(~counted, 0.0).sum() / counted.sum().clamp(min=1)
        return self._options.weight * temperature**2 * mean


def likeliest(logits: Tensor, top: int) -> list[Tensor]:
    """Of logits [t, V]: k = min(top, V) tokens, int32 [t, k], ln of their probabilities, fp32 [t, k], and unless k is V
    ln of the sum of all others', fp32 [t]."""
    log_probabilities = F.log_softmax(logits.float(), -1)
    values, tokens = log_probabilities.topk(min(top, logits.shape[-1]))
    others = [] if top >= logits.shape[-1] else [_others(log_probabilities, tokens)]
    return [tokens.int(), values, *others]


def divergences(logits: Tensor, tokens: Tensor, wanted: Tensor, wanted_others: Tensor | None = None) -> Tensor:
    """KL(wanted, softmax(logits)) of each row over k tokens and all others as one, [t] in fp32 or more.

    Args:
        logits: [t, V].
        tokens, wanted, wanted_others: see :func:`likeliest`.
    """
    tokens = tokens.long()
    own = F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
    total = _terms(wanted, own.gather(1, tokens)).sum(-1)
    return total if wanted_others is None else total + _terms(wanted_others, _others(own, tokens))


def _others(log_probabilities: Tensor, tokens: Tensor) -> Tensor:
    """ln of the sum of the probabilities of all tokens but these."""
    return log_probabilities.scatter(1, tokens, -torch.inf).logsumexp(-1)


def _terms(wanted: Tensor, own: Tensor) -> Tensor:
    """p ln(p/q) of ln p and ln q; 0 where p is."""
    return (wanted.exp() * (wanted - own)).masked_fill(wanted == -torch.inf, 0.0)
