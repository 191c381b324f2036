"""What a model asks of a planner: operations, parameters and kept bytes of its layers and heads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ibp_deepspeed.config.interlocking import AuxHeadConfig
from ibp_deepspeed.models.causal_lm import CausalLM
from ibp_deepspeed.models.costs import Operations, head_operations, layer_operations
from ibp_deepspeed.planner.learned_heads import Sizes
from ibp_deepspeed.planner.workload import Work, Workload
from ibp_deepspeed.schedule.simulator import Costs

_SHORT = 16  # tokens of the sequence on which kept bytes are counted


def workload(
    model: CausalLM, options: AuxHeadConfig | None, *, samples: int, sequence_length: int, weight_bytes: int
) -> Workload:
    """A micro-batch of a model.

    Operations are those of :mod:`.costs`. Kept bytes are counted on a real decoder layer of these shapes over a
    few tokens, and taken to grow with the tokens (as they do with fused attention); all decoder layers are taken to
    keep what the first does.

    Args:
        model: cut.
        options: of auxiliary heads; None: none.
        samples, sequence_length: of a micro-batch.
        weight_bytes: 4, or 2 with fp32 copies.
    """
    tokens = samples * sequence_length
    parameters = model.parameter_counts()
    kept = kept_bytes_per_token(model, torch.float32 if weight_bytes == 4 else torch.bfloat16)
    layers = [
        _work(operations, tokens, count, count, kept * tokens if 0 < index < model.num_layers - 1 else 0.0)
        for index, (operations, count) in enumerate(
            zip(layer_operations(model, sequence_length), parameters, strict=True)
        )
    ]
    head = None
    if options is not None:
        count = model.aux_head_parameters(options)
        trained = count - model.copied_head_parameters(options)
        head = _work(head_operations(model, options, sequence_length), tokens, count, trained, 0.0)
    message = float(tokens * model.hidden_size * weight_bytes)
    sizes = Sizes(model.vocab_size, model.hidden_size)
    return Workload(repr(model), tuple(layers), head, message, tokens, weight_bytes, sizes)


def with_muon(work: Workload, model: CausalLM, options: AuxHeadConfig | None) -> Workload:
    """The same work with Muon for the matrices inside the model and AdamW for all else.

    Args:
        work: of this model, counted or measured.
        model, options: as of :func:`workload`.
    """
    of_layers, of_head = model.muon_parameters(options)
    layers = tuple(replace(layer, matrices=count) for layer, count in zip(work.layers, of_layers, strict=True))
    head = None if work.head is None else replace(work.head, matrices=of_head)
    return replace(work, layers=layers, head=head, optimizer="Muon")


def units(model: CausalLM, options: AuxHeadConfig | None, bounds: Sequence[int], sequence_length: int) -> list[Costs]:
    """Costs of each stage of a cut where the decoder layers of the mean stage take 1 forward; LM heads count too."""
    work = workload(model, options, samples=1, sequence_length=sequence_length, weight_bytes=4)
    unit = sum(layer.forward for layer in work.layers[1:-1]) / (len(bounds) - 1)
    borrow = 0 if options is None else options.borrow
    return work.costs(bounds, unit, borrow=borrow)


def _work(operations: Operations, tokens: int, parameters: int, trained: int, kept: float) -> Work:
    """A multiply-add is two operations."""
    forward, input_gradient, weight_gradient = (2.0 * tokens * piece for piece in operations)
    return Work(forward, input_gradient, weight_gradient, parameters, trained, kept)


def kept_bytes_per_token(model: CausalLM, dtype: torch.dtype) -> float:
    """Bytes that a decoder layer keeps of a token for its backward pass, its weights left out."""
    layer: Any = model.empty_layer(1).to(dtype)
    hidden = torch.zeros(1, _SHORT, model.hidden_size, dtype=dtype, requires_grad=True)
    return kept_bytes(lambda: layer(hidden), layer.parameters()) / _SHORT


def kept_bytes(forward: Callable[[], Tensor], parameters: Iterable[nn.Parameter]) -> int:
    """Bytes that a forward pass keeps for its backward pass; what is saved twice counts once, parameters don't."""
    own = {p.untyped_storage().data_ptr() for p in parameters}
    storages: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage  # held, so that no other one gets its place
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = forward()
    del outputs
    return sum(storage.nbytes() for storage in storages.values())
