"""``"auto"`` in a DeepSpeed configuration, as Hugging Face users know it: values that the command line fills in."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from ibp_deepspeed.errors import ConfigError

AUTO = "auto"
Place = tuple[str, ...]

FILLED: dict[Place, str] = {
    ("train_micro_batch_size_per_gpu",): "--micro-batch-size",
    ("gradient_accumulation_steps",): "--gradient-accumulation-steps",
    ("optimizer", "params", "lr"): "--learning-rate",
    ("scheduler", "params", "warmup_max_lr"): "--learning-rate",
    ("scheduler", "params", "warmup_num_steps"): "--warmup-steps",
    ("scheduler", "params", "total_num_steps"): "--steps",
}
"""Where "auto" may stand → the option that fills it in. ``train_batch_size`` follows from the others."""


def fill_auto(
    ds_config: Mapping[str, Any], given: Mapping[str, Any], defaults: Mapping[str, Any], replicas: int
) -> dict[str, Any]:
    """A copy of a configuration without "auto".

    Args:
        ds_config: the configuration.
        given: option → a value that the user gave.
        defaults: option → the value where none was given.
        replicas: data-parallel ranks.

    Raises:
        ConfigError: an option and the configuration say different things, or "auto" stands where nothing fills it.
    """
    filled = copy.deepcopy(dict(ds_config))
    for place, option in FILLED.items():
        block = _block(filled, place)
        if block is None or place[-1] not in block:
            continue
        if block[place[-1]] == AUTO:
            block[place[-1]] = given.get(option, defaults[option])
        elif option in given and option != "--steps" and block[place[-1]] != given[option]:
            raise ConfigError(
                f'{option} is {given[option]}, the configuration\'s "{".".join(place)}" {block[place[-1]]}: write '
                '"auto" there, or leave the option out.'
            )
    _check_options_have_a_place(filled, given)
    if filled.get("train_batch_size") == AUTO:
        size, count = filled.get("train_micro_batch_size_per_gpu", 1), filled.get("gradient_accumulation_steps", 1)
        filled["train_batch_size"] = size * count * replicas
    refuse_auto(filled)
    return filled


def refuse_auto(ds_config: Mapping[str, Any]) -> None:
    """Raises a ConfigError where "auto" is left."""
    for place in _autos(ds_config, ()):
        option = FILLED.get(place)
        way = f"scripts/train_lm.py fills it in ({option}), a program of your own" if option else "you"
        raise ConfigError(f'"{".".join(place)}" is "auto", which nothing fills in here: {way} must give a value.')


def _check_options_have_a_place(filled: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """An option that the configuration has no place for would do nothing."""
    for option in given.keys() - {"--steps"}:
        places = [place for place, name in FILLED.items() if name == option]
        if not any(place[-1] in (_block(filled, place) or {}) for place in places):
            wanted = ".".join(places[0])
            raise ConfigError(f'{option} was given, but the configuration has no "{wanted}": write "{wanted}": "auto".')


def _block(ds_config: Mapping[str, Any], place: Place) -> Any:
    block: Any = ds_config
    for key in place[:-1]:
        block = block.get(key) if isinstance(block, Mapping) else None
    return block if isinstance(block, Mapping) else None


def _autos(block: Mapping[str, Any], above: Place) -> Iterator[Place]:
    for key, value in block.items():
        if value == AUTO:
            yield (*above, key)
        elif isinstance(value, Mapping):
            yield from _autos(value, (*above, key))
