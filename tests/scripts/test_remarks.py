"""What a training says of its heads before it begins."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ibp_deepspeed import InterlockingConfig
from ibp_deepspeed.commands.training.start import _late_targets


@pytest.mark.parametrize(
    ("objective", "exits", "said"),
    [
        ("cross_entropy", "every", []),
        ("distillation", "every", ["at up to 256 positions of a micro-batch (66,560 bytes) 2 batches later"]),
        ("local_critic", 3, ["at up to 256 positions of a micro-batch (1,024 bytes) 3 batches later"]),
        (
            {"name": "local_critic", "delay": 5, "tokens": 8},
            3,
            ["at up to 8 positions of a micro-batch (32 bytes) 5 "],
        ),
    ],
)
def test_late_targets_are_told(objective: Any, exits: Any, said: list[str]) -> None:
    """Six stages, two micro-batches a batch."""
    block = {"strategy": "local", "exits": exits, "aux_head": {"objective": objective}}
    plan: Any = SimpleNamespace(interlocking=InterlockingConfig.parse(block), num_stages=6)
    lines = _late_targets(plan, 2)
    assert len(lines) == len(said) and all(words in line for words, line in zip(said, lines, strict=True)), lines
