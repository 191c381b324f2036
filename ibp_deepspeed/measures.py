"""What a stage reports of its training: names with their units, as dashboards and files show them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

LOSS = "loss"
"""Of the exit, in the loss function's own unit; nats per token of language models."""
TRUNK_NORM = "gradient norm of trunk"
HEAD_NORM = "gradient norm of head"
COSINE = "cosine of own and received gradient"
LEARNING_RATE = "learning rate"
LATE_LOSS = "late loss"
"""Of a head with the next exit's late targets, as it is minimised."""
LATE_BYTES = "late targets (bytes)"
"""Of one batch, that came to the stage."""
WAITING = "waiting (share of time)"
WAITING_FOR = {
    "activations": "waiting for activations (share of time)",
    "gradients": "waiting for gradients (share of time)",
    "credit": "waiting for credit (share of time)",
}
"""By cause: a message from the stage before, one from the stage behind, or that stage, which is too far behind."""
IN_FLIGHT = "in flight (micro-batches)"
MEMORY = "memory (GiB)"
PEAK_MEMORY = "peak memory (GiB)"
BATCH_TIME = "time of a batch (s)"
TOKENS = "throughput (tokens/s)"
IMAGES = "throughput (images/s)"
MFU = "MFU (share of peak)"


def throughput(counted: str, unit: str = "") -> str:
    """Of tokens or images; divided by the devices with a ``unit``: GPU, or process on a CPU."""
    return f"throughput ({counted}/s{'/' * bool(unit)}{unit})"


def tokens_each(unit: str) -> str:
    """Throughput of tokens divided by the devices, ``unit`` being GPU, or process on a CPU."""
    return throughput("tokens", unit)


class Report(NamedTuple):
    """What all stages say of the batches since the last report.

    Attributes:
        step: batches trained when it was made.
        stages: by stage, name → value; what a stage does not have is left out.
    """

    step: int
    stages: list[dict[str, float]]


def events(step: int, stages: Sequence[Mapping[str, float]]) -> list[tuple[str, float, int]]:
    """For DeepSpeed's monitors: (name, value, step) of each scalar of each stage."""
    return [(f"Train/stage {k}/{name}", value, step) for k, row in enumerate(stages) for name, value in row.items()]


def in_words(losses: Sequence[float]) -> str:
    """Of the exits that have one."""
    return " ".join(f"{loss:.3f}" for loss in losses if not math.isnan(loss))


def or_null(losses: Sequence[float]) -> list[float | None]:
    """As JSON has them: null where a stage has none."""
    return [None if math.isnan(loss) else loss for loss in losses]


def without_nan(values: Mapping[str, float]) -> dict[str, float]:
    """What has a value: a loss that nobody computed is NaN, the norm of a step that was left out may be infinite."""
    return {name: value for name, value in values.items() if math.isfinite(value)}
