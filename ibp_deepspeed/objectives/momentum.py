"""A slow copy of what comes behind the exit, before its LM head: Momentum Auxiliary Network (arXiv:2407.05623).

A linear head judges a state by what can be read from it at once; later layers need what they can make use of. So the
head looks through the first layers of the next stage as they were some batches ago on average. Gradients go through
these copies to the state, and train none of them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Self

from ibp_deepspeed.config.interlocking import AuxHeadConfig
from ibp_deepspeed.config.objectives import MomentumOptions
from ibp_deepspeed.objectives.head import LossFn, Objective


class Momentum(Objective):
    """Cross-entropy of a_k(h) = readout(norm(f̄(h) + B h)); its module has the
    :class:`~ibp_deepspeed.objectives.slow_layers.SlowLayers` f̄(h) + B h."""

    name = "momentum"

    def configured(self, options: AuxHeadConfig | None, loss_fn: LossFn | None) -> Self:
        """Overrides Objective's: with the number of copied layers."""
        super().configured(options, loss_fn)
        if options is not None and isinstance(options.objective, MomentumOptions):
            self.needs = replace(self.needs, layers=options.objective.layers)
        return self
