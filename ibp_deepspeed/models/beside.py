"""What a head has beside its LM head because its objective trains it; no exit needs it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ibp_deepspeed.config.objectives import ObjectiveOptions
from ibp_deepspeed.models.shell import Shell
from ibp_deepspeed.objectives.cross_entropy import LazyLogits
from ibp_deepspeed.stage.weight_gradients import WeightGradients


def beside_of(shell: Shell, objective: ObjectiveOptions) -> nn.Module | None:
    """On meta, for hidden states [..., H]; None: the objective needs nothing."""
    size, dtype = shell.hf_config.hidden_size, shell.readout.weight.dtype
    if objective.name == "predsim":
        return _linear(size, size, dtype)
    if objective.name == "reconstruction":
        return InputDecoder(shell)
    return None


class InputDecoder(nn.Module):
    """Hidden states [..., H] → lazy logits [..., V] of the input tokens: a norm of the model's kind, H → H/8 → V."""

    def __init__(self, shell: Shell) -> None:
        super().__init__()
        size, dtype = shell.hf_config.hidden_size, shell.readout.weight.dtype
        inner = inner_size(size)
        self.norm = shell.copy_of(shell.norm) if shell.norm is not None else nn.Identity()
        self.inner = _linear(size, inner, dtype)
        self.outer = _linear(inner, shell.hf_config.vocab_size, dtype)

    def forward(self, hidden: Tensor) -> LazyLogits:
        return LazyLogits(self.inner(self.norm(hidden)), self.outer, tuple(self.outer.parameters()))

    def split_backward(self, weight_gradients: WeightGradients) -> None:
        """Nothing: the loss takes the gradients of the map to the tokens chunk by chunk."""


def inner_size(hidden_size: int) -> int:
    """Of an :class:`InputDecoder`."""
    return max(1, hidden_size // 8)


def _linear(inputs: int, outputs: int, dtype: torch.dtype) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False, dtype=dtype, device="meta")
