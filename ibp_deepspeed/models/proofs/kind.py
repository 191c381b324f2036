"""What of a config decides how its model computes: configs of one kind need one proof."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

from ibp_deepspeed.models.config import DEPTHS, LAYER_NUMBERS, per_layer_lists
from ibp_deepspeed.models.errors import ModelError, in_words
from ibp_deepspeed.models.proofs.sizes import small_sizes

_MANY = 64  # a larger number is a size, whatever its name
_DIGITS = 16
_NO_MATTER = {*DEPTHS, "decoder_layers", "encoder_layers", "attention_types"}
_NO_MATTER |= {"use_cache", "return_dict", "initializer_range"}


def kind_of(config: PretrainedConfig) -> str:
    """A digest of a config's switches, of the kinds of its layers, and of its attention; sizes don't count.

    Of numbers counts whether they are 0, 1 or another, of small whole ones which they are.

    Raises:
        ModelError: a config whose values can't be read as one model's.
    """
    try:
        return _digest(config)
    except Exception as error:  # configs whose layers have values of their own, by any kind of error
        raise ModelError(
            f"a config of model type '{config.model_type}' has no values of a whole model: {in_words(error)}"
        ) from error


def attention_to_prove(config: PretrainedConfig) -> str | None:
    """Eager if the config says so, else what transformers chooses, mostly sdpa: other kernels have no place on a CPU."""
    return "eager" if config._attn_implementation == "eager" else None


def _digest(config: PretrainedConfig) -> str:
    values = small_sizes(config)
    lists = [values.pop(name) for name in per_layer_lists(config) if isinstance(values.get(name), list)]
    layers = sorted({repr([entries[index] for entries in lists]) for index in range(min(map(len, lists), default=0))})
    for name in LAYER_NUMBERS & values.keys():
        values[name] = bool(values[name])
    kept = {name: value for name, value in values.items() if name not in _NO_MATTER and not name.endswith("_token_id")}
    described = {"layers": layers, "attention": attention_to_prove(config) or "sdpa", **_plain(kept)}
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:_DIGITS]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return sorted({json.dumps(_plain(entry), sort_keys=True) for entry in value})
    if isinstance(value, bool | str | None):
        return value
    if isinstance(value, int | float):
        whole = value == int(value) if abs(value) <= _MANY else False
        return int(value) if whole and (isinstance(value, int) or value in (0, 1)) else "another number"
    return str(value)
