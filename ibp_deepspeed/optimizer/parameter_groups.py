"""Which parameters the optimizer's weight decay draws towards zero."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

Decay = Literal["matrices", "all"]

PLACEHOLDER = "nothing_to_train"
"""The name of the one number, used by nothing, that the optimizer of a stage without anything to train has."""


def parameter_groups(parameters: Iterable[nn.Parameter], decay: Decay) -> list[dict[str, Any]]:
    """Groups for an optimizer, none of them empty (DeepSpeed removes empty ones), each in the given order.

    Args:
        parameters: a stage's trained ones.
        decay: ``matrices``: those of two or more dimensions decay, embeddings among them, as in the trainings of GPT-2
            and Llama; norms, biases and temperatures, in a second group, do not. ``all``: one group, the optimizer's
            own decay for everything.
    """
    given = list(parameters)
    if decay == "all":
        return [{"params": given}] if given else []
    matrices, others = [p for p in given if p.dim() >= 2], [p for p in given if p.dim() < 2]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def settings_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Rates and the like of its groups, as they are now."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
