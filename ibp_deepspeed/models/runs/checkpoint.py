"""A checkpoint's files, read layer by layer: for evaluation, export, generation, or to start another training from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ibp_deepspeed.checkpoint import layout
from ibp_deepspeed.checkpoint.store import check_plain, newest_tag, tagged
from ibp_deepspeed.checkpoint.tensor_file import read
from ibp_deepspeed.models.errors import ModelError
from ibp_deepspeed.models.runs.description import Description

_TEXTS = (".json", ".txt", ".jinja")


def tokenizer_texts(folder: Path) -> dict[str, str]:
    """A fast tokenizer's files, all texts, by their names in a checkpoint; SentencePiece's binary one is not needed."""
    paths = sorted(path for path in folder.iterdir() if path.suffix in _TEXTS)
    return {f"{layout.TOKENIZER}/{path.name}": path.read_text(encoding="utf-8") for path in paths}


class Checkpoint:
    """What train_lm.py or ``convert_hf.py import`` wrote, as weights of pipeline layers.

    Args:
        path: the folder of one checkpoint, or of several with a ``latest`` file.

    Attributes:
        folder: of the checkpoint itself.
        description: what was trained.

    Raises:
        ModelError: there is none.
        CheckpointError: names or links in it lead out of it.
    """

    def __init__(self, path: str | Path) -> None:
        folder = Path(path)
        if (folder / layout.LATEST).exists():
            folder = tagged(folder, newest_tag(folder))
        if not folder.is_dir():
            raise ModelError(f"there is no checkpoint in {path}: give a folder that train_lm.py wrote.")
        check_plain(folder)
        self.folder = folder
        self.description = Description.read(folder)

    @staticmethod
    def is_in(path: str | Path) -> bool:
        """Whether a folder is one of checkpoints, rather than of a Hugging Face model."""
        return (Path(path) / layout.LATEST).exists() or (Path(path) / layout.DESCRIPTION).exists()

    def layer_state(self, index: int) -> dict[str, Tensor]:
        """The state dict of pipeline layer ``index``."""
        found = layout.find_layer(self.folder, index)
        if found is None:
            raise ModelError(f"{self.folder} has no weights of layer {index} ({layout.layer(index)}).")
        return read(found)

    def layer(self, index: int, names: Sequence[str]) -> dict[str, Tensor]:
        """Those of ``names`` in the state dict of layer ``index``, see :class:`.causal_lm.Weights`."""
        state = self.layer_state(index)
        missing = [name for name in names if name not in state]
        if missing:
            raise ModelError(f"{self.folder} has no weight {missing[0]} of layer {index}: it is of another model.")
        return {name: state[name] for name in names}

    def head_state(self, boundary: int) -> dict[str, Tensor] | None:
        """The state dict of the head before layer ``boundary``, None if there is none."""
        path = self.folder / layout.aux_head(boundary)
        return read(path) if path.exists() else None

    @property
    def tokenizer(self) -> Path | None:
        """The folder of its tokenizer, None if there is none any more."""
        data = self.description.data
        folders = [self.folder / layout.TOKENIZER, *([] if data is None else [Path(data) / layout.TOKENIZER])]
        found = next((folder for folder in folders if folder.is_dir()), None)
        if found is not None:
            check_plain(found)  # an export copies all that is in it
        return found
