"""Which parameters decay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ibp_deepspeed.optimizer.parameter_groups import parameter_groups


class Parts(nn.Module):
    """One parameter of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm, self.linear = nn.Embedding(3, 2), nn.LayerNorm(2), nn.Linear(2, 4)
        self.temperature = nn.Parameter(torch.ones(1))


def names(module: nn.Module, groups: list[dict[str, Any]]) -> list[tuple[list[str], float | None]]:
    known = {parameter: name for name, parameter in module.named_parameters()}
    return [([known[p] for p in group["params"]], group.get("weight_decay")) for group in groups]


def test_matrices_and_embeddings_decay_and_nothing_else() -> None:
    module = Parts()
    expected = [
        (["embedding.weight", "linear.weight"], None),
        (["temperature", "norm.weight", "norm.bias", "linear.bias"], 0.0),
    ]
    assert names(module, parameter_groups(module.parameters(), "matrices")) == expected


def test_all_is_one_group_in_the_modules_order() -> None:
    module = Parts()
    every = [name for name, _ in module.named_parameters()]
    assert names(module, parameter_groups(module.parameters(), "all")) == [(every, None)]


@pytest.mark.parametrize("decay", ["matrices", "all"])
def test_no_group_is_empty(decay: Any) -> None:
    """DeepSpeed removes empty groups, and a checkpoint's groups are counted."""
    norm = nn.LayerNorm(2)
    assert len(parameter_groups(norm.parameters(), decay)) == 1 and parameter_groups([], decay) == []
