"""Small image classifiers and images, the same wherever they are made."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, ResNetConfig, ViTConfig

from ibp_deepspeed.models.vision.cifar_resnet import CifarResNetConfig
from ibp_deepspeed.models.vision.image_classifier import ImageClassifier

SIZE, CLASSES = 16, 5
_RESNET: dict[str, Any] = {"embedding_size": 4, "hidden_sizes": [4, 6, 8], "depths": [2, 1, 2], "num_labels": CLASSES}
# no norm over four samples of one pixel, which would make 6e-3 of one rounding in three batches
_BOTTLENECK: dict[str, Any] = {
    "layer_type": "bottleneck",
    "embedding_size": 16,
    "hidden_sizes": [32, 64],
    "depths": [4, 1],
}


def config(kind: str, **values: Any) -> PretrainedConfig:
    """Of a model with five blocks: cifar_resnet, resnet, bottleneck or vit."""
    if kind == "vit":
        sizes = {"hidden_size": 16, "num_hidden_layers": 5, "num_attention_heads": 2, "intermediate_size": 24}
        return ViTConfig(**{**sizes, "image_size": SIZE, "patch_size": 4, "num_labels": CLASSES, **values})
    made = CifarResNetConfig if kind == "cifar_resnet" else ResNetConfig
    blocks = _BOTTLENECK if kind == "bottleneck" else {"layer_type": "basic"}
    return made(**{**_RESNET, **blocks, **values})


def classifier(kind: str, **values: Any) -> ImageClassifier:
    return ImageClassifier(config(kind, **values), SIZE, seed=3)


def images(number: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images [n, 3, S, S] and classes [n]."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(number, 3, SIZE, SIZE, generator=generator)
    return pixels, torch.randint(CLASSES, (number,), generator=generator)
