"""Options by the names that they have in transformers' TrainingArguments, where they mean the same."""

from __future__ import annotations

import sys
from collections.abc import Sequence

OURS = {
    "max_steps": "steps",
    "per_device_train_batch_size": "micro-batch-size",
    "gradient_accumulation_steps": "gradient-accumulation-steps",
    "learning_rate": "learning-rate",
    "warmup_steps": "warmup-steps",
    "eval_steps": "eval-interval",
    "save_steps": "save-interval",
    "save_total_limit": "keep",
    "output_dir": "output",
    "resume_from_checkpoint": "resume",
    "report_to": "report-to",
}
"""Name in TrainingArguments → option; ``seed`` has one name."""


def with_our_names(words: Sequence[str] | None) -> list[str]:
    """A command line (default: this process's) with transformers' names, also with hyphens, replaced by ours."""
    return [_ours(word) for word in (sys.argv[1:] if words is None else words)]


def _ours(word: str) -> str:
    name, equals, value = word.partition("=")
    ours = OURS.get(name[2:].replace("-", "_")) if name.startswith("--") else None
    return word if ours is None else f"--{ours}{equals}{value}"
