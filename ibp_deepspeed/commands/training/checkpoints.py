"""How a training run saves and resumes: the pipeline's checkpoint, and the position in the data."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from ibp_deepspeed.errors import CheckpointError

if TYPE_CHECKING:
    from ibp_deepspeed.commands.training.training_plan import TrainingData, TrainingPlan
    from ibp_deepspeed.models.runs.conditions import Changes
    from ibp_deepspeed.pipeline import Pipeline


def save(pipeline: Pipeline, plan: TrainingPlan, args: argparse.Namespace, train: TrainingData) -> None:
    """A checkpoint in DeepSpeed's layout, with what evaluation, export and resuming need; old ones go."""
    from ibp_deepspeed.checkpoint import layout
    from ibp_deepspeed.checkpoint.store import keep_newest

    folder = args.output / "checkpoint"
    position = {layout.DATA_POSITION: json.dumps(train.state_dict()) + "\n"}
    pipeline.save_checkpoint(folder, files={**plan.files, **position})
    if pipeline.global_rank == 0:
        keep_newest(folder, args.keep)


def resume(pipeline: Pipeline, plan: TrainingPlan, args: argparse.Namespace) -> None:
    """Resume from a checkpoint, if there is one, and say what is otherwise than it was, and what another shape has
    changed."""
    from ibp_deepspeed.optimizer.parameter_groups import settings_of

    if plan.resume is not None:
        configured = [settings_of(optimizer) for optimizer in pipeline.optimizers]
        pipeline.load_checkpoint(args.output / "checkpoint", plan.resume)
        if plan.changes is not None:
            _use_changed_settings(pipeline, configured, plan.changes)
    if pipeline.global_rank == 0 and args.resume is not None:
        where = f"resumes from {plan.resume}" if plan.resume else "there is no checkpoint yet: starts from scratch"
        print(f"{args.output}: {where}", flush=True)
        for line in plan.changes.lines if plan.changes is not None else ():
            print(line, flush=True)
    for line in pipeline.load_report:
        print(line, flush=True)


def set_position(train: TrainingData, plan: TrainingPlan, args: argparse.Namespace) -> None:
    """Have the training data resume where the checkpoint was written, also in batches of another size."""
    from ibp_deepspeed.checkpoint import layout
    from ibp_deepspeed.json_text import parsed, small_text

    if plan.resume is None:
        return
    path = args.output / "checkpoint" / plan.resume / layout.DATA_POSITION
    if path.exists():  # checkpoints of an earlier version have none
        try:
            position = parsed(small_text(path))
        except ValueError as error:
            raise CheckpointError(f"{path} can't be read: {error}.") from error
        if plan.changes is not None and plan.changes.restarts_epoch and isinstance(position, dict):
            position["samples"] = 0
        train.load_state_dict(position)


def _use_changed_settings(pipeline: Pipeline, configured: list[list[dict[str, Any]]], changes: Changes) -> None:
    """Have the configuration count, which a checkpoint's settings would take the place of.

    Args:
        pipeline: with a checkpoint loaded.
        configured: of each optimizer, its groups' settings as the configuration has made them.
        changes: what of it is not as it was.
    """
    for optimizer, groups in zip(pipeline.optimizers, configured, strict=True):
        for group, settings in zip(optimizer.param_groups, groups, strict=True):
            group.update({key: settings[key] for key in changes.optimizer if key in settings})
    for scheduler in filter(None, pipeline.schedulers if changes.schedule else ()):
        scheduler.step(scheduler.last_batch_iteration)  # again, which sets the rate of the next batch
