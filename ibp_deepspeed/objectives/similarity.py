"""Prediction and similarity matching, "predsim" (Nøkland and Eidnes 2019, arXiv:1901.06656).

Tokens with the same label are to have similar hidden states, others not: the correlations of what a linear map makes of
the states are drawn to those of the labels' one-hot vectors.
"""

from __future__ import annotations

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ibp_deepspeed.config.interlocking import AuxHeadConfig
from ibp_deepspeed.config.objectives import PredSimOptions
from ibp_deepspeed.objectives.cross_entropy import LogitsBeside
from ibp_deepspeed.objectives.head import LossFn, Objective
from ibp_deepspeed.rng import generator_of


class PredSim(Objective):
    """(1 - β) · prediction + β · similarity matching over some tokens of the micro-batch; measured by prediction.

    The draw of tokens depends on the seed, the batch, the micro-batch and the loss alone: runs repeat, replicas agree.
    """

    name = "predsim"
    _options = PredSimOptions()
    _seed = 0

    def configured(self, options: AuxHeadConfig | None, loss_fn: LossFn | None) -> Self:
        """Overrides Objective's: with β and the number of tokens."""
        super().configured(options, loss_fn)
        if options is not None and isinstance(options.objective, PredSimOptions):
            self._options, self._seed = options.objective, options.aux_tokens_seed
        return self

    def training_loss(self, outputs: Any, labels: Any, *, batch: int, micro_batch: int, index: int) -> Tensor:
        """Overrides Objective's; the prediction is at the positions and over the tokens that it takes.

        Raises:
            InterlockingError: the head gives no hidden states beside its logits.
        """
        where = {"batch": batch, "micro_batch": micro_batch, "index": index}
        prediction = super().training_loss(outputs, labels, **where)
        outputs = LogitsBeside.of(outputs, self.name)
        drawn = self.drawn(labels.numel(), **where).to(labels.device)
        states = outputs.beside(outputs.states.flatten(0, -2)[drawn])
        similarity = similarity_loss(states, labels.flatten()[drawn], outputs.vocabulary)
        return (1 - self._options.beta) * prediction + self._options.beta * similarity

    def drawn(self, positions: int, *, batch: int, micro_batch: int, index: int) -> Tensor:
        """At most ``tokens`` different ones of a micro-batch's positions, on the CPU. int64"""
        generator = generator_of(self._seed, batch, micro_batch, index)
        return torch.randperm(positions, generator=generator)[: self._options.tokens]


def similarity_loss(states: Tensor, labels: Tensor, vocabulary: int, *, ignore_index: int = -100) -> Tensor:
    """Mean squared difference of the correlations of states [n, H] and of the one-hot vectors of labels [n].

    Two one-hot vectors of V entries have the correlation 1 if they are equal, and -1 / (V - 1) otherwise.

    Returns:
        A scalar in fp32 or more, over all pairs of tokens whose labels count; 0 with zero gradients if none does.
    """
    states = states.to(torch.promote_types(states.dtype, torch.float32))
    centred = F.normalize(states - states.mean(-1, keepdim=True), dim=-1, eps=1e-8)
    equal = labels.unsqueeze(0) == labels.unsqueeze(1)
    wanted = torch.where(equal, 1.0, -1.0 / (vocabulary - 1)).to(states.dtype)
    counted = labels != ignore_index
    pairs = counted.unsqueeze(0) & counted.unsqueeze(1)
    differences = (centred @ centred.T - wanted).masked_fill(~pairs, 0.0)
    return differences.square().sum() / pairs.sum().clamp(min=1)
