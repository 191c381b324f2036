"""Model configs from a file, a folder or the hub, with overrides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from ibp_deepspeed.errors import first_line
from ibp_deepspeed.models.errors import ModelError

CONFIGS = Path(__file__).parent / "configs"
"""Of the models that are named in documentation, presets and benchmarks."""
# The number of decoder layers, as the model types call it.
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_DEEPEST = 10_000
# Lists with one entry per decoder layer, which have to follow a changed number of layers, as have those of words.
_PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers", "layer_rope_theta", "num_attention_heads_per_layer")
_OTHERS = ("architectures",)
# Lists of numbers of layers.
LAYER_NUMBERS = {"mlp_only_layers", "moe_layers", "full_attn_idxs", "attn_layer_indices"}


def load_config(path_or_name: str | Path, **overrides: Any) -> PretrainedConfig:
    """A Hugging Face config.

    Args:
        path_or_name: a JSON file with a ``model_type``, a folder with a ``config.json``, the name of a config that
            comes with the package (``llama-tiny``), or a name on the hub.
        overrides: values to set before the config is made, so that what it derives from them fits. The common
            names (``num_hidden_layers``, ``hidden_size``, …) work for all model types.

    Raises:
        ModelError: no config there, one that needs code of its own, an unknown override, or values that the config
            class refuses.
    """
    path_or_name = shipped(path_or_name) or path_or_name
    if str(path_or_name).endswith(".json") and not Path(path_or_name).exists():
        raise ModelError(f"no model config in '{path_or_name}': there is no such file")  # don't ask the hub for it
    try:
        values, _ = PretrainedConfig.get_config_dict(str(path_or_name))
        _refuse_own_code(path_or_name, values)
        check_depth(values)
        base = AutoConfig.from_pretrained(str(path_or_name), trust_remote_code=False)
    except ModelError:
        raise
    except Exception as error:  # a config class may refuse its values with any kind of error
        raise ModelError(f"no model config in '{path_or_name}': {first_line(error)}") from error
    return _changed(base, values, overrides, f"the config in '{path_or_name}'")


def shipped(name: str | Path) -> Path | None:
    """The file of a config that comes with the package, if a name stands for one and no file or folder has it."""
    path = CONFIGS / f"{name}.json"
    return path if Path(name).name == str(name) and not Path(name).exists() and path.exists() else None


def check_depth(values: Mapping[str, Any]) -> None:
    """Refuse values of a config whose layers would not end: classes make lists of them, and models each one.

    Raises:
        ModelError: it asks for more layers than any model has.
    """
    for name in DEPTHS:
        layers = values.get(name)
        if isinstance(layers, int) and layers > _DEEPEST:
            raise ModelError(f"the config asks for {layers!r:.40} layers ({name}): give {_DEEPEST:,} at most")


def _refuse_own_code(path_or_name: str | Path, values: Mapping[str, Any]) -> None:
    """Python files in a model's folder are never run: what can be cut are transformers' own architectures."""
    kind, code = values.get("model_type"), values.get("auto_map")
    if code and kind not in CONFIG_MAPPING:
        raise ModelError(
            f"the model in '{path_or_name}' needs Python code of its own ({_first_file(code)}; trust_remote_code in "
            f"transformers), which is never run here: no option turns it on, because a model type has to be one of "
            "transformers' own to be cut into stages"
        )


def _first_file(code: Any) -> Any:
    return next(iter(code.values()), code) if isinstance(code, Mapping) else code


def overridden(config: PretrainedConfig, overrides: Mapping[str, Any]) -> PretrainedConfig:
    """A copy of a config with other values.

    Raises:
        ModelError: an unknown name, or values that the config class refuses.
    """
    return _changed(config, config.to_dict(), overrides, "the config")


def _changed(
    base: PretrainedConfig, values: dict[str, Any], overrides: Mapping[str, Any], what: str
) -> PretrainedConfig:
    for name, value in overrides.items():
        own_name = base.attribute_map.get(name, name)
        if not hasattr(base, own_name):
            raise ModelError(f"the config of model type '{base.model_type}' has no '{name}' to override")
        values[own_name] = value
    check_depth(values)
    try:
        return type(base).from_dict(_cut_lists(values, base, overrides))
    except ModelError:
        raise
    except Exception as error:  # a config class may refuse its values with any kind of error
        raise ModelError(f"{dict(overrides)} do not fit {what}: {first_line(error)}") from error


def with_layers(config: PretrainedConfig, kinds: Sequence[int]) -> PretrainedConfig:
    """A config of a model whose decoder layer i is of the kind of the given config's layer ``kinds[i]``."""
    values = config.to_dict()
    for name in per_layer_lists(config):
        values[name] = [values[name][kind] for kind in kinds]
    for name in LAYER_NUMBERS & values.keys():
        if isinstance(values.get(name), list):
            values[name] = [index for index, kind in enumerate(kinds) if kind in values[name]]
    if isinstance(values.get("attention_types"), list):  # runs of layers, of which the list of layers is made
        values["attention_types"] = [[[kind], 1] for kind in values["attention_layers"]]
    names = {config.attribute_map.get("num_hidden_layers", "num_hidden_layers"), "decoder_layers"} & values.keys()
    for name in names or {"num_layers"}:
        values[name] = len(kinds)
    changed = type(config).from_dict(values)
    changed._attn_implementation = config._attn_implementation
    return changed


def per_layer_lists(config: PretrainedConfig) -> list[str]:
    """Names of the config's lists that have an entry for each decoder layer."""
    layers = config.num_hidden_layers
    lists = {name: value for name, value in config.to_dict().items() if isinstance(value, list) and name not in _OTHERS}
    return [
        name
        for name, value in lists.items()
        if name in _PER_LAYER or (len(value) == layers and all(isinstance(entry, str) for entry in value))
    ]


def _cut_lists(values: dict[str, Any], base: PretrainedConfig, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Shorten lists with an entry per layer to an overridden number of layers."""
    layers = overrides.get("num_hidden_layers", overrides.get(base.attribute_map.get("num_hidden_layers", "")))
    if layers is None:
        return values
    for name in per_layer_lists(base):
        if isinstance(values.get(name), list) and name not in overrides:
            if len(values[name]) < layers:
                raise ModelError(
                    f"{name} lists {len(values[name])} layers and num_hidden_layers asks for {layers}: "
                    f"override {name} too"
                )
            values[name] = values[name][:layers]
    return values
