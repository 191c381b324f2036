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
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ibp_deepspeed.models.errors import ModelError
from ibp_deepspeed.models.meta import MetaModel

# Those that tests/models/test_causal_lm.py compares with the uncut model. Another may work: add it there first.
PROVEN = (
    "cohere", "cohere2", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "gpt_oss", "granite", "llama",
    "mistral", "mixtral", "olmo2", "olmo3", "olmoe", "opt", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe",
    "smollm3", "stablelm", "starcoder2",
)  # fmt: skip
_LAYERS = ("layers", "h")
_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm")

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
        super().__init__(meta_model(untied(hf_config)))
        self.balances_experts = bool(getattr(hf_config, "output_router_logits", False))
        self.decoder: PreTrainedModel = self.model.get_decoder()
        self.decoder_name = next(name for name, m in self.model.named_modules() if m is self.decoder)
        self.layers_name, self.layers = self._part(_LAYERS, nn.ModuleList, "list of decoder layers")
        self.norm_name, self.norm = self._part(_NORMS, nn.Module, "final norm")
        self.readout: nn.Linear = self.model.get_output_embeddings()
        self.readout_name = next(name for name, m in self.model.named_modules() if m is self.readout)
        projection = getattr(self.decoder, "project_out", None)
        self.projection = projection if isinstance(projection, nn.Module) else None

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


def _refuse(hf_config: PretrainedConfig) -> None:
    kind = hf_config.model_type
    if kind not in PROVEN:
        raise ModelError(
            f"model type '{kind}' has not been proven to give the same logits cut and uncut; "
            f"proven are {', '.join(PROVEN)}"
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
