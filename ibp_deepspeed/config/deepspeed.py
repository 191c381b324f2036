"""The DeepSpeed configuration, ``ds_config``: read it, find its block, refuse what doesn't combine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ibp_deepspeed.config.auto import refuse_auto
from ibp_deepspeed.config.interlocking import InterlockingConfig
from ibp_deepspeed.config.kinds import check_kinds, parsed_by_deepspeed
from ibp_deepspeed.errors import ConfigError
from ibp_deepspeed.json_text import parsed, small_text

PRESETS = Path(__file__).resolve().parents[1] / "presets"
_NUMBERS = ("gradient_clipping", "steps_per_print")
"""What DeepSpeed takes as it is, and stumbles over in the first batch."""


def load_ds_config(source: str | Path | Mapping[str, Any] | None) -> dict[str, Any]:
    """Read a DeepSpeed configuration.

    Args:
        source: a JSON file, the name of a preset (``pairwise_cpu``), or what such a file holds.

    Raises:
        ConfigError: there is none, or it is no JSON object.
    """
    if source is None:
        raise ConfigError("no DeepSpeed configuration was given: use --deepspeed_config FILE or config=….")
    if isinstance(source, Mapping):
        return dict(source)
    path = _file(source)
    try:
        ds_config = parsed(small_text(path))
    except OSError as error:
        presets = ", ".join(sorted(preset.stem for preset in PRESETS.glob("*.json")))
        raise ConfigError(
            f"can't read the configuration {path}: {error.strerror}. Presets have names: {presets}."
        ) from None
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON: {error}.") from None
    if not isinstance(ds_config, dict):
        raise ConfigError(f"{path} must hold a JSON object, not a {type(ds_config).__name__}.")
    return ds_config


def _file(source: str | Path) -> Path:
    """A preset's where a name stands for one: no path, and there is no such file."""
    path, preset = Path(source), PRESETS / f"{source}.json"
    return preset if not path.exists() and path.name == str(source) and preset.exists() else path


def resolve_interlocking(ds_config: Mapping[str, Any], given: InterlockingConfig | None = None) -> InterlockingConfig:
    """The block of the configuration, or the one ``given`` to the module; both, and different, is an error.

    Raises:
        ConfigError: a block that can't be trained with, or two that differ.
    """
    block = ds_config.get("interlocking")
    if block is None:
        return given or InterlockingConfig()
    parsed = InterlockingConfig.parse(block)
    if given is not None and given != parsed:
        raise ConfigError(
            f"the module's interlocking {given.model_dump(exclude_unset=True)} differs from the configuration's "
            f"{parsed.model_dump(exclude_unset=True)}: give one of them."
        )
    return parsed


def check_ds_config(ds_config: Mapping[str, Any]) -> None:
    """Refuse what does not combine with interlocking.

    Raises:
        ConfigError: a value of another kind; fp16, torch_autocast, ZeRO 2 or 3, offloading, DeepCompile, universal or
            DataStates checkpoints; or an "auto" that nothing filled in.
    """
    refuse_auto(ds_config)
    check_kinds(ds_config)
    if is_enabled(ds_config, "fp16"):
        raise ConfigError(
            'fp16 is not supported, because every stage would need a loss scale of its own: use "bf16": '
            '{"enabled": true} or fp32.'
        )
    if is_enabled(ds_config, "torch_autocast"):
        raise ConfigError('torch_autocast is not supported: use "bf16": {"enabled": true} or fp32.')
    compiler = ds_config.get("compile", {})
    if isinstance(compiler, Mapping) and compiler.get("deepcompile"):
        raise ConfigError(
            "compile.deepcompile is not for pipelines: remove it; "
            '"interlocking": {"compile": true} compiles the layers.'
        )
    _refuse_unsafe_files(ds_config)
    zero, stage = ds_config.get("zero_optimization", {}), zero_stage(ds_config)
    if stage not in (0, 1):
        raise ConfigError(f"ZeRO stage {stage} does not work with pipelines: use stage 0 or 1.")
    for key in ("offload_optimizer", "offload_param"):
        if isinstance(zero, Mapping) and zero.get(key):
            raise ConfigError(f"zero_optimization.{key} is not supported with pipelines of losses: remove it.")


def _refuse_unsafe_files(ds_config: Mapping[str, Any]) -> None:
    """Refuse kinds of checkpoints that DeepSpeed reads past its checkpoint engine, or with a reader of their own."""
    files = ds_config.get("checkpoint", {})
    if isinstance(files, Mapping) and files.get("load_universal"):
        raise ConfigError(
            "checkpoint.load_universal reads files that can run code: remove it, checkpoints load into other numbers "
            "of stages and replicas as they are."
        )
    if is_enabled(ds_config, "datastates_ckpt"):
        raise ConfigError("datastates_ckpt is not supported, its files can run code when they are read: remove it.")


def check_blocks(ds_config: Mapping[str, Any]) -> None:
    """That DeepSpeed takes all blocks of a configuration, without a process to train with.

    Args:
        ds_config: with all batch sizes; DeepSpeed would compare them with a job that there is not yet.

    Raises:
        ConfigError: DeepSpeed refuses one.
    """
    for key in _NUMBERS:
        value = ds_config.get(key, 0)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ConfigError(f'"{key}" is {value!r:.60}: give a number.')
    left_out = ("interlocking", "train_batch_size")
    parsed_by_deepspeed({key: value for key, value in ds_config.items() if key not in left_out})


def zero_stage(ds_config: Mapping[str, Any]) -> Any:
    """The ZeRO stage, 0 where none is given."""
    zero = ds_config.get("zero_optimization", {})
    return zero.get("stage", 0) if isinstance(zero, Mapping) else 0


def is_enabled(ds_config: Mapping[str, Any], key: str) -> bool:
    """Whether a block such as "bf16" says ``"enabled": true``."""
    block = ds_config.get(key, {})
    return bool(block.get("enabled", False)) if isinstance(block, Mapping) else bool(block)
