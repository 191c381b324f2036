"""Heads that look ahead through a slow copy of the layers behind them (Momentum Auxiliary Network, arXiv:2407.05623).

a_k(h) = readout(norm(f̄(h) + B h)): f̄ is an exponential average of the first layers of the next stage, which no loss
trains here; B, norm and LM head are the head's own. The average is shipped as copies of LM heads are: taken every
``INTERVAL`` batches, used as many batches later. So no gradient crosses the boundary and no message is waited for.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.quality.optimizers import Optimized
from ibp_deepspeed.single_process.reference import Sample

INTERVAL = 10
BETA = 0.95
"""Of the average, for each copy: as the paper's 0.995 for each batch."""


class SlowLayers(nn.Module):
    """f̄(h) + B h.

    Args:
        layers: what f̄ starts as, and follows.
        width: H.

    Attributes:
        correction: B, 0 at first.
    """

    def __init__(self, layers: Sequence[nn.Module], width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*copy.deepcopy(list(layers))).requires_grad_(False)
        self.correction = nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.correction.weight)
        self._followed = [parameter for layer in layers for parameter in layer.parameters()]
        self._taken = [parameter.detach().clone() for parameter in self._followed]

    def forward(self, hidden: Tensor) -> Tensor:
        return self.layers(hidden) + self.correction(hidden)

    @torch.no_grad()
    def refresh(self) -> None:
        """Use the copy that was taken last time, and take another."""
        for slow, taken, now in zip(self.layers.parameters(), self._taken, self._followed, strict=True):
            slow.copy_(taken)
            taken.lerp_(now, 1 - BETA)


class MomentumHeads(Optimized):
    """A pipeline whose heads' blocks are slow copies of the next stage's first layers.

    Args:
        stages, aux_heads: of language models; the heads have as many blocks as layers are copied.
        more, optimizer: see :class:`Optimized`.
    """

    def __init__(self, stages: Sequence[nn.Sequential], aux_heads: Sequence[Any], *more: Any, optimizer: str) -> None:
        self._slow: list[SlowLayers] = []
        for k, objective in enumerate(aux_heads):
            if objective is not None:
                head = objective.module
                following = list(chain.from_iterable(stages[k + 1 :]))[: len(head.blocks)]
                width = next(iter(head.norm.parameters())).numel()
                self._slow.append(SlowLayers(following, width))
                head.blocks = self._slow[-1]
        super().__init__(stages, aux_heads, *more, optimizer=optimizer)

    def _accumulate(self, micro_batches: Sequence[Sample]) -> Tensor:
        """Overrides VirtualPipeline's: first another copy, when it is time."""
        if self.global_steps and self.global_steps % INTERVAL == 0:
            for slow in self._slow:
                slow.refresh()
        return super()._accumulate(micro_batches)
