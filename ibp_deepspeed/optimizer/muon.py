"""Muon for the matrices inside a model, AdamW for all else, at one learning rate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam, muon_update
from torch import Tensor

AS_ADAMW = 0.2
"""Root mean square of an update's entries at rate 1: that of AdamW's in practice (arXiv:2502.16982, section 2.2)."""


class Muon(MuonWithAuxAdam):  # type: ignore[misc]
    """DeepSpeed's Muon with updates as large as AdamW's, so that one rate and one schedule are right for both.

    DeepSpeed's orthogonal update of a matrix of n columns has entries of about n^(-1/2), whatever its rows; here it is
    multiplied by 0.2 n^(1/2). It is DeepSpeed's class because BF16_Optimizer recognizes that: it orthogonalizes whole
    matrices where replicas share the optimizer's state, and leaves the update in the place of the gradient.

    Args:
        params: parameter groups of :func:`~ibp_deepspeed.optimizer.matrices.muon_groups`.
        lr: learning rate.
        momentum: of matrices.
        betas, eps: AdamW's.
        weight_decay: of both, in groups that say nothing else.
        fused: whether AdamW is torch's fused one.
        ns_method: how DeepSpeed orthogonalizes: ``gram`` (in fp16 where the device has it) or ``standard`` (bf16).

    Raises:
        ValueError: a value out of its range.
    """

    def __init__(
        self,
        params: Iterable[Mapping[str, Any]],
        lr: float = 1e-3,
        momentum: float = 0.95,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        fused: bool | None = None,
        ns_method: str = "gram",
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum is {momentum}: give a number from 0 to below 1")
        if ns_method not in ("gram", "standard"):
            raise ValueError(f"ns_method is {ns_method!r}: give gram or standard")
        common = {"lr": lr, "weight_decay": weight_decay}
        of_matrices = {**common, "momentum": momentum, "ns_method": ns_method}
        of_others = {**common, "betas": (betas[0], betas[1]), "eps": eps}
        groups = [{**(of_matrices if group["use_muon"] else of_others), **group} for group in params]
        # not DeepSpeed's own: it sorts matrices by size, and checkpoints name parameters in their order
        torch.optim.Optimizer.__init__(self, groups, {})
        self._aux_param_groups = [group for group in self.param_groups if not group["use_muon"]]
        self.aux_optimizer = None
        if self._aux_param_groups:
            self.aux_optimizer = torch.optim.AdamW(self._aux_param_groups, fused=fused)
            self.aux_optimizer.state = self.state

    @torch.no_grad()
    def step(self, closure: Any = None, step_id: Any = None) -> None:
        """Overrides MuonWithAuxAdam's, which makes gradients of zeros where there are none: a step that is left out
        (:func:`~ibp_deepspeed.optimizer.gradient_norm.drop_gradients`) would move weights and moments."""
        with eagerly():
            for group in self.param_groups:
                for parameter in group["params"] if group["use_muon"] else ():
                    if parameter.grad is not None:
                        parameter.mul_(1 - group["lr"] * group["weight_decay"])
                        update = self._orthogonal(parameter, group)
                        parameter.add_(update, alpha=-group["lr"] * AS_ADAMW * group["columns"] ** 0.5)
        if self.aux_optimizer is not None:
            self.aux_optimizer.step()

    def _orthogonal(self, parameter: Tensor, group: Mapping[str, Any]) -> Tensor:
        if parameter.dim() < 2:  # flat: BF16_Optimizer has put the update there
            return parameter.grad  # type: ignore[return-value]
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        # a copy, because DeepSpeed's function writes into what it is given
        how = {"beta": group["momentum"], "ns_method": group["ns_method"]}
        update: Tensor = muon_update(gradient.clone(), state["momentum_buffer"], **how)
        return update


def eagerly() -> Any:
    """A context in which DeepSpeed's functions for Muon, which it marks for torch.compile, run as they are: products
    of matrices gain nothing, and every process would compile them anew for each shape, or fail without a compiler."""
    return torch.compiler.set_stance("force_eager")
