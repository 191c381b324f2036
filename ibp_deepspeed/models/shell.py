"""A Hugging Face causal language model without weights, and the names of its parts.

The shell lives on the meta device and costs no memory. Every pipeline layer is a copy of one part of it, which
alone gets real weights, drawn by the model's own rules from a seed of that layer.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ibp_deepspeed.models.errors import ModelError, in_words
from ibp_deepspeed.models.meta import MetaModel

_LAYERS = ("layers", "h", "blocks")
_NORMS = (
    "norm", "ln_f", "final_layer_norm", "final_layernorm", "final_norm", "norm_f", "layer_norm", "layernorm",
    "embedding_norm",
)  # fmt: skip

M = TypeVar("M", bound=nn.Module)


class Shell(MetaModel):
    """The parts of a causal language model, on meta.

    Attributes:
        hf_config: an own copy of the config: LM head untied from the embedding, no cache.
        was_tied: whether the config given tied them.
        balances_experts: whether it asked for the routers' loss, which the layers of each stage then have.
        model, decoder: the model and its decoder; decoder_name is the latter's path in the former.
        layers, layers_name: the ModuleList of decoder layers and its name in the decoder.
        norm, norm_name: the final norm and its name in the decoder.
        readout: the linear map to the logits; readout_name is its path in the model.
        projection: what a decoder applies after the final norm (OPT's ``project_out``), or None.

    Raises:
        ModelError: a model type or a setting that cannot be cut.
    """

    def __init__(self, hf_config: PretrainedConfig) -> None:
        _refuse(hf_config)
        self.was_tied = bool(getattr(hf_config, "tie_word_embeddings", False))
        super().__init__(_model(hf_config))
        self.balances_experts = bool(getattr(hf_config, "output_router_logits", False))
        self.decoder = self._decoder()
        self.decoder_name = next(name for name, m in self.model.named_modules() if m is self.decoder)
        self.layers_name, self.layers = self._part(_LAYERS, nn.ModuleList, "list of decoder layers")
        self.norm_name, self.norm = self._part(_NORMS, nn.Module, "final norm")
        self.readout: nn.Linear = self.model.get_output_embeddings()
        if self.readout is None:
            raise ModelError(f"a model of type '{hf_config.model_type}' has no linear map to logits")
        self.readout_name = next(name for name, m in self.model.named_modules() if m is self.readout)
        projection = getattr(self.decoder, "project_out", None)
        self.projection = projection if isinstance(projection, nn.Module) else None

    def _decoder(self) -> PreTrainedModel:
        """Where the layers are; what some models call their decoder is the whole, or something else."""
        found = [self.model.get_decoder(), self.model.base_model, getattr(self.model, "model", None)]
        has_layers = (m for m in found if any(isinstance(getattr(m, name, None), nn.ModuleList) for name in _LAYERS))
        return next(has_layers, found[0])

    def _part(self, names: tuple[str, ...], kind: type[M], what: str) -> tuple[str, M]:
        for name in names:
            part = getattr(self.decoder, name, None)
            if isinstance(part, kind):
                return name, part
        raise ModelError(
            f"{type(self.decoder).__name__} of model type '{self.hf_config.model_type}' has no {what} "
            f"({' or '.join(names)}), so it cannot be cut into pipeline layers"
        )


def untied(hf_config: PretrainedConfig) -> PretrainedConfig:
    """A copy of a config whose LM head has its own weights, without a cache or other outputs than logits."""
    hf_config = copy.deepcopy(hf_config)
    hf_config.tie_word_embeddings = False
    hf_config.use_cache = False
    hf_config.output_hidden_states = False
    hf_config.output_attentions = False
    if hasattr(hf_config, "output_router_logits"):
        hf_config.output_router_logits = False
    return hf_config


def meta_model(hf_config: PretrainedConfig) -> PreTrainedModel:
    """The model of a config with its parameters on meta and its buffers real, in fp32.

    ``from_config`` chooses the attention: sdpa where the model has it. (A decoder layer built on its own would
    silently get eager attention, which without a mask is not causal.)
    """
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)


def _model(hf_config: PretrainedConfig) -> PreTrainedModel:
    try:
        return meta_model(untied(hf_config))
    except Exception as error:  # sizes that don't fit each other, a package that is missing: any kind of error
        raise ModelError(
            f"no model of type '{hf_config.model_type}' can be made of this config: {in_words(error)}"
        ) from error


def _refuse(hf_config: PretrainedConfig) -> None:
    kind = hf_config.model_type
    if type(hf_config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"model type '{kind}' has no causal language model in transformers, so it cannot be cut")
    try:
        text = hf_config.get_text_config()
    except ValueError as error:  # it has several
        raise ModelError(f"model type '{kind}' is of more than one model: {in_words(error)}") from error
    if text is not hf_config:
        raise ModelError(
            f"model type '{kind}' is of more than text: give the config of its text model alone ('{text.model_type}')"
        )
    wrong = {
        "layerdrop": "training that skips whole layers",
        "add_cross_attention": "cross attention",
    }
    for name, meaning in wrong.items():
        if getattr(hf_config, name, None):
            raise ModelError(
                f"{name}={getattr(hf_config, name)} in the config of model type '{kind}' asks for {meaning}, "
                f"which a cut model does not do: set it to {type(getattr(hf_config, name))()}"
            )
    if getattr(hf_config, "is_causal", True) is False:
        raise ModelError(f"is_causal=False in the config of model type '{kind}': only causal models are cut")
