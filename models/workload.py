"""What a model asks of a planner: operations, parameters and kept bytes of its layers and heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ibp_deepspeed.config.interlocking import AuxHeadConfig
from ibp_deepspeed.planner.workload import Work, Workload
from models.causal_lm import CausalLM
from models.costs import head_readout_work

_SHORT = 16  # tokens of the sequence on which kept bytes are counted


def workload(
    model: CausalLM, options: AuxHeadConfig | None, *, samples: int, sequence_length: int, weight_bytes: int
) -> Workload:
    """A micro-batch of a model.

    Operations are those of matrix products, attention over half of a sequence on average. Kept bytes are counted on a
    real decoder layer of these shapes over a few tokens, and taken to grow with the tokens (as they do with fused
    attention); all decoder layers are taken to be like the first.

    Args:
        model: cut.
        options: of auxiliary heads; None: none.
        samples, sequence_length: of a micro-batch.
        weight_bytes: 4, or 2 with fp32 copies.
    """
    tokens = samples * sequence_length
    matrices, parameters = model.matrix_parameters(), model.parameter_counts()
    kept = kept_bytes_per_token(model, torch.float32 if weight_bytes == 4 else torch.bfloat16)
    attention = 2.0 * 2 * sequence_length / 2 * model.hidden_size * tokens  # scores and values: 2·S·H each, half of it
    layers = []
    for index in range(model.num_layers):
        product = 2.0 * matrices[index] * tokens
        decoder = 0 < index < model.num_layers - 1
        layers.append(
            Work(
                forward=product + (attention if decoder else 0.0),
                input_gradient=(product if index else 0.0) + (2 * attention if decoder else 0.0),
                weight_gradient=product,
                parameters=parameters[index],
                trained=parameters[index],
                kept=kept * tokens if decoder else 0.0,
            )
        )
    head = None if options is None else _head(model, options, tokens, layers[1])
    message = float(tokens * model.hidden_size * weight_bytes)
    return Workload(repr(model), tuple(layers), head, message, tokens, weight_bytes)


def _head(model: CausalLM, options: AuxHeadConfig, tokens: int, layer: Work) -> Work:
    product = 2.0 * head_readout_work(model, options) * options.aux_tokens * tokens
    count, copied = model.aux_head_parameters(options), options.readout != "private"
    readout = model.hidden_size * model.vocab_size
    return Work(
        forward=product + options.blocks * layer.forward,
        input_gradient=product + options.blocks * layer.input_gradient,
        weight_gradient=(0.0 if copied else product) + options.blocks * layer.weight_gradient,
        parameters=count,
        trained=count - (readout if copied else 0),
        kept=0.0,
    )


def kept_bytes_per_token(model: CausalLM, dtype: torch.dtype) -> float:
    """Bytes that a decoder layer keeps of a token for its backward pass, its weights left out."""
    layer: Any = model.empty_layer(1).to(dtype)
    hidden = torch.zeros(1, _SHORT, model.hidden_size, dtype=dtype, requires_grad=True)
    return sum(_kept(layer, hidden)) / _SHORT


def _kept(layer: nn.Module, hidden: Tensor) -> list[int]:
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    storages: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage  # held, so that no other one gets its place
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = layer(hidden)
    del outputs
    return [storage.nbytes() for storage in storages.values()]
