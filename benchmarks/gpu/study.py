"""Global, local and pairwise training of a 124M-class model at equal tokens, as many as fit in a given time.

All stages in one process, on the text of Python's standard library; the presets with one learning rate for all, so this
shows that they learn on the device, not which is best (docs/learning.md is about that).
"""

from __future__ import annotations

import gc
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.harness import Row
from ibp_deepspeed.data import HeldOut, MicroBatchLoader, open_tokens

ROOT = Path(__file__).parents[2]
STRATEGIES = ("global", "local", "pairwise")
COLUMNS: dict[str, Callable[[Row], str]] = {
    "": lambda row: row["contender"],
    "parameters": lambda row: f"{row['parameters']:,}",
    "batches": lambda row: f"{row['batches']:,}",
    "tokens": lambda row: f"{row['tokens']:,}",
    "held-out losses of the exits": lambda row: " ".join(f"{loss:.3f}" for loss in row["held_out"]),
    "tokens/s": lambda row: f"{row['tokens_per_second']:,.0f}",
    "MFU": lambda row: "–" if row["mfu"] is None else f"{row['mfu']:.1%}",
    "peak MiB": lambda row: "–" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.0f}",
}


@dataclass(frozen=True)
class Sizes:
    """Of the study: K stages, S tokens a sample, M micro-batches of B samples."""

    config: str = "gpt2-124m"
    vocabulary: int = 8192
    max_bytes: int | None = None
    stages: int = 4
    tokens: int = 512
    samples: int = 16
    micro_batches: int = 2
    seconds: float = 75.0
    held_out: int = 512

    @property
    def batch_tokens(self) -> int:
        """Tokens of a batch."""
        return self.tokens * self.samples * self.micro_batches


SMALL = Sizes("llama-tiny", 512, 400_000, 2, 32, 2, 2, seconds=3.0, held_out=16)


def run(small: bool) -> list[Row]:
    """A few batches of each tell how many all can have; then each trains for as many."""
    sizes = SMALL if small else Sizes()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data")
        _prepare(data, sizes)
        warm = [_Training(strategy, data, sizes, 100).seconds_a_batch() for strategy in STRATEGIES]
        batches = max(4, int(sizes.seconds / sum(warm)))
        return [_Training(strategy, data, sizes, batches).row() for strategy in STRATEGIES]


def _prepare(data: Path, sizes: Sizes) -> None:
    limit = [] if sizes.max_bytes is None else ["--max-bytes", str(sizes.max_bytes)]
    command = [sys.executable, "scripts/prepare_data.py", "--out", str(data), "--vocab-size", str(sizes.vocabulary)]
    subprocess.run([*command, *limit], cwd=ROOT, check=True)


class _Training:
    """One strategy's, from the start."""

    def __init__(self, strategy: str, data: Path, sizes: Sizes, batches: int) -> None:
        from ibp_deepspeed.models import CausalLM, load_config
        from ibp_deepspeed.models.build import virtual_pipeline

        self.strategy, self.sizes, self.batches = strategy, sizes, batches
        train, held_out = (open_tokens(data, split, verify=False) for split in ("train", "heldout"))
        self.held_out = HeldOut(held_out, sizes.tokens, sizes.samples, samples=sizes.held_out, document_masks=False)
        self.train = MicroBatchLoader(train, sizes.tokens, sizes.samples, document_masks=False)
        config = load_config(sizes.config, vocab_size=train.manifest.vocabulary_size)
        self.model, self.device = CausalLM(config), "cuda" if torch.cuda.is_available() else "cpu"
        if self.device == "cuda":
            gc.collect()  # what is left of the strategy before would count in the peak
            torch.cuda.reset_peak_memory_stats()
        self.pipeline = virtual_pipeline(self.model, self._settings(), sizes.stages, device=self.device)

    def _settings(self) -> dict[str, Any]:
        from ibp_deepspeed.commands.training.arguments import default_hyperparameters
        from ibp_deepspeed.config.auto import fill_auto
        from ibp_deepspeed.config.deepspeed import load_ds_config

        kind = "gpu" if torch.cuda.is_available() else "cpu"
        preset = load_ds_config(ROOT / f"ds_configs/{self.strategy}_{kind}.json")
        preset.pop("tensorboard", None)
        given = {
            "--micro-batch-size": self.sizes.samples,
            "--gradient-accumulation-steps": self.sizes.micro_batches,
        }
        defaults = default_hyperparameters(Namespace(init_from=None, steps=self.batches), self.model.hidden_size)
        return fill_auto(preset, given, defaults, 1)

    def seconds_a_batch(self) -> float:
        """Of four batches after the first, which warms up."""
        self._batches(1)
        return self._batches(4) / 4

    def _batches(self, number: int) -> float:
        began = time.perf_counter()
        for _ in range(number):
            losses = self.pipeline.train_batch(self.train)
        losses.tolist()  # waits for the device
        return time.perf_counter() - began

    def row(self) -> Row:
        """Train and evaluate."""
        from ibp_deepspeed.models.costs import training_flops
        from ibp_deepspeed.models.devices import peak_flops
        from ibp_deepspeed.models.exits.evaluation import evaluate

        speed = self.batches * self.sizes.batch_tokens / self._batches(self.batches)
        gpu = self.device == "cuda"
        peak = peak_flops(torch.cuda.get_device_name()) if gpu else None
        options = self.pipeline.reference.interlocking.aux_head
        needed = training_flops(self.model, options, self.sizes.stages - 1, self.sizes.tokens)
        return {
            "contender": self.strategy,
            "parameters": sum(self.model.parameter_counts()),
            "batches": self.batches,
            "tokens": self.batches * self.sizes.batch_tokens,
            "held_out": evaluate(self.pipeline, self.held_out).losses,
            "tokens_per_second": speed,
            "mfu": None if peak is None else speed * needed / peak,
            "peak_bytes": torch.cuda.max_memory_allocated() if gpu else None,
        }
