"""Which layers of a model are alike, so that one of each kind tells what all of them cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from ibp_deepspeed.models.config import per_layer_lists


def first_of_kind(layers: Sequence[nn.Module], hf_config: PretrainedConfig) -> list[int]:
    """For each decoder layer the first one that is like it: it is made of the same modules, its parameters have the
    same shapes, and lists of the config with an entry for each layer (attention types, layers without positions, …)
    have the same entry.

    Args:
        layers: decoder layers, on any device.
        hf_config: of the model.
    """
    lists = hf_config.to_dict()
    values = [lists[name] for name in per_layer_lists(hf_config)]
    seen: dict[Any, int] = {}
    return [seen.setdefault(_kind(layer, [value[i] for value in values]), i) for i, layer in enumerate(layers)]


def _kind(layer: nn.Module, entries: list[Any]) -> tuple[Any, ...]:
    shapes = tuple((name, tuple(parameter.shape)) for name, parameter in layer.named_parameters())
    return str(layer), shapes, repr(entries)
