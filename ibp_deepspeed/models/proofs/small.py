"""A small model's config with every kind of layer that the given one has, and as few of each as can be."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from ibp_deepspeed.models.config import per_layer_lists, with_layers
from ibp_deepspeed.models.errors import ModelError, in_words
from ibp_deepspeed.models.proofs.kind import attention_to_prove
from ibp_deepspeed.models.proofs.sizes import small_sizes
from ibp_deepspeed.models.shell import Shell

_FEWEST = 2  # so that the order of layers matters
_MOST = 2_000_000  # parameters a layer
_NUMBER_OF_LAYER = re.compile(r"(layer|block).*(idx|id|index|number|num)|^(idx|index)$")


def small_config(config: PretrainedConfig) -> PretrainedConfig:
    """A config of a model that is small in every direction and has all that the given one's layers have.

    Raises:
        ModelError: it can't be made smaller, or cut.
    """
    if config.to_dict().get("per_layer_config"):
        raise _no_small_model(config, ModelError("its layers have sizes of their own (per_layer_config)"))
    try:
        narrow = type(config).from_dict(small_sizes(config))
        narrow._attn_implementation = attention_to_prove(config)
    except Exception as error:  # a config class may refuse its values with any kind of error
        raise _no_small_model(config, error) from error
    shell = Shell(narrow)
    elements = sum(parameter.numel() for parameter in shell.layers[:1].parameters())
    elements += sum(parameter.numel() for parameter in shell.model.parameters()) // len(shell.layers)
    if elements > _MOST:
        raise _no_small_model(config, ModelError(f"it would have {elements:,} parameters a layer"))
    kinds = _kinds(shell.layers, narrow)
    firsts = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    while len(firsts) < min(_FEWEST, len(kinds)):
        firsts.append(next(index for index in range(len(kinds)) if index not in firsts))
    firsts.sort()
    chosen = _with(narrow, firsts, [kinds[index] for index in firsts])
    chosen = chosen or _with(narrow, range(firsts[-1] + 1), kinds[: firsts[-1] + 1])
    if chosen is None:
        return narrow
    return chosen


def _with(narrow: PretrainedConfig, layers: Sequence[int], kinds: list[Any]) -> PretrainedConfig | None:
    """The config with these layers of it, if they are then of these kinds."""
    try:
        config = with_layers(narrow, layers)
        made = Shell(config).layers
    except Exception:  # its class may refuse other numbers of layers with any kind of error; then all are kept
        return None
    same = [kind[:-1] for kind in _kinds(made, config)] == [
        kind[:-1] for kind in kinds
    ]  # entries of lists are chosen, or a pattern
    return config if same else None


def _no_small_model(config: PretrainedConfig, error: Exception) -> ModelError:
    return ModelError(
        f"the cut of model type '{config.model_type}' can't be proved, because no small model of this config can be "
        f"made: {in_words(error)}"
    )


def _kinds(layers: nn.ModuleList, config: PretrainedConfig) -> list[tuple[Any, ...]]:
    return [_kind(layer, entries) for layer, entries in zip(layers, _entries(config, len(layers)), strict=True)]


def _entries(config: PretrainedConfig, layers: int) -> list[list[Any]]:
    """What lists of the config with an entry for each layer say of each."""
    values = config.to_dict()
    lists = [values[name] for name in per_layer_lists(config)]
    return [[repr(value[index]) for value in lists if len(value) == layers] for index in range(layers)]


def _kind(layer: nn.Module, entries: list[Any]) -> tuple[Any, ...]:
    """What tells layers apart: modules, shapes, the config's lists, and what modules remember besides."""
    shapes = tuple((name, tuple(tensor.shape)) for name, tensor in layer.state_dict().items())
    notes = tuple(
        (path, name, value if isinstance(value, bool | str | None) else type(value).__name__)
        for path, module in layer.named_modules()
        for name, value in sorted(vars(module).items())
        if not name.startswith("_") and not _NUMBER_OF_LAYER.search(name)
        and isinstance(value, bool | str | int | float | None)
    )  # fmt: skip
    return str(layer), shapes, notes, tuple(entries)
