"""Stochastic layer-wise learning, "stochastic_layerwise" (Yin and Corradi 2025, arXiv:2505.05181v4).

A layer's loss is the label's likelihood behind it, and a divergence between what it is given and what it makes of it.
Only parts of the paper were at hand when this was written: the abstract, what public reviews and summaries of it quote,
and no code. From these: the sum is that of a layer's evidence lower bound, E[log p(y|h_i)] - KL(q(h_i|h_{i-1}) ||
p(h_i|h_{i-1})), with no weight between the two; a Bhattacharyya surrogate of categorical posteriors stands for the KL;
the posteriors are made of v_i = R_i h_i with fixed random R_i; a multiplicative dropout is optional; layers get no
gradients from each other.

Our reading: a layer is a stage; the likelihood is what the exit's head predicts; posteriors are softmax(R_k h), of both
states with the same R_k, so that categories mean the same, and of states with a mean square of 1 and R_k ~ N(0, 1/H),
so that logits have a variance of about 1 whatever the model; the surrogate is the Bhattacharyya distance; the dropout
leaves out columns of R_k; 256 categories and a dropout of 0.1 where nothing is said.
"""

from __future__ import annotations

import math
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ibp_deepspeed.config.interlocking import AuxHeadConfig
from ibp_deepspeed.config.objectives import StochasticLayerwiseOptions
from ibp_deepspeed.objectives.head import LossFn, Objective
from ibp_deepspeed.rng import generator_of

_COLUMNS = 1
"""Tells the draw of columns apart from that of negatives, which is of the same numbers."""


class StochasticLayerwise(Objective):
    """Prediction + Bhattacharyya distance of the posteriors of the stage's input and output; measured by prediction.

    The projection depends on the seed and the loss alone, and the columns that are left out on the batch and the
    micro-batch too: nothing is sent or kept, runs repeat, replicas agree.
    """

    name = "stochastic_layerwise"
    _options = StochasticLayerwiseOptions()
    _seed = 0
    _projection: Tensor | None = None

    def configured(self, options: AuxHeadConfig | None, loss_fn: LossFn | None) -> Self:
        """Overrides Objective's: with the size of the projection and the dropout."""
        super().configured(options, loss_fn)
        if options is not None and isinstance(options.objective, StochasticLayerwiseOptions):
            self._options, self._seed, self._projection = options.objective, options.aux_tokens_seed, None
        return self

    def stage_loss(
        self, given: Any, hidden: Any, labels: Any, *, batch: int, micro_batch: int, index: int
    ) -> Tensor | float:
        """Overrides Objective's: the mean distance over the positions of the prediction; on the first stage 0."""
        if given is None:
            return 0.0
        pair, labels = [given.flatten(0, -2), hidden.flatten(0, -2)], labels.flatten()
        if self.positions is not None:
            chosen = self.positions.positions(batch, index, len(labels)).to(labels.device)
            pair, labels = [states[chosen] for states in pair], labels[chosen]
        projection = self.projection(pair[1], index) * self.kept_columns(pair[1], batch, micro_batch, index)
        return posterior_distance(pair[0], pair[1], labels, projection)

    def projection(self, states: Tensor, index: int) -> Tensor:
        """R_k of a loss for states [..., H], fixed: entries from N(0, 1/H). [d, H], fp32"""
        size = states.shape[-1]
        if self._projection is None or self._projection.shape[-1] != size:
            drawn = torch.randn(self._options.categories, size, generator=generator_of(self._seed, index))
            self._projection = drawn / math.sqrt(size)
        self._projection = self._projection.to(states.device)
        return self._projection

    def kept_columns(self, states: Tensor, batch: int, micro_batch: int, index: int) -> Tensor:
        """0 for the columns that a micro-batch leaves out, 1 / (1 - dropout) for others. [H], fp32"""
        generator = generator_of(self._seed, batch, micro_batch, index, _COLUMNS)
        kept = torch.rand(states.shape[-1], generator=generator) >= self._options.dropout
        return (kept / (1 - self._options.dropout)).to(states.device)


def posterior_distance(
    given: Tensor, hidden: Tensor, labels: Tensor, projection: Tensor, *, ignore_index: int = -100
) -> Tensor:
    """Mean Bhattacharyya distance -ln Σ √(p·q) of the posteriors of states [n, H] and [n, H] where labels [n] count.

    A posterior is the softmax of what the projection [d, H] makes of a state that is divided by its root mean square
    (with 1e-6 more under the root, so that no state has none).
    The distance is never more than half of the KL divergence that it stands for.

    Returns:
        A scalar in fp32 or more; 0 with zero gradients if no label counts.
    """
    both = _log_posterior(given, projection) + _log_posterior(hidden, projection)
    distances = -torch.logsumexp(both / 2, -1)
    counted = labels != ignore_index
    return distances.masked_fill(~counted, 0.0).sum() / counted.sum().clamp(min=1)


def _log_posterior(states: Tensor, projection: Tensor) -> Tensor:
    states = states.to(torch.promote_types(states.dtype, torch.float32))
    normed = F.rms_norm(states, states.shape[-1:], eps=1e-6)
    return F.log_softmax(F.linear(normed, projection.to(states.dtype)), -1)
