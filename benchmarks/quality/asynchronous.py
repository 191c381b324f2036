"""Asynchronous backpropagation, the rival without a bubble: gradients of weights that are some batches old.

A 1F1B pipeline that never drains keeps two sets of weights (PipeDream-2BW, arXiv:2006.09503, section 3.1): the
gradients of a batch are those of the weights ⌈(K-1)/M⌉ batches ago, on all stages alike, and are applied to today's.
Published corrections change the optimizer: Nesterov's momentum (arXiv:2505.01099: torch's NAdam, momentum 0.99), and
orthogonal updates of the matrices (Muon, arXiv:2606.30634).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ibp_deepspeed.optimizer.parameter_groups import parameter_groups
from ibp_deepspeed.single_process.virtual_pipeline import VirtualPipeline

OPTIMIZERS = ("AdamW", "NAdam", "Muon")


class Asynchronous(VirtualPipeline):
    """One stage (K - 1 boundaries don't change the numbers) whose gradients come late.

    Attributes:
        delay: batches; 0 is ordinary backpropagation. The first batches see the initial weights.
    """

    def __init__(self, *args: Any, delay: int, optimizer: str, **more: Any) -> None:
        self.delay, self._kind = delay, optimizer
        super().__init__(*args, **more)
        self._older: deque[list[Tensor]] = deque(maxlen=delay + 1)

    def _accumulate(self, micro_batches: Sequence[tuple[Any, Any]]) -> Tensor:
        """Overrides VirtualPipeline's: at the weights of ``delay`` batches ago."""
        parameters = self.reference.parameters(0)
        today = [parameter.detach().clone() for parameter in parameters]
        self._older.append(today)
        _set(parameters, self._older[0])
        losses = super()._accumulate(micro_batches)
        _set(parameters, today)
        return losses

    def _optimizer(self, stage: int) -> torch.optim.Optimizer:
        """Overrides VirtualPipeline's: the configuration's AdamW, or what is to correct for the delay."""
        if self._kind == "AdamW":
            return super()._optimizer(stage)
        options = self.ds_config["optimizer"]["params"]
        parameters = self.reference.masters(stage)
        if self._kind == "NAdam":
            groups = parameter_groups(parameters, self.reference.interlocking.decay)
            decay = {"weight_decay": options["weight_decay"], "decoupled_weight_decay": True}
            return torch.optim.NAdam(groups, lr=options["lr"], betas=(0.99, options["betas"][1]), **decay)
        return MuonAndAdamW(parameters, lr=options["lr"], betas=options["betas"], weight_decay=options["weight_decay"])


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon for the matrices of the layers, AdamW for embedding, LM head and vectors, as Muon is used.

    Args:
        parameters: of a language model; the largest matrices are its embedding and LM head.
        lr: of both: Muon's updates are scaled to AdamW's size (arXiv:2502.16982, section 2.2).
        betas: AdamW's.
        weight_decay: of matrices, the embedding among them.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, lr: float, betas: Sequence[float], weight_decay: float):
        largest = max(p.numel() for p in parameters)
        orthogonal = [p for p in parameters if p.dim() == 2 and p.numel() < largest]
        kept = {id(p) for p in orthogonal}
        others = parameter_groups([p for p in parameters if id(p) not in kept], "matrices")
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(orthogonal, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=lr, betas=(betas[0], betas[1]), weight_decay=weight_decay),
        ]
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """A step of both, with the rates that stand in their common groups."""
        for part in self.parts:
            part.step()


@torch.no_grad()
def _set(parameters: Iterable[nn.Parameter], values: Iterable[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
