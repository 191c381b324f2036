"""What goes beside a checkpoint's files: enough to build the model again in one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from transformers import AutoConfig, PretrainedConfig

from ibp_deepspeed.checkpoint import layout
from ibp_deepspeed.checkpoint.manifest import Bounds
from ibp_deepspeed.errors import first_line
from ibp_deepspeed.json_text import small_text
from ibp_deepspeed.models.config import check_depth
from ibp_deepspeed.models.errors import ModelError
from ibp_deepspeed.models.runs.conditions import Conditions
from ibp_deepspeed.models.tuning import Tuning
from ibp_deepspeed.models.vision.cifar_resnet import register


class Images(BaseModel):
    """What an image classifier reads."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int
    """S of the images [B, C, S, S]."""
    mean: list[float]
    """Of each channel, of pixels in 0 … 1."""
    deviation: list[float]
    held_out_fraction: float
    """Of the training images, where the data have no split that is held out."""


class Description(BaseModel):
    """What a checkpoint holds, beside DeepSpeed's files: enough to rebuild the model in one process."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: dict[str, Any]
    """The Hugging Face config."""
    bounds: Bounds
    """Stage k has layers bounds[k] … bounds[k+1]-1 of embedding, decoder layers, head."""
    interlocking: dict[str, Any]
    sequence_length: int
    """Tokens of a sample; 1 where they are images."""
    data: str | None = None
    """Folder of the prepared data, with the tokenizer; None: nothing was trained, the weights are ``init_from``'s."""
    mixture: dict[str, float] | None = None
    """Where the data were several: their folders and shares. ``data`` is the first of them."""
    source: str | None = None
    """What text that is."""
    init_from: str | None = None
    """Folder or hub name of the weights that the training began with; None: random ones."""
    tuning: Tuning | None = None
    """What was trained; None: everything. With adapters the layers' files hold these alone."""
    settings: dict[str, Any] = {}
    """The DeepSpeed configuration, but for the interlocking block."""
    images: Images | None = None
    """Of an image classifier; None: it is a language model."""
    conditions: Conditions | None = None
    """Seed, data and batches; None: nothing was trained, or an earlier version wrote it."""

    @property
    def folders(self) -> list[str]:
        """Of the prepared data."""
        return list(self.mixture or ([] if self.data is None else [self.data]))

    @property
    def document_masks(self) -> bool | None:
        """How its samples are to be read: False: it was trained on samples that cross documents; None: with documents
        apart where the data have their bounds."""
        if self.data is None or (self.conditions is not None and self.conditions.documents is not None):
            return None
        return False

    def hf_config(self) -> PretrainedConfig:
        """The Hugging Face config as an object.

        Raises:
            ModelError: the values make none.
        """
        register()
        values = dict(self.model)
        check_depth(values)
        try:
            return AutoConfig.for_model(values.pop("model_type"), **values)
        except Exception as error:  # a config class may refuse its values with any kind of error
            raise ModelError(f"the config in {layout.DESCRIPTION} can't be used: {first_line(error)}.") from error

    def files(self) -> dict[str, str]:
        """What goes beside a checkpoint's files, by name."""
        return {layout.DESCRIPTION: json.dumps(self.model_dump(), indent=1) + "\n"}

    @classmethod
    def read(cls, folder: Path) -> Description:
        """Read from a checkpoint's folder.

        Raises:
            ModelError: it is missing or not readable.
        """
        path = folder / layout.DESCRIPTION
        try:
            return cls.model_validate_json(small_text(path))
        except FileNotFoundError:
            raise ModelError(f"{folder} is no checkpoint of train_lm.py: it has no {layout.DESCRIPTION}.") from None
        except ValueError as error:
            raise ModelError(f"{path} is damaged: {first_line(error)}.") from None
