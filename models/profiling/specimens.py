"""The specimens of a model: one of each kind of layer, and an auxiliary head."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ibp_deepspeed.config.interlocking import AuxHeadConfig
from ibp_deepspeed.objectives.cross_entropy import CausalLMLoss
from ibp_deepspeed.objectives.head import Objective, last_objective
from models.causal_lm import CausalLM
from models.objective import LanguageModelObjective
from models.profiling.specimen import Specimen


def specimens(
    model: CausalLM, options: AuxHeadConfig, *, samples: int, sequence_length: int, compiled: bool = False
) -> list[Specimen]:
    """Embedding, decoder layers of each kind, the last layer with its loss, an auxiliary head with its; on the CPU.

    A head's blocks are of the kinds that follow the middle of the model.

    Args:
        model: cut, of the dtype that is computed with.
        options: of the head.
        samples, sequence_length: of a micro-batch.
        compiled: as with ``"compile": true``.
    """
    kinds = model.layer_kinds()
    last = model.num_layers - 1
    shape = (samples, sequence_length)
    labels = torch.randint(model.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    found = []
    for first in dict.fromkeys(kinds):
        module = model.build_layer(first)
        alike = [index for index, kind in enumerate(kinds) if kind == first]
        inputs = partial(labels.to) if first == 0 else partial(_hidden, model, shape, module)
        run = partial(_with_loss, last_objective().configured(None, CausalLMLoss(options.chunk_tokens)), labels)
        found.append(
            Specimen(_name(first, last), alike, module, run if first == last else _layer, inputs, compiled=compiled)
        )
    objective = LanguageModelObjective(model.aux_head(0, options, after=(model.num_layers - 2) // 2))
    objective.token_counts = torch.ones(model.vocab_size, dtype=torch.int64)
    objective.configured(options, CausalLMLoss(options.chunk_tokens))
    run = partial(_with_loss, objective, labels)
    inputs = partial(_hidden, model, shape, objective.module)
    return [*found, Specimen("auxiliary head", [], objective.module, run, inputs, compiled=compiled)]


def _name(index: int, last: int) -> str:
    names = {0: "embedding", last: "last layer and loss"}
    return names.get(index, f"decoder layer {index}")


def _hidden(model: CausalLM, shape: tuple[int, int], module: nn.Module, device: torch.device) -> Tensor:
    """Hidden states [B, S, H], a leaf."""
    dtype = next(module.parameters()).dtype
    return torch.randn(*shape, model.hidden_size, dtype=dtype, device=device, requires_grad=True)


def _layer(module: nn.Module, inputs: Any) -> Tensor:
    outputs: Tensor = module(inputs)
    return outputs


def _with_loss(objective: Objective, labels: Tensor, module: nn.Module, hidden: Tensor) -> Tensor:
    """A loss in training; what stands for it, module, is a copy of the objective's own."""
    where = {"batch": 0, "micro_batch": 0, "index": 0}
    return objective.training_loss(module(hidden), labels.to(hidden.device), **where)
