"""Label smoothing (Szegedy et al. 2016, arXiv:1512.00567, section 7): targets that are not certain of the label."""

from __future__ import annotations

from typing import Any, Self

from torch import Tensor

from ibp_deepspeed.config.interlocking import AuxHeadConfig
from ibp_deepspeed.config.objectives import LabelSmoothingOptions
from ibp_deepspeed.objectives.cross_entropy import CausalLMLoss
from ibp_deepspeed.objectives.head import LossFn, Objective


class LabelSmoothing(Objective):
    """Cross-entropy with targets of 1 - ε at the label and ε spread evenly over the vocabulary; measured without ε."""

    name = "label_smoothing"
    _soft = CausalLMLoss()

    def configured(self, options: AuxHeadConfig | None, loss_fn: LossFn | None) -> Self:
        """Overrides Objective's: with ε."""
        super().configured(options, loss_fn)
        if options is not None and isinstance(options.objective, LabelSmoothingOptions):
            self._soft = CausalLMLoss(options.chunk_tokens, options.objective.smoothing)
        return self

    def loss(self, outputs: Any, labels: Any) -> Tensor:
        """The mean over labels that count, of full or lazy logits."""
        return self._soft(outputs, labels)
