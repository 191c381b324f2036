"""How a training run saves and goes on: the engine's checkpoint, and the position in the data."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

POSITION_FILE = "data_position.json"


def save(engine: Any, plan: Any, args: argparse.Namespace, train: Any) -> None:
    """A checkpoint in DeepSpeed's layout, with what evaluation, export and going on need; old ones go."""
    from ibp_deepspeed.checkpoint.store import keep_newest
    from models.runs.resume import batches_of

    folder = args.output / "checkpoint"
    engine.save_checkpoint(folder, files={**plan.files, POSITION_FILE: json.dumps(train.state_dict()) + "\n"})
    if engine.global_rank == 0:
        keep_newest(folder, args.keep, batches_of)


def resume(engine: Any, plan: Any, args: argparse.Namespace) -> None:
    """Go on from a checkpoint, if there is one to go on from, and say what another shape has changed."""
    if plan.resume is not None:
        engine.load_checkpoint(args.output / "checkpoint", plan.resume)
    if engine.global_rank == 0 and args.resume is not None:
        where = f"goes on from {plan.resume}" if plan.resume else "there is no checkpoint yet: starts anew"
        print(f"{args.output}: {where}", flush=True)
    for line in engine.load_report:
        print(line, flush=True)


def set_position(train: Any, plan: Any, args: argparse.Namespace) -> None:
    """Have the training data go on where the checkpoint was written, also in batches of another size."""
    if plan.resume is None:
        return
    path: Path = args.output / "checkpoint" / plan.resume / POSITION_FILE
    if path.exists():  # checkpoints of an earlier version have none
        train.load_state_dict(json.loads(path.read_text(encoding="utf-8")))
