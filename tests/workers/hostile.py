"""Checkpoints of all kinds that an engine writes, and what reading them says when a file of theirs runs code."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.serialization import get_unsafe_globals_in_checkpoint

from ibp_deepspeed.checkpoint.manifest import CheckpointManifest
from ibp_deepspeed.errors import CheckpointError
from tests.bombs import put_bomb
from tests.workers.reshape import make_engine, train


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    """Save; name the classes in the files; load into this shape and into another, as it is and with a bomb in each of
    ``doors``, patterns of files that all ranks read."""
    folder, engine, other = Path(case["folder"]), make_engine(case), make_engine({**case, **case["other"]})
    train(engine, range(2))
    engine.save_checkpoint(folder, "made")
    classes = {name for path in (folder / "made").glob("*.pt") for name in get_unsafe_globals_in_checkpoint(str(path))}
    said = []
    for each in (engine, other):
        found, _ = each.load_checkpoint(folder, "made")
        assert found is not None
        said += [_refusal(each, folder, door) for door in case["doors"]]
    engine.close()
    other.close()
    return {"classes": sorted(classes), "said": said, "ran": (folder / "ran").exists()}


def _refusal(engine: Any, folder: Path, door: str) -> str:
    """What this rank says when files have bombs, and a manifest of these."""
    dist.barrier()
    if dist.get_rank() == 0:
        armed = folder / "armed"
        shutil.rmtree(armed, ignore_errors=True)
        shutil.copytree(folder / "made", armed)
        manifest = CheckpointManifest.read(armed)
        for path in armed.glob(door):
            put_bomb(path, folder / "ran")
        assert manifest is not None
        CheckpointManifest.write(armed, manifest.shape)
    dist.barrier()
    try:
        engine.load_checkpoint(folder, "armed")
    except CheckpointError as error:
        return str(error)
    return "nothing"
