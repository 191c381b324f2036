"""What kind of value the keys of a DeepSpeed configuration have: DeepSpeed and we look into blocks unasked."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from typing import Any

from deepspeed.runtime.config import DeepSpeedConfig
from pydantic import ValidationError

from ibp_deepspeed.config.batch_sizes import BATCH_SIZES
from ibp_deepspeed.errors import ConfigError, first_line

MONITORS = ("tensorboard", "csv_monitor", "wandb")
BLOCKS = ("optimizer", "scheduler", "pipeline", "data_types", "bf16", "checkpoint", *MONITORS)
WITH_PARAMS = ("optimizer", "scheduler")
MOST = 2**20
"""Of samples and micro-batches of a batch: a schedule has an instruction for each micro-batch."""


def check_kinds(ds_config: Mapping[str, Any]) -> None:
    """Refuse a block that is no object, and sizes of a batch that are no numbers to train with.

    Raises:
        ConfigError: the first of these.
    """
    for block in BLOCKS:
        _check_object(block, ds_config.get(block, {}))
    for block in WITH_PARAMS:
        _check_object(f"{block}.params", ds_config.get(block, {}).get("params", {}))
    for name in BATCH_SIZES:
        count = ds_config.get(name)
        if count is None:
            continue
        if not isinstance(count, Integral) or isinstance(count, bool) or not 1 <= int(count) <= MOST:
            raise ConfigError(f'"{name}" is {count!r:.60}: give a whole number from 1 to {MOST:,}.')


def parsed_by_deepspeed(ds_config: dict[str, Any], grid: Any = None) -> DeepSpeedConfig:
    """DeepSpeed's own reading of a configuration without our block.

    Args:
        ds_config: the configuration.
        grid: of stages and replicas; None: of one process.

    Raises:
        ConfigError: DeepSpeed refuses it.
    """
    try:
        return DeepSpeedConfig(ds_config, grid)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or error.title
        raise ConfigError(
            f'DeepSpeed refuses "{where}" of the configuration: {first["msg"]}, got {first["input"]!r:.60}.'
        ) from error
    except Exception as error:  # assertions, wrong types, missing keys
        raise ConfigError(f"DeepSpeed refuses the configuration: {first_line(error)}") from error


def _check_object(name: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise ConfigError(f'"{name}" must be an object, not {value!r:.60}.')
