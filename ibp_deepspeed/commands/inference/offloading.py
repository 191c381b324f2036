"""Exported models larger than memory: what accelerate keeps on a device, in the CPU's memory, and in the files."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ibp_deepspeed.errors import InterlockingError


def options(folder: Path, device: str, gib: float | None) -> dict[str, Any]:
    """For ``from_pretrained``: none where the files of a model take no more than half of the memory.

    Of a larger one that half holds the first layers, half of the CPU's memory (for a GPU) the next ones, and the others
    are read in every pass from where they are.

    Args:
        folder: the model's; a name on the hub, whose size is not known, is loaded as a whole.
        device: where it is to run.
        gib: what there is; None: what is free.
    """
    import torch

    from ibp_deepspeed.models.exits.memory import Memory

    place = torch.device(device)
    memory = Memory.of(place, gib)
    if memory.holds(sum(file.stat().st_size for file in folder.glob("*.safetensors"))):
        return {}
    room: dict[int | str, int] = {"cpu": memory.bytes // 2}
    if place.type != "cpu":
        room = {place.index or 0: memory.bytes // 2, "cpu": Memory.of(torch.device("cpu")).bytes // 2}
    converted = tempfile.mkdtemp(prefix="ibp_offload_")  # layers that Hugging Face's files hold in another layout
    atexit.register(shutil.rmtree, converted, ignore_errors=True)
    return {"device_map": "auto", "max_memory": room, "offload_folder": converted}


def is_offloaded(model: Any) -> bool:
    """Whether parts of it are elsewhere than where it runs: it can't be moved."""
    return getattr(model, "hf_device_map", None) is not None


def check_draft(model: Any) -> None:
    """That the model of a draft is in memory.

    Raises:
        InterlockingError: it is not; every pass would wait for the files.
    """
    if is_offloaded(model):
        raise InterlockingError(
            "a draft needs a model in memory, and this one takes more than half of what there is (--memory-gib): leave "
            "--draft-exit or --draft-model out."
        )


def check_held(exits: Any) -> None:
    """That a checkpoint's model is in memory when it generates.

    Raises:
        InterlockingError: it is too large, and an export can be offloaded.
    """
    if exits.is_streamed:
        raise InterlockingError(
            f"the model in {exits.folder} takes more than half of {exits.memory.bytes / 2**30:.2g} GiB (--memory-gib): "
            "write it with scripts/convert_hf.py export and give that as --model, from which layers that do not fit "
            "are read as they are needed."
        )
