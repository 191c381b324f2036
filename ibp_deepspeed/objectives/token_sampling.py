"""Auxiliary losses on a part of the positions: a head costs H·V for each of them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ibp_deepspeed.config.interlocking import AuxHeadConfig
from ibp_deepspeed.errors import InterlockingError
from ibp_deepspeed.objectives.cross_entropy import LazyLogits
from ibp_deepspeed.rng import generator_of


class TokenSample:
    """⌈r·T⌉ of the T positions of a micro-batch, another draw for each batch and each loss.

    The draw depends on the seed, the batch and the loss alone, so that runs repeat, and data-parallel ranks agree;
    all micro-batches of a batch use the same positions.

    Args:
        fraction: r, above 0, below 1.
        seed: of all draws.
    """

    def __init__(self, fraction: float, seed: int) -> None:
        self._fraction, self._seed = fraction, seed

    @classmethod
    def from_options(cls, options: AuxHeadConfig) -> TokenSample | None:
        """What a configuration asks for; None if heads use all positions."""
        return None if options.aux_tokens == 1.0 else cls(options.aux_tokens, options.aux_tokens_seed)

    def positions(self, batch: int, loss: int, tokens: int) -> Tensor:
        """Positions 0 … tokens - 1 that count in batch ``batch`` for loss ``loss``, rising. int64"""
        generator = generator_of(self._seed, batch, loss)
        return torch.randperm(tokens, generator=generator)[: math.ceil(self._fraction * tokens)].sort().values

    def select(self, outputs: Any, labels: Tensor, batch: int, loss: int) -> tuple[LazyLogits, Tensor]:
        """A head's outputs [..., V] and labels [...] at these positions, [n, V] and [n].

        Raises:
            InterlockingError: the head returns full logits, whose cost is already paid.
        """
        if not isinstance(outputs, LazyLogits):
            raise InterlockingError(
                f'"aux_head.aux_tokens" needs heads that return LazyLogits, not a {type(outputs).__name__}.'
            )
        positions = self.positions(batch, loss, labels.numel()).to(labels.device)
        rows = outputs.hidden.reshape(-1, outputs.hidden.shape[-1])[positions]
        return LazyLogits(rows, outputs.readout, outputs.parameters), labels.reshape(-1)[positions]
