"""A checkpoint's files, read layer by layer: for evaluation, export, generation, or to start another training from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ibp_deepspeed.checkpoint.store import LATEST
from ibp_deepspeed.stage.module import aux_head_path
from models.build import DESCRIPTION_FILE, Description
from models.errors import ModelError

TOKENIZER_FOLDER = "tokenizer"
GENERATION_FILE = "generation_config.json"
_TEXTS = (".json", ".txt", ".jinja")


def layer_file(index: int) -> str:
    """The name of a file with the state dict of a pipeline layer; DeepSpeed's may say more before the last hyphen."""
    return f"layer_{index:02d}-model_states.pt"


def tokenizer_texts(folder: Path) -> dict[str, str]:
    """A fast tokenizer's files, all texts, by their names in a checkpoint; SentencePiece's binary one is not needed."""
    paths = sorted(path for path in folder.iterdir() if path.suffix in _TEXTS)
    return {f"{TOKENIZER_FOLDER}/{path.name}": path.read_text(encoding="utf-8") for path in paths}


class Checkpoint:
    """What train_lm.py or ``convert_hf.py import`` wrote, as weights of pipeline layers.

    Args:
        path: the folder of one checkpoint, or of several with a ``latest`` file.

    Attributes:
        folder: of the checkpoint itself.
        description: what was trained.

    Raises:
        ModelError: there is none.
    """

    def __init__(self, path: str | Path) -> None:
        folder = Path(path)
        latest = folder / LATEST
        if latest.exists():
            folder = folder / latest.read_text(encoding="utf-8").strip()
        if not folder.is_dir():
            raise ModelError(f"there is no checkpoint in {path}: give a folder that train_lm.py wrote.")
        self.folder = folder
        self.description = Description.read(folder)

    @staticmethod
    def is_in(path: str | Path) -> bool:
        """Whether a folder is one of checkpoints, rather than of a Hugging Face model."""
        return (Path(path) / LATEST).exists() or (Path(path) / DESCRIPTION_FILE).exists()

    def layer_state(self, index: int) -> dict[str, Tensor]:
        """The state dict of pipeline layer ``index``."""
        found = sorted(self.folder.glob(f"layer_{index:02d}-*model_states.pt"))
        if not found:
            raise ModelError(f"{self.folder} has no weights of layer {index} (layer_{index:02d}-…model_states.pt).")
        return _load(found[0])

    def layer(self, index: int, names: Sequence[str]) -> dict[str, Tensor]:
        """Those of ``names`` in the state dict of layer ``index``, see :class:`models.causal_lm.Weights`."""
        state = self.layer_state(index)
        missing = [name for name in names if name not in state]
        if missing:
            raise ModelError(f"{self.folder} has no weight {missing[0]} of layer {index}: it is of another model.")
        return {name: state[name] for name in names}

    def head_state(self, boundary: int) -> dict[str, Tensor] | None:
        """The state dict of the head before layer ``boundary``, None if there is none."""
        path = Path(aux_head_path(str(self.folder), boundary))
        return _load(path) if path.exists() else None

    @property
    def tokenizer(self) -> Path | None:
        """The folder of its tokenizer, None if there is none any more."""
        inside, beside = self.folder / TOKENIZER_FOLDER, Path(self.description.data or "") / TOKENIZER_FOLDER
        return next((folder for folder in (inside, beside) if folder.is_dir()), None)


def _load(path: Path) -> dict[str, Tensor]:
    try:
        state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise ModelError(f"{path} can't be read: {(str(error).splitlines() or [type(error).__name__])[0]}") from error
    return state
