"""A real language model for contenders."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from benchmarks.speed.contenders import Model

if TYPE_CHECKING:
    from ibp_deepspeed.models import CausalLM


def llama(
    layers: int, width: int, vocabulary: int, *, settings: dict[str, Any] | None = None, mode: str = "furthest"
) -> Model:
    """A Llama of this many decoder layers; embedding, and norm with readout, join the outermost of them."""
    from ibp_deepspeed.config.interlocking import AuxHeadConfig
    from ibp_deepspeed.objectives.cross_entropy import CausalLMLoss

    model = cut_llama(layers, width, vocabulary)
    makers: list[Callable[[], nn.Module]] = [partial(model.build_layer, i) for i in range(1, layers + 1)]
    makers[0] = partial(_joined, model, 0, 1)
    makers[-1] = partial(_joined, model, layers, layers + 1)
    head = partial(model.aux_head, 0, AuxHeadConfig())
    return Model(makers, head, CausalLMLoss(), settings or {}, {"mode": mode})


def cut_llama(layers: int, width: int, vocabulary: int) -> CausalLM:
    """Its layers, to be built."""
    from transformers import AutoConfig

    from ibp_deepspeed.models import CausalLM

    config = AutoConfig.for_model(
        "llama",
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 8 * 8,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 32),
        num_key_value_heads=max(1, width // 32),
        vocab_size=vocabulary,
    )
    return CausalLM(config)


def _joined(model: Any, *indices: int) -> nn.Module:
    return nn.Sequential(*(model.build_layer(index) for index in indices))
