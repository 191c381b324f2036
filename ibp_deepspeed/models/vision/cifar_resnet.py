"""Residual networks for images of 32 × 32: transformers' ResNet with a stem that keeps the resolution.

He et al. 2016 (arXiv:1512.03385, section 4.2) and the code of interlocking backpropagation's paper begin with one 3×3
convolution of stride 1; transformers' own ResNet begins as for ImageNet, 7×7 of stride 2 and a pooling of stride 2,
which leaves 8 × 8 of an image of CIFAR. All else, names of weights included, is transformers'.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification
from transformers.models.resnet.modeling_resnet import ResNetConvLayer

MODEL_TYPE = "cifar_resnet"


class CifarResNetConfig(ResNetConfig):
    """A ResNetConfig; its model has the small stem."""

    model_type = MODEL_TYPE


class CifarStem(nn.Module):
    """Images [B, C, S, S] → [B, embedding_size, S, S]: convolution 3×3, batch norm, activation."""

    def __init__(self, config: CifarResNetConfig) -> None:
        super().__init__()
        size, activation = config.embedding_size, config.hidden_act
        self.embedder = ResNetConvLayer(config.num_channels, size, kernel_size=3, stride=1, activation=activation)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.embedder(pixel_values)


class CifarResNetForImageClassification(ResNetForImageClassification):
    """A ResNetForImageClassification with a :class:`CifarStem`."""

    config_class = CifarResNetConfig

    def __init__(self, config: CifarResNetConfig) -> None:
        super().__init__(config)
        self.resnet.embedder = CifarStem(config)
        self.post_init()


def register() -> None:
    """Have transformers' Auto classes know it; again does no harm."""
    AutoConfig.register(MODEL_TYPE, CifarResNetConfig, exist_ok=True)
    AutoModelForImageClassification.register(CifarResNetConfig, CifarResNetForImageClassification, exist_ok=True)
