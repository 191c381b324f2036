"""Auxiliary losses over a part of the vocabulary: the label, and tokens that are drawn to stand for all others.

The partition function Z = Σ_v exp(o_v) of a token with label y is estimated as exp(o_y) + Σ exp(o_n) / π_n over the
drawn n ≠ y, with π_n the probability that n is drawn: unbiased, and exact where everything is drawn. (Bengio and
Senécal 2008 estimate it by importance sampling with replacement; here no token is drawn twice, and those with π = 1
are always there.) The estimated loss is ln Z - o_y; its gradient reaches S + T rows of the LM head instead of V.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ibp_deepspeed.config.interlocking import AuxHeadConfig
from ibp_deepspeed.errors import InterlockingError
from ibp_deepspeed.objectives.cross_entropy import CHUNK_LOGITS, LazyLogits
from ibp_deepspeed.rng import generator_of


class NegativeSample:
    """S different tokens of the vocabulary, another draw for each micro-batch and each loss, shared by its positions.

    A draw depends on the seed, the batch, the micro-batch and the loss alone: runs repeat, replicas agree.

    Args:
        size: S.
        seed: of all draws.
        counts: how often each token occurs, [V].
        by_frequency: draw tokens in proportion to their counts (with one added to each), those frequent enough always;
            otherwise all alike.
    """

    def __init__(self, size: int, seed: int, counts: Tensor | None = None, *, by_frequency: bool = False) -> None:
        self.size, self._seed = size, seed
        self._counts, self._by_frequency = counts, by_frequency
        self._probabilities: Tensor | None = None

    @classmethod
    def from_options(cls, options: AuxHeadConfig, counts: Tensor | None) -> NegativeSample | None:
        """What a configuration asks for; None if losses are over the whole vocabulary."""
        if options.negatives is None:
            return None
        by_frequency = options.negatives_by == "frequency"
        return cls(options.negatives, options.aux_tokens_seed, counts, by_frequency=by_frequency)

    def draw(self, vocabulary: int, *, batch: int, micro_batch: int, loss: int) -> tuple[Tensor, Tensor]:
        """Tokens [S], int64, and ln π of each, [S], float32, on the CPU.

        Systematic sampling (Madow 1949): the tokens in a random order take up π of a line of length S each, and those
        at u, u + 1, u + 2, … are drawn; so exactly S, each with its π.

        Raises:
            InterlockingError: the vocabulary is smaller than the sample or has another size than the counts, or there
                are none.
        """
        probabilities = self._of(vocabulary)
        generator = generator_of(self._seed, batch, micro_batch, loss)
        order = torch.randperm(vocabulary, generator=generator)
        ends = probabilities[order].cumsum(0)
        points = torch.rand((), generator=generator, dtype=torch.float64) + torch.arange(self.size)
        points *= ends[-1] / self.size  # the sum's rounding
        tokens = order[torch.searchsorted(ends, points, right=True).clamp(max=vocabulary - 1)]
        return tokens, probabilities[tokens].log().float()

    def cross_entropy(self, logits: Any, labels: Tensor, *, batch: int, micro_batch: int, loss: int) -> Tensor:
        """The mean over a micro-batch, see :func:`sampled_cross_entropy`.

        Raises:
            InterlockingError: see :func:`linear_readout` and :meth:`draw`.
        """
        drawn = self.draw(linear_readout(logits).out_features, batch=batch, micro_batch=micro_batch, loss=loss)
        return sampled_cross_entropy(logits, labels, *drawn)

    def _of(self, vocabulary: int) -> Tensor:
        if self._probabilities is None:
            if self.size > vocabulary:
                raise InterlockingError(
                    f'"aux_head.negatives" is {self.size}, the vocabulary has {vocabulary} tokens: draw fewer.'
                )
            weights = torch.ones(vocabulary, dtype=torch.float64)
            if self._by_frequency:
                weights += self._known_counts(vocabulary)
            self._probabilities = inclusion_probabilities(weights, self.size)
        return self._probabilities

    def _known_counts(self, vocabulary: int) -> Tensor:
        if self._counts is None:
            raise InterlockingError(
                '"aux_head.negatives" are drawn by frequency, but nobody said how often tokens occur: give the heads '
                '"token_counts", or set "negatives_by": "uniform".'
            )
        if len(self._counts) != vocabulary:
            raise InterlockingError(f"token_counts is of {len(self._counts)} tokens, the vocabulary has {vocabulary}.")
        return self._counts


def inclusion_probabilities(weights: Tensor, size: int) -> Tensor:
    """π = min(1, c · weight), with c such that they sum to ``size``; float64, [V].

    Args:
        weights: above 0, float64, [V].
        size: 1 … V.
    """
    ordered, _ = weights.sort(descending=True)
    rest = ordered.flip(0).cumsum(0).flip(0)  # of what is as heavy as each or lighter
    always = torch.arange(len(weights))  # if this many of the heaviest have π = 1
    scales = (size - always) / rest
    fits = (scales * ordered <= 1) & (always < size)
    if not bool(fits.any()):
        return torch.ones_like(weights)
    return (weights * scales[int(fits.int().argmax())]).clamp(max=1)


def linear_readout(logits: Any) -> nn.Linear:
    """The LM head behind lazy logits.

    Raises:
        InterlockingError: full logits, whose cost is paid, or an LM head that is more than a linear map.
    """
    readout = logits.readout if isinstance(logits, LazyLogits) else None
    if isinstance(readout, nn.Linear):
        return readout
    seen = f"returns a {type(logits).__name__}" if readout is None else "caps or scales its logits, or is a product"
    raise InterlockingError(f'"aux_head.negatives" needs LazyLogits of a linear LM head; this head {seen}.')


def sampled_cross_entropy(
    logits: LazyLogits, labels: Tensor, tokens: Tensor, log_inclusion: Tensor, *, ignore_index: int = -100
) -> Tensor:
    """Mean cross-entropy in nats over the label and the drawn tokens; a scalar, by ordinary autograd.

    Args:
        logits: [..., V], of an LM head that is one linear map.
        labels: [...]; those equal to ``ignore_index`` do not count.
        tokens: drawn, different, [S].
        log_inclusion: ln π of each, [S].

    Returns:
        fp32 or more; 0 with zero gradients if no label counts.

    Raises:
        InterlockingError: see :func:`linear_readout`.
    """
    readout = linear_readout(logits)
    hidden, labels = logits.hidden.flatten(0, -2), labels.flatten()
    tokens, log_inclusion = tokens.to(labels.device), log_inclusion.to(labels.device)
    counted = labels != ignore_index
    classes = torch.cat([tokens, labels.masked_fill(~counted, 0)])
    weights = F.embedding(classes, readout.weight)  # one gather: its gradient is one tensor of the LM head's size
    biases = None if readout.bias is None else readout.bias[classes]
    of_labels = weights[len(tokens) :], None if biases is None else biases[len(tokens) :]
    drawn = weights[: len(tokens)], None if biases is None else biases[: len(tokens)]
    chunk = max(1, CHUNK_LOGITS // len(tokens))
    losses = []
    for rows in (slice(start, start + chunk) for start in range(0, len(hidden), chunk)):
        label_weight, label_bias = of_labels[0][rows], None if of_labels[1] is None else of_labels[1][rows]
        inputs = hidden[rows], labels[rows], label_weight, label_bias, *drawn, tokens, log_inclusion
        if len(hidden) > chunk:  # computed again backward, so that one chunk's logits exist at a time
            losses.append(checkpoint(_losses, *inputs, use_reentrant=False))
        else:
            losses.append(_losses(*inputs))
    return torch.cat(losses).masked_fill(~counted, 0.0).sum() / counted.sum().clamp(min=1)


def _losses(
    hidden: Tensor,
    labels: Tensor,
    label_weight: Tensor,
    label_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    log_inclusion: Tensor,
) -> Tensor:
    """ln Z - o_y of each row, [n]; hidden and label_weight [n, H], weight [S, H]."""
    own = (hidden * label_weight).sum(-1)
    others = hidden @ weight.T
    if label_bias is not None and bias is not None:
        own, others = own + label_bias, others + bias
    dtype = torch.promote_types(own.dtype, torch.float32)
    own, others = own.to(dtype), others.to(dtype) - log_inclusion
    others = others.masked_fill(tokens == labels.unsqueeze(1), -torch.inf)
    return torch.logaddexp(own, others.logsumexp(-1)) - own
