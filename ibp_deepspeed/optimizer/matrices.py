"""The matrices inside a model, which Muon trains."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from ibp_deepspeed.optimizer.parameter_groups import Decay, parameter_groups


def inner_matrices(layers: Sequence[Any], *, first: bool, last: bool, head: nn.Module | None) -> list[nn.Parameter]:
    """Trained matrices of a stage that are neither of the model's first layer nor of its last one or of an LM head.

    Args:
        layers: of the stage, modules and functions.
        first: whether it is the first stage, whose first layer is the embedding.
        last: whether it is the last one, whose last layer is the LM head.
        head: of the stage; its ``blocks``, if it has such, are inner layers too.
    """
    inner = layers[1 if first else 0 : len(layers) - 1 if last else len(layers)]
    modules = [layer for layer in inner if isinstance(layer, nn.Module)]
    blocks = getattr(head, "blocks", None)
    modules += [blocks] if isinstance(blocks, nn.Module) else []
    found = {id(p): p for module in modules for p in module.parameters() if p.requires_grad and p.dim() == 2}
    return list(found.values())


def muon_groups(
    parameters: Iterable[nn.Parameter], matrices: Iterable[nn.Parameter], decay: Decay
) -> list[dict[str, Any]]:
    """Groups for :class:`~ibp_deepspeed.optimizer.muon.Muon`: matrices by their columns, then AdamW's.

    Args:
        parameters: a stage's trained ones.
        matrices: those of them that Muon is to train; all of them decay.
        decay: which of the others decay.
    """
    given, chosen = list(parameters), {id(p) for p in matrices}
    by_columns: dict[int, list[nn.Parameter]] = {}
    for parameter in given:
        if id(parameter) in chosen:
            by_columns.setdefault(parameter.shape[1], []).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": alike, "use_muon": True, "columns": columns} for columns, alike in by_columns.items()
    ]
    others = parameter_groups([p for p in given if id(p) not in chosen], decay)
    return groups + [{**group, "use_muon": False} for group in others]
