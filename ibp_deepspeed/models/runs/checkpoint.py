"""A checkpoint's files, read layer by layer: for evaluation, export, generation, or to start another training from."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ibp_deepspeed.checkpoint import layout
from ibp_deepspeed.checkpoint.store import check_plain, newest_tag, tagged
from ibp_deepspeed.checkpoint.tensor_file import read
from ibp_deepspeed.config.deepspeed import is_enabled
from ibp_deepspeed.models.causal_lm import CausalLM
from ibp_deepspeed.models.errors import ModelError
from ibp_deepspeed.models.runs.base import base_weights
from ibp_deepspeed.models.runs.description import Description
from ibp_deepspeed.models.tuning import Tuning, merged_state

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
        """The state dict of pipeline layer ``index``; where it has adapters, with these in the base model's weights."""
        stored = self.stored_state(index)
        return stored if self.adapters is None else self._merged(index, stored)

    def stored_state(self, index: int) -> dict[str, Tensor]:
        """What the file of pipeline layer ``index`` holds."""
        found = layout.find_layer(self.folder, index)
        if found is None:
            raise ModelError(f"{self.folder} has no weights of layer {index} ({layout.layer(index)}).")
        return read(found)

    @property
    def adapters(self) -> Tuning | None:
        """What says which weights have adapters; None: there are none, and the files hold all weights."""
        tuning = self.description.tuning
        return tuning if tuning is not None and tuning.lora is not None else None

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights as they were trained."""
        return torch.bfloat16 if is_enabled(self.description.settings, "bf16") else torch.float32

    @property
    def stored_dtype(self) -> torch.dtype:
        """Of the weights as they are in the files; of a base model with adapters, as they were trained."""
        if self.adapters is not None:
            return self.dtype
        return next((t.dtype for t in self.stored_state(0).values() if t.is_floating_point()), self.dtype)

    @cached_property
    def _base(self) -> CausalLM:
        """The model that the adapters belong to."""
        about = self.description
        if self.adapters is None or self.adapters.base is None or about.init_from is None:
            raise ModelError(f"{self.folder} does not say which model its adapters belong to.")
        weights = base_weights(about.init_from, self.adapters.base, self.folder)
        return CausalLM(about.hf_config(), weights=weights, dtype=self.dtype)

    def _merged(self, index: int, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        assert self.adapters is not None
        layer = self._base.build_layer(index)
        try:
            self.adapters.adapt(layer, index)
            return merged_state(layer, stored)
        except (RuntimeError, ValueError) as error:  # other shapes, or targets that the layer does not have
            reason = str(error).splitlines()[-1].strip()
            raise ModelError(f"{self.folder}: the adapters of layer {index} can't be used: {reason}") from error

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

    def has_head(self, boundary: int) -> bool:
        """Whether there is a head before layer ``boundary``."""
        return (self.folder / layout.aux_head(boundary)).exists()

    @property
    def tokenizer(self) -> Path | None:
        """The folder of its tokenizer, None if there is none any more."""
        data = self.description.data
        folders = [self.folder / layout.TOKENIZER, *([] if data is None else [Path(data) / layout.TOKENIZER])]
        found = next((folder for folder in folders if folder.is_dir()), None)
        if found is not None:
            check_plain(found)  # an export copies all that is in it
        return found
