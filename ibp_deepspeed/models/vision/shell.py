"""An image classifier without weights, and its parts: stem, blocks, what comes before the classifier, classifier."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, PretrainedConfig
from transformers.models.resnet.modeling_resnet import ResNetBasicLayer, ResNetBottleNeckLayer
from transformers.models.vit.modeling_vit import ViTLayer

from ibp_deepspeed.models.errors import ModelError
from ibp_deepspeed.models.meta import MetaModel
from ibp_deepspeed.models.vision.cifar_resnet import MODEL_TYPE as CIFAR_RESNET
from ibp_deepspeed.models.vision.cifar_resnet import register

RESNETS = ("resnet", CIFAR_RESNET)
# Those that tests/models/vision/test_cut.py compares with the uncut model. Another may work: add it there first.
PROVEN = (*RESNETS, "vit")
_BLOCKS = (ResNetBasicLayer, ResNetBottleNeckLayer, ViTLayer)


class Part(NamedTuple):
    """A module of the model, and its path in it."""

    name: str
    module: nn.Module


class ImageShell(MetaModel):
    """The parts of an image classifier, on meta.

    Attributes:
        is_convolutional: whether hidden states are maps [B, C, h, w] (a residual network) or tokens [B, T, H].
        stem: images → the first hidden states.
        blocks: hidden states → hidden states, in their order.
        before: what is between the last block and the classifier: global pooling, or the final norm.
        classifier: to the logits.

    Raises:
        ModelError: a model type that is not proven, or a config that makes no model.
    """

    def __init__(self, hf_config: PretrainedConfig) -> None:
        if hf_config.model_type not in PROVEN:
            raise ModelError(
                f"model type '{hf_config.model_type}' has not been proven to give the same logits cut and uncut as an "
                f"image classifier; proven are {', '.join(PROVEN)}"
            )
        super().__init__(meta_model(hf_config))
        self.is_convolutional = hf_config.model_type in RESNETS
        base = self.model.base_model
        self.stem = self._part(base.embedder if self.is_convolutional else base.embeddings)
        self.blocks = [Part(name, module) for name, module in self.model.named_modules() if isinstance(module, _BLOCKS)]
        self.before = self._part(base.pooler if self.is_convolutional else base.layernorm)
        self.classifier = self._part(self.model.classifier)

    def _part(self, module: nn.Module) -> Part:
        return Part(next(name for name, each in self.model.named_modules() if each is module), module)

    def model_key(self, index: int, key: str) -> str:
        """The name in the whole model of a weight of pipeline layer ``index``."""
        last = len(self.blocks) + 1
        parts = {"stem": self.stem} if index == 0 else {"before": self.before, "classifier": self.classifier}
        if 0 < index < last:
            parts = {"block": self.blocks[index - 1]}
        part, _, rest = key.partition(".")
        if part not in parts:
            raise ModelError(f"layer {index} has a weight '{key}' that no layer of {self} has at that place")
        return f"{parts[part].name}.{rest}"


def walk(layers: Sequence[nn.Module], shape: Sequence[int]) -> list[Tensor]:
    """What each of some layers gives for something of a shape, on meta: nothing is computed."""
    hidden, found = torch.zeros(*shape, device="meta"), []
    for layer in layers:
        hidden = copy.deepcopy(layer).to("meta").eval()(hidden)
        found.append(hidden)
    return found


def meta_model(hf_config: PretrainedConfig) -> nn.Module:
    """The model of a config with its parameters on meta and its buffers real, in fp32.

    Raises:
        ModelError: the config makes none.
    """
    register()
    config = copy.deepcopy(hf_config)
    try:
        with init_empty_weights(include_buffers=False):
            return AutoModelForImageClassification.from_config(config, dtype=torch.float32)
    except (ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ModelError(f"the config of model type '{hf_config.model_type}' makes no model: {error}") from error
