"""The three batch sizes of a DeepSpeed configuration, of which two decide the third."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ibp_deepspeed.errors import ConfigError

TOTAL, SIZE, COUNT = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"
BATCH_SIZES = (TOTAL, SIZE, COUNT)


def with_batch_sizes(ds_config: Mapping[str, Any], replicas: int) -> dict[str, Any]:
    """A copy of a configuration that has all three, as DeepSpeed derives them (``DeepSpeedConfig``).

    Args:
        ds_config: without "auto"; the sizes that it has are whole numbers (``kinds.check_kinds``).
        replicas: data-parallel ranks.

    Raises:
        ConfigError: they don't say how large a micro-batch is, or contradict each other.
    """
    total, size, count = (ds_config.get(name) for name in BATCH_SIZES)
    if total is None and size is None:
        raise ConfigError(f'the configuration has neither "{SIZE}" nor "{TOTAL}": write "{SIZE}": "auto".')
    if size is None:
        count = count or 1
        size = (total or 0) // (count * replicas)
    elif count is None:
        count = 1 if total is None else total // (size * replicas)
    product = size * count * replicas
    if total not in (None, product) or product == 0:
        given = ", ".join(f'"{name}" {ds_config[name]}' for name in BATCH_SIZES if ds_config.get(name))
        raise ConfigError(
            f'{given} and {replicas} replicas contradict each other: "{TOTAL}" is the product of "{SIZE}", "{COUNT}" '
            "and the replicas; leave one of them out."
        )
    return {**ds_config, TOTAL: product, SIZE: size, COUNT: count}
