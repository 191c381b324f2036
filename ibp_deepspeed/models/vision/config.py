"""Configs of image classifiers: with the classes of the data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig

from ibp_deepspeed.models.config import load_config
from ibp_deepspeed.models.errors import ModelError
from ibp_deepspeed.models.vision.cifar_resnet import register


def load_image_config(path_or_name: str, classes: Sequence[str], **overrides: Any) -> PretrainedConfig:
    """A Hugging Face config with an output for each class, see :func:`ibp_deepspeed.models.config.load_config`.

    Raises:
        ModelError: as there.
    """
    register()
    config = load_config(path_or_name, **overrides)
    config.id2label = dict(enumerate(classes))
    config.label2id = {name: number for number, name in enumerate(classes)}
    return config


def channels_of(path_or_name: str, overrides: dict[str, Any]) -> int:
    """Of the images that a config's model takes."""
    register()
    channels = getattr(load_config(path_or_name, **overrides), "num_channels", None)
    if not isinstance(channels, int):
        raise ModelError(f"the config in '{path_or_name}' has no 'num_channels': it is of no image classifier.")
    return channels
