"""Which checkpoint a training resumes from, and whether it fits, found out before the processes meet."""

from __future__ import annotations

import json
from pathlib import Path

from ibp_deepspeed.checkpoint import layout
from ibp_deepspeed.checkpoint.store import checked, newest_tag, tagged
from models.errors import AllTrained, ModelError
from models.runs.description import Description


def checkpoint_to_resume(folder: Path, wanted: str | None, planned: Description, steps: int) -> str | None:
    """The tag of a checkpoint in ``folder``.

    Args:
        folder: of a run's checkpoints.
        wanted: a tag; ``auto``: the newest, if there is one; None: start from scratch.
        planned: what the run is about to train.
        steps: batches that it is to have in the end.

    Raises:
        ModelError: there is no such checkpoint, or it is of another model.
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
    _check_same(path, Description.read(path), planned)
    batches = layout.batches_of(tag)
    if batches is not None and batches >= steps:
        raise AllTrained(f"{path} has {batches} batches of {steps}: all are trained, more with a larger --steps")
    return tag


def _check_same(path: Path, saved: Description, planned: Description) -> None:
    was, is_ = (json.loads(d.model_dump_json()) for d in (saved, planned))  # JSON has no numbers as keys
    for name in ("model", "sequence_length"):
        theirs, ours = was[name], is_[name]
        if theirs == ours:
            continue
        if name == "model":
            key = next(k for k in {**theirs, **ours} if theirs.get(k) != ours.get(k))
            name, theirs, ours = f"model's {key}", theirs.get(key), ours.get(key)
        raise ModelError(
            f"{path} was trained with {name} {theirs}, not {ours}: resume with the same, or another --output."
        )
