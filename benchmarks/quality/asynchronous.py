"""Asynchronous backpropagation, the rival without a bubble: gradients of weights that are some batches old.

A 1F1B pipeline that never drains keeps two sets of weights (PipeDream-2BW, arXiv:2006.09503, section 3.1): the
gradients of a batch are those of the weights ⌈(K-1)/M⌉ batches ago, on all stages alike, and are applied to today's.
Published corrections change the optimizer: Nesterov's momentum (arXiv:2505.01099: torch's NAdam, momentum 0.99),
orthogonal updates of the matrices (Muon, arXiv:2606.30634), and Adam in a rotated basis (arXiv:2602.03515).

Modules of G stages that never drain are late by ⌈(G-1)/M⌉ batches alone, however many modules there are: no gradient
passes from one to another.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.quality.optimizers import Optimized
from ibp_deepspeed.single_process.reference import Sample


class Asynchronous(Optimized):
    """Stages whose gradients come late; for backpropagation one stands for all, boundaries don't change the numbers.

    Attributes:
        delay: batches; 0 is ordinary backpropagation. The first batches see the initial weights.
    """

    def __init__(self, *args: Any, delay: int, **more: Any) -> None:
        self.delay = delay
        super().__init__(*args, **more)
        self._older: deque[list[Tensor]] = deque(maxlen=delay + 1)

    def _accumulate(self, micro_batches: Sequence[Sample]) -> Tensor:
        """Overrides VirtualPipeline's: at the weights of ``delay`` batches ago."""
        parameters = [p for stage in range(self.num_stages) for p in self.reference.parameters(stage)]
        today = [parameter.detach().clone() for parameter in parameters]
        self._older.append(today)
        _set(parameters, self._older[0])
        losses = super()._accumulate(micro_batches)
        _set(parameters, today)
        return losses


@torch.no_grad()
def _set(parameters: Iterable[nn.Parameter], values: Iterable[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
