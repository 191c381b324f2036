"""Reconstruction of the input beside the label: InfoPro (Wang et al. 2021, arXiv:2101.10832).

A module that learns from its own label alone drops what later ones would need of the input. So a small decoder also has
to find the input again, less and less with depth. Here the input at a position is the token itself.
"""

from __future__ import annotations

from typing import Any, Self

import torch.nn.functional as F
from torch import Tensor

from ibp_deepspeed.config.interlocking import AuxHeadConfig
from ibp_deepspeed.config.objectives import ReconstructionOptions
from ibp_deepspeed.objectives.cross_entropy import CausalLMLoss, LogitsBeside
from ibp_deepspeed.objectives.head import LossFn, Objective

IGNORED = -100


class Reconstruction(Objective):
    """Prediction + λ · cross-entropy of the input tokens, each at its own position; measured by prediction.

    Attributes:
        depth: the part of the model's decoder layers before the head: λ is ``weight`` · (1 - depth).
    """

    name = "reconstruction"
    depth = 0.0
    _weight = 1.0
    _exact = CausalLMLoss()

    def configured(self, options: AuxHeadConfig | None, loss_fn: LossFn | None) -> Self:
        """Overrides Objective's: with the weight."""
        super().configured(options, loss_fn)
        if options is not None and isinstance(options.objective, ReconstructionOptions):
            self._weight, self._exact = options.objective.weight, CausalLMLoss(options.chunk_tokens)
        return self

    @property
    def factor(self) -> float:
        """λ."""
        return self._weight * (1 - self.depth)

    def training_loss(self, outputs: Any, labels: Any, *, batch: int, micro_batch: int, index: int) -> Tensor:
        """Overrides Objective's; both parts are at the same positions, the prediction over the tokens that it takes.

        Raises:
            InterlockingError: the head gives no hidden states beside its logits.
        """
        where = {"batch": batch, "micro_batch": micro_batch, "index": index}
        prediction = super().training_loss(outputs, labels, **where)
        outputs = LogitsBeside.of(outputs, self.name)
        decoded, inputs = outputs.beside(outputs.states), inputs_of(labels)
        if self.positions is not None:
            decoded, inputs = self.positions.select(decoded, inputs, batch, index)
        return prediction + self.factor * self._exact(decoded, inputs)


def inputs_of(labels: Tensor) -> Tensor:
    """The input token of each position [B, S] as the labels of a row tell it: the label of the position before.

    -100 at the first position, and where that label does not count: which token stands there is not known.
    """
    return F.pad(labels[:, :-1], (1, 0), value=IGNORED)
