"""Auxiliary heads of image classifiers."""

from __future__ import annotations

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from ibp_deepspeed.config.interlocking import AuxHeadConfig
from ibp_deepspeed.errors import ConfigError
from ibp_deepspeed.models.vision.layers import BlockLayer, ClassifierLayer
from ibp_deepspeed.models.vision.shell import ImageShell

_FOR_IMAGES = {"blocks", "borrow"}


class ConvolutionalHead(nn.Module):
    """Maps [B, C, h, w] → logits: two 3×3 convolutions with batch norm and ReLU, global average, linear layer.

    The auxiliary network of the paper's residual networks; its released code calls it conv128_bn_conv64_bn_gbpl_fc, for
    networks whose stem has 64 channels. Here the channels are 2·w and w for a stem of w.

    Args:
        channels: C, of the maps.
        width: w.
        classes: of the logits.
    """

    def __init__(self, channels: int, width: int, classes: int) -> None:
        super().__init__()
        with init_empty_weights(include_buffers=False):
            self.layers = nn.Sequential(
                nn.Conv2d(channels, 2 * width, kernel_size=3, padding=1),
                nn.BatchNorm2d(2 * width),
                nn.ReLU(),
                nn.Conv2d(2 * width, width, kernel_size=3, padding=1),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Linear(width, classes),
            )

    def forward(self, maps: Tensor) -> Tensor:
        return self.layers(maps)


class TokenHead(nn.Module):
    """Tokens [B, T, H] → logits: blocks, a norm and a classifier of the model's kinds, which reads the class token."""

    def __init__(self, shell: ImageShell, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(BlockLayer(shell, 0) for _ in range(blocks)))
        self.readout = ClassifierLayer(shell)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.readout(self.blocks(tokens))


def make_head(shell: ImageShell, options: AuxHeadConfig, hidden: torch.Size) -> nn.Module:
    """The head behind hidden states of a shape, its parameters on meta.

    Raises:
        ConfigError: options that heads of images do not have.
    """
    check_options(options, shell.is_convolutional)
    if shell.is_convolutional:
        return ConvolutionalHead(hidden[1], shell.hf_config.embedding_size, shell.hf_config.num_labels)
    return TokenHead(shell, options.blocks)


def check_options(options: AuxHeadConfig, is_convolutional: bool) -> None:
    """Refuse options of language models' heads.

    Raises:
        ConfigError: one is set, and what images have.
    """
    default = AuxHeadConfig()
    has = _FOR_IMAGES - {"blocks"} if is_convolutional else _FOR_IMAGES
    for name in type(options).model_fields:
        if name not in has and getattr(options, name) != getattr(default, name):
            what = "residual networks" if is_convolutional else "vision Transformers"
            raise ConfigError(
                f'"aux_head.{name}" is {getattr(options, name)!r}, of these options heads of {what} have '
                f"{' and '.join(sorted(has))} alone: leave it out."
            )
