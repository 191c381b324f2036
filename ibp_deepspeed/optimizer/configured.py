"""The optimizer that a DeepSpeed configuration asks for, checked before there are parameters to train."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from numbers import Real
from typing import Any

import torch
from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS, MUON_OPTIMIZER

from ibp_deepspeed.config.deepspeed import is_enabled, zero_stage
from ibp_deepspeed.config.interlocking import nearest
from ibp_deepspeed.errors import ConfigError

_ADAM = ("adam", "adamw")
_NUMBERS = ("lr", "eps", "weight_decay", "momentum")
_EXAMPLE = '"optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": true}}'


def check_optimizer(ds_config: Mapping[str, Any]) -> None:
    """Refuse an optimizer that can't be made, as ``DeepSpeedEngine._configure_basic_optimizer`` (0.19.8) makes it.

    torch's are made for one number; of those that DeepSpeed compiles the arguments' names are compared.

    Raises:
        ConfigError: there is none, its type or a parameter is unknown, or a value is wrong.
    """
    block = ds_config.get("optimizer")
    if not isinstance(block, Mapping) or not isinstance(block.get("type"), str):
        raise ConfigError(
            f'the configuration\'s "optimizer" names no type, so nothing would be trained: write {_EXAMPLE}.'
        )
    name, given = block["type"], block.get("params", {})
    if not isinstance(given, Mapping):
        raise ConfigError(f'"optimizer.params" is {given!r}: give an object.')
    params = dict(given)
    for key in _NUMBERS:
        if key in params and (not isinstance(params[key], Real) or isinstance(params[key], bool)):
            raise ConfigError(f'"optimizer.params.{key}" is {params[key]!r}: give a number.')
    if name.lower().startswith("mu") and not is_muon(ds_config) and find_spec("mup") is None:
        raise ConfigError(f'"optimizer.type" {name} needs the package mup, which is not installed: use AdamW.')
    check_muon(ds_config)
    try:
        _try(name, params)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f'"optimizer" of type {name}: {error}.') from error


def is_muon(ds_config: Mapping[str, Any]) -> bool:
    """Whether the configuration asks for Muon."""
    block = ds_config.get("optimizer")
    return isinstance(block, Mapping) and str(block.get("type", "")).lower() == MUON_OPTIMIZER


def check_muon(ds_config: Mapping[str, Any]) -> None:
    """Refuse what does not combine with Muon.

    Raises:
        ConfigError: ZeRO 1 with fp32 weights or bf16 sums, whose optimizer orthogonalizes before it clips; with bf16 a
            norm of the whole pipeline, which DeepSpeed's optimizer can't take beside Muon.
    """
    if not is_muon(ds_config):
        return
    bf16, types = is_enabled(ds_config, "bf16"), ds_config.get("data_types", {})
    sums = types.get("grad_accum_dtype") if isinstance(types, Mapping) else None
    if (zero_stage(ds_config) == 1 and not bf16) or (bf16 and sums not in (None, "fp32")):
        raise ConfigError(
            'Muon needs whole matrices and fp32 sums: use it with fp32 without ZeRO, or with "bf16" and no other '
            '"data_types.grad_accum_dtype" than fp32.'
        )
    block = ds_config.get("interlocking", {})
    if bf16 and isinstance(block, Mapping) and block.get("clip_scope") == "global":
        raise ConfigError('"clip_scope": "global" does not work with Muon and bf16: use "clip_scope": "stage".')


def muon_params(given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of :class:`~ibp_deepspeed.optimizer.muon.Muon`, of a configuration's ``optimizer.params``.

    Raises:
        ConfigError: rates of DeepSpeed's own Muon.
    """
    params = dict(given)
    if rates := sorted({"muon_lr", "adam_lr"} & params.keys()):
        raise ConfigError(
            f'"optimizer.params.{rates[0]}" is a rate of DeepSpeed\'s own Muon: matrices and all else have one here, '
            '"lr", which is AdamW\'s.'
        )
    if params.get("torch_adam"):  # it is
        del params["torch_adam"]
    return params


def _try(name: str, params: dict[str, Any]) -> None:
    if name.lower() in _ADAM:
        decoupled = name.lower() == "adamw" or params.pop("adam_w_mode", True)
        params.pop("adam_w_mode", None)
        params.pop("fp32_optimizer_states", None)
        if params.pop("torch_adam", False):
            _make(torch.optim.AdamW if decoupled else torch.optim.Adam, params)
        else:
            from deepspeed.ops.adam import FusedAdam

            inspect.signature(FusedAdam).bind([], **params)
    elif name.lower() == MUON_OPTIMIZER:
        from ibp_deepspeed.optimizer.muon import Muon  # takes seconds to import

        matrix = torch.nn.Parameter(torch.zeros(1, 1))
        Muon([{"params": [matrix], "use_muon": True, "columns": 1}], **muon_params(params))
    elif name.lower() == "adagrad":
        _make(torch.optim.Adagrad, params)
    elif name.lower() == "lamb":
        from deepspeed.ops.lamb import FusedLamb

        inspect.signature(FusedLamb).bind([], **params)
    elif name.lower() == "lion":
        from deepspeed.ops.lion import FusedLion

        inspect.signature(FusedLion).bind([], **params)
    elif name.lower() not in DEEPSPEED_OPTIMIZERS:
        _make(_of_torch(name), params)


def _of_torch(name: str) -> type[torch.optim.Optimizer]:
    """torch's optimizer of a name.

    Raises:
        ConfigError: there is none.
    """
    found = getattr(torch.optim, name, None)
    if isinstance(found, type) and issubclass(found, torch.optim.Optimizer) and found is not torch.optim.Optimizer:
        return found
    known = [key for key, value in vars(torch.optim).items() if isinstance(value, type)]
    raise ConfigError(
        f'"optimizer.type" is {name!r}{nearest(name, [*known, "AdamW"])}: name one of torch.optim, or of DeepSpeed\'s '
        f"{', '.join(sorted(DEEPSPEED_OPTIMIZERS))}."
    )


def _make(kind: Callable[..., torch.optim.Optimizer], params: Mapping[str, Any]) -> None:
    kind([torch.nn.Parameter(torch.zeros(1))], **params)
