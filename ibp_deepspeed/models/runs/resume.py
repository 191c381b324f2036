"""Which checkpoint a training resumes from, and whether it fits, found out before the processes meet."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from ibp_deepspeed.checkpoint import layout
from ibp_deepspeed.checkpoint.store import checked, newest_tag, tagged
from ibp_deepspeed.models.errors import AllTrained, ModelError
from ibp_deepspeed.models.runs.conditions import Changes, changes_since
from ibp_deepspeed.models.runs.description import Description
from ibp_deepspeed.models.tuning import EVERYTHING, Tuning


class Resumption(NamedTuple):
    """The tag of a checkpoint, and how the training differs from then."""

    tag: str
    changes: Changes


def checkpoint_to_resume(
    folder: Path, wanted: str | None, planned: Description, steps: int, allowed: Collection[str] = ()
) -> Resumption | None:
    """The checkpoint in ``folder`` that a run goes on from; None: it starts from scratch.

    Args:
        folder: of a run's checkpoints.
        wanted: a tag; ``auto``: the newest, if there is one; None: start from scratch.
        planned: what the run is about to train.
        steps: batches that it is to have in the end.
        allowed: what may be otherwise than in the checkpoint's training, see ``conditions.EFFECTS``.

    Raises:
        ModelError: there is no such checkpoint, it is a link, or of another model or another training.
        AllTrained: it has as many batches already.
        CheckpointError: it is damaged.
    """
    if wanted is None:
        return None
    latest = folder / layout.LATEST
    if wanted == "auto" and not latest.exists():
        return None
    tag = newest_tag(folder) if wanted == "auto" else wanted
    path = tagged(folder, tag)
    if not path.exists():
        path = tagged(folder, layout.replaced(tag))
    if not path.is_dir():
        there = ", ".join(sorted(p.name for p in folder.glob("*") if layout.batches_of(p.name) is not None)) or "none"
        raise ModelError(f"{folder} has no checkpoint {tag}, but {there}.")
    checked(path)
    saved = Description.read(path)
    _check_same(path, saved, planned)
    _check_same_tuning(path, saved.tuning or EVERYTHING, planned.tuning or EVERYTHING)
    changes = changes_since(path, saved, planned, allowed)
    batches = layout.batches_of(tag)
    if batches is not None and batches >= steps:
        raise AllTrained(f"{path} has {batches} batches of {steps}: all are trained, more with a larger --steps")
    return Resumption(tag, changes)


def _check_same(path: Path, saved: Description, planned: Description) -> None:
    theirs, ours = (json.loads(d.model_dump_json())["model"] for d in (saved, planned))  # JSON has no numbers as keys
    for key in {**theirs, **ours}:
        if theirs.get(key) != ours.get(key):
            raise ModelError(
                f"{path} was trained with model's {key} {theirs.get(key)}, not {ours.get(key)}: resume with the same, "
                "or another --output."
            )


def _check_same_tuning(path: Path, saved: Tuning, planned: Tuning) -> None:
    if saved.model_copy(update={"base": planned.base}) != planned:
        raise ModelError(
            f"{path} was trained with {saved}, not {planned}: resume with the same --freeze and --lora, or give "
            "another --output and begin with it (--init-from)."
        )
    if saved.base != planned.base:
        raise ModelError(
            f"{path} holds adapters of a model with digest {saved.base}, that of --init-from has {planned.base}: give "
            "the model that they were trained on."
        )
