"""The files that plan.py writes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ibp_deepspeed.commands.training.arguments import parse_overrides
from ibp_deepspeed.config.deepspeed import load_ds_config
from ibp_deepspeed.errors import PlanError

if TYPE_CHECKING:
    from ibp_deepspeed.planner.advice import Advice
    from ibp_deepspeed.planner.plan import Job, Row


def as_json(job: Job, rows: list[Row], advice: Advice) -> str:
    """All numbers, in seconds and bytes."""
    from dataclasses import asdict

    return json.dumps(
        {
            "stages": job.stages,
            "bounds": list(job.bounds),
            "advice": advice.reason,
            "rows": [asdict(row) for row in rows],
        },
        indent=1,
    )


def ds_config(job: Job, advice: Advice, args: argparse.Namespace) -> dict[str, Any]:
    """The DeepSpeed JSON of what is advised, the rest as in the presets.

    Raises:
        PlanError: nothing of ours is advised.
    """
    block = None if advice.row is None else advice.row.candidate.block
    if advice.row is not None and advice.row.candidate.name == "1F1B":
        block = {"strategy": "global", "exits": job.stages, "backward": "fused"}
    if block is None:
        raise PlanError(f"--write: there is no configuration of ours for this. {advice.reason}")
    return settings(job, block, args.micro_batch_size, args)


def settings(job: Job, block: Mapping[str, Any], samples: int, args: argparse.Namespace) -> dict[str, Any]:
    """The DeepSpeed JSON of a job.

    Args:
        job: with its micro-batches.
        block: of interlocking.
        samples: of a micro-batch.
        args: the command line, for --head, --fp32 and --optimizer.
    """
    preset = f"local_{'cpu' if args.fp32 else 'gpu'}"
    found = load_ds_config(preset)
    heads = {**parse_overrides(args.head, "--head"), **block.get("aux_head", {})}
    return found | {
        "optimizer": {**found["optimizer"], "type": args.optimizer},
        "train_micro_batch_size_per_gpu": samples,
        "gradient_accumulation_steps": job.micro_batches,
        "zero_optimization": {**found.get("zero_optimization", {}), "stage": job.zero},
        "pipeline": {**found.get("pipeline", {}), "activation_checkpoint_interval": int(job.recompute)},
        "interlocking": {**block, "aux_head": heads},
    }
