"""Other optimizers than AdamW, on virtual stages: Nesterov's momentum, Muon, Adam in a rotated basis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pytorch_optimizer import SOAP
from torch import nn

from ibp_deepspeed.optimizer.parameter_groups import parameter_groups
from ibp_deepspeed.single_process.virtual_pipeline import VirtualPipeline

LARGEST_BASIS = 1024
"""Sides of a matrix that are rotated; the vocabulary's is not."""


class Optimized(VirtualPipeline):
    """A pipeline of language models with one of these optimizers on every stage.

    Args:
        optimizer: AdamW (as the configuration says); NAdam (Nesterov's momentum); Muon (orthogonal updates of the
            layers' matrices); SOAP (Adam in the basis of the gradients' second moments from both sides,
            arXiv:2409.11321).
    """

    def __init__(self, *args: Any, optimizer: str, **more: Any) -> None:
        self._kind = optimizer
        super().__init__(*args, **more)

    def _optimizer(self, stage: int) -> torch.optim.Optimizer:
        """Overrides VirtualPipeline's, which makes the configuration's AdamW.

        Raises:
            ValueError: another name.
        """
        if self._kind == "AdamW":
            return super()._optimizer(stage)
        options = self.ds_config["optimizer"]["params"]
        rate, betas, decay = options["lr"], options["betas"], options["weight_decay"]
        parameters = self.reference.masters(stage)
        groups = parameter_groups(parameters, self.reference.interlocking.decay)
        if self._kind == "NAdam":
            momentum = (0.99, betas[1])
            return torch.optim.NAdam(groups, rate, momentum, weight_decay=decay, decoupled_weight_decay=True)
        if self._kind == "SOAP":
            basis: dict[str, Any] = {"max_precondition_dim": LARGEST_BASIS, "precondition_frequency": 10}
            return SOAP(groups, rate, tuple(betas), weight_decay=decay, **basis)
        if self._kind == "Muon":
            sizes = (p.numel() for k in range(len(self.reference.stages)) for p in self.reference.masters(k))
            return MuonAndAdamW(parameters, below=max(sizes), lr=rate, betas=betas, weight_decay=decay)
        raise ValueError(f"there is no optimizer {self._kind}: AdamW, NAdam, SOAP and Muon are known")


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon for the matrices of the layers, AdamW for embedding, LM heads and vectors, as Muon is used.

    Args:
        parameters: of a stage.
        below: elements of an embedding and LM head; smaller matrices are the layers'.
        lr: of both: Muon's updates are scaled to AdamW's size (arXiv:2502.16982, section 2.2).
        betas: AdamW's.
        weight_decay: of matrices, the embedding among them.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        *,
        below: int,
        lr: float,
        betas: Sequence[float],
        weight_decay: float,
    ) -> None:
        orthogonal = [p for p in parameters if p.dim() == 2 and p.numel() < below]
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
