"""run.json: what a run is, written before its first batch, so that a running or failed run can be reported too."""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ibp_deepspeed.atomic_files import replace_text
from ibp_deepspeed.commands.reporting.files import RECORD
from ibp_deepspeed.errors import InterlockingError
from ibp_deepspeed.json_text import parsed, small_text

if TYPE_CHECKING:
    import argparse

    from ibp_deepspeed.commands.training.training_plan import TrainingPlan

_PACKAGES = ("ibp_deepspeed", "torch", "deepspeed", "transformers", "numpy")


@dataclass
class RunRecord:
    """What is known of a run before it trains.

    Attributes:
        command: words of the command line.
        started, ended: seconds since 1970; ``ended`` is None while it runs, or if it failed.
        first_step, last_step: batches trained before, and planned.
        versions: by package.
        about: what was printed at the start.
        bounds: stage k has layers bounds[k] … bounds[k+1]-1.
        micro_batches: M.
        tokens_per_batch: of all replicas; images where these are counted.
        costs: of each stage's pieces of work from counted operations, see ``schedule.simulator.Costs``.
        ds_config: with its "interlocking" block and without "auto".
        model: the Hugging Face configuration.
        options: of the command line.
        processes: 1 with --one-process.
        unigram_entropy: of the data's tokens, or of its classes, in nats.
        counted: tokens, or images.
        interrupted: the batch after which a signal ended it; 0: none did.
        frozen: stages with nothing to train but a head.
        summary: what was printed at the end.
    """

    command: list[str]
    started: float
    first_step: int
    last_step: int
    versions: dict[str, str]
    about: list[str]
    bounds: list[int]
    micro_batches: int
    tokens_per_batch: int
    costs: list[dict[str, float]]
    ds_config: dict[str, Any]
    model: dict[str, Any]
    options: dict[str, Any]
    processes: int
    unigram_entropy: float
    counted: str = "tokens"
    ended: float | None = None
    interrupted: int = 0
    frozen: list[int] = field(default_factory=list)
    summary: list[str] = field(default_factory=list)

    @property
    def stages(self) -> int:
        """K."""
        return len(self.bounds) - 1

    def write(self, folder: Path) -> None:
        """Into the run's folder, complete or not at all."""
        replace_text(folder / RECORD, json.dumps(asdict(self), indent=1, default=str) + "\n")

    @classmethod
    def read(cls, folder: Path) -> RunRecord:
        """Of a run's folder.

        Raises:
            InterlockingError: there is none, or it is something else.
        """
        path = folder / RECORD
        try:
            return cls(**parsed(small_text(path)))
        except OSError as error:
            raise InterlockingError(
                f"can't read {path}: {error.strerror}. Give the --output folder of a train_lm.py run."
            ) from None
        except (ValueError, TypeError) as error:
            raise InterlockingError(f"{path} is not the record of a run: {error}.") from None


def record_of(
    plan: TrainingPlan, args: argparse.Namespace, about: Sequence[str], first_step: int, batch_size: int
) -> RunRecord:
    """Of a run that is about to train.

    Args:
        plan: of the run.
        args: the command line.
        about: lines that describe it.
        first_step: batches trained before.
        batch_size: samples of a batch.
    """
    import torch

    with torch.random.fork_rng(devices=[]):  # a layer is run to be counted: the training's dropout must not notice
        costs = plan.costs(args)
    return RunRecord(
        command=[Path(sys.argv[0]).name, *sys.argv[1:]],
        started=time.time(),
        first_step=first_step,
        last_step=args.steps,
        versions=versions(),
        about=list(about),
        bounds=plan.bounds,
        micro_batches=plan.ds_config.get("gradient_accumulation_steps") or 1,
        tokens_per_batch=batch_size * plan.per_sample(args),
        costs=[asdict(cost) for cost in costs],
        ds_config=plan.ds_config,
        model=plan.model.hf_config.to_diff_dict(),
        options=vars(args),
        processes=1 if args.one_process else plan.num_stages * plan.replicas,
        frozen=list(plan.frozen_stages),
        unigram_entropy=plan.label_entropy(),
        counted=plan.counted,
    )


def versions() -> dict[str, str]:
    """Of Python, the system and the packages that the numbers depend on; a package that runs from its sources and was
    never installed is left out."""
    found = {"Python": platform.python_version(), "system": platform.platform()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
