"""bf16 weights with fp32 copies, which the optimizer trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ibp_deepspeed.single_process.reference import InterlockedReference, trained_parameters


class FullPrecisionSums(InterlockedReference):
    """A reference that sums bf16 gradients in fp32, for fp32 master copies of its bf16 weights."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._masters: dict[nn.Parameter, nn.Parameter] = {}
        for k in range(len(self.stages)):
            for parameter in self.parameters(k):
                if parameter.dtype == torch.bfloat16:
                    self._masters[parameter] = nn.Parameter(parameter.detach().float())

    @property
    def has_masters(self) -> bool:
        """Whether weights have fp32 copies."""
        return bool(self._masters)

    def master(self, parameter: nn.Parameter) -> nn.Parameter:
        """A weight's fp32 copy, or the weight itself where it has none."""
        return self._masters.get(parameter, parameter)

    def masters(self, stage: int) -> list[nn.Parameter]:
        """What the optimizer of a stage trains: the weights, or their fp32 copies."""
        return [parameter for part in self.masters_by_part(stage) for parameter in part]

    def masters_by_part(self, stage: int) -> list[list[nn.Parameter]]:
        """The same, apart: of the trunk, and of the head if there is one."""
        parts = [trained_parameters(module) for module in self.modules(stage)]
        return [[self.master(p) for p in part] for part in parts]

    @torch.no_grad()
    def masters_to_weights(self) -> None:
        """After a step: round the master weights."""
        for weight, master in self._masters.items():
            weight.copy_(master)

    @torch.no_grad()
    def set_masters(self, parameters: Sequence[nn.Parameter], values: Sequence[Tensor] | None) -> None:
        """After loading the weights: their fp32 copies as saved, or made of them."""
        for parameter, value in zip(parameters, values or parameters, strict=True):
            self.master(parameter).copy_(value)

    def _add_gradient(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        master = self.master(parameter)
        super()._add_gradient(master, gradient.to(master.dtype))
