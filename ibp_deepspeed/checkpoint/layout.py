"""Every name of a file or folder in a checkpoint, DeepSpeed's and ours, and how they are found again.

A run's folder has one folder a checkpoint, named by its tag, and a file that names the newest complete one.
"""

from __future__ import annotations

import re
from pathlib import Path

LATEST = "latest"
"""In a run's folder: the tag of the newest complete checkpoint."""
MANIFEST = "contents.json"
DESCRIPTION = "interlocked_model.json"
"""What train_lm.py trained, enough to build the model again."""
TOKENIZER = "tokenizer"
GENERATION = "generation_config.json"
DATA_POSITION = "data_position.json"
SHARED_READOUT = "shared_readout-model_states.pt"
"""Copies of the last stage's LM head that were taken and not yet used."""
ANY_LATE_TARGETS = "late_targets_*"
ANY_AUX_HEAD = "aux_head_*"
ANY_RANDOM_STATE = "random_states_*.pt"
_REPLACED = ".replaced"


def tag_of(batches: int) -> str:
    """The tag of the checkpoint after so many batches."""
    return f"global_step{batches}"


def batches_of(tag: str) -> int | None:
    """Batches that a checkpoint was trained with, from its tag; None for another name."""
    found = re.fullmatch(r"global_step(\d+)", tag)
    return int(found[1]) if found else None


def partial(tag: str) -> str:
    """The name of a checkpoint that is being written."""
    return f"{tag}.partial"


def partials(folder: Path) -> list[Path]:
    """The checkpoints of some number of batches that are being written, or that an interrupted save left."""
    ending = partial("")
    return [path for path in folder.glob(f"*{ending}") if batches_of(path.name.removesuffix(ending)) is not None]


def replaced(tag: str) -> str:
    """The name of a checkpoint whose place a newer one of the same tag is taking."""
    return f"{tag}{_REPLACED}"


def interrupted_replacements(folder: Path) -> dict[Path, Path]:
    """Folders that an interrupted replacement left → the names that they had."""
    return {old: old.with_name(old.name.removesuffix(_REPLACED)) for old in folder.glob(f"*{_REPLACED}")}


def layer(index: int) -> str:
    """The state dict of a pipeline layer; DeepSpeed's names may say more before the last hyphen."""
    return f"layer_{index:02d}-model_states.pt"


def find_layer(folder: Path, index: int) -> Path | None:
    """The file of a layer, whoever wrote it."""
    return next(iter(sorted(folder.glob(f"layer_{index:02d}-*model_states.pt"))), None)


def aux_head(boundary: int) -> str:
    """The state dict of the head that stands before layer ``boundary``."""
    return f"aux_head_{boundary:02d}-model_states.pt"


def late_targets(replica: int, index: int) -> str:
    """States and targets of a stage's head that were not yet used, of a replica's data."""
    return f"late_targets_{replica}_{index:02d}-model_states.pt"


def slow_layers(boundary: int) -> str:
    """What of the layers from ``boundary`` on the head before them follows: their average, copies not yet used."""
    return f"slow_layers_{boundary:02d}-model_states.pt"


def stage(index: int) -> str:
    """What a stage knows beside its weights: counters, the rate's schedule, the optimizer unless it is partitioned."""
    return f"mp_rank_{index:02d}_model_states.pt"


def find_optimizer(folder: Path, replica: int, index: int) -> Path | None:
    """A replica's part of the partitioned optimizer of a stage, written by ZeRO or by the bf16 optimizer."""
    return next(iter(sorted(folder.glob(f"*zero_pp_rank_{replica}_mp_rank_{index:02d}_optim_states.pt"))), None)


def random_state(rank: int) -> str:
    """The random generators of a rank."""
    return f"random_states_{rank}.pt"
