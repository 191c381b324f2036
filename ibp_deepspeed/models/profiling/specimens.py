"""The specimens of a model: one of each kind of layer, and an auxiliary head."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ibp_deepspeed.config.interlocking import AuxHeadConfig
from ibp_deepspeed.models.causal_lm import CausalLM
from ibp_deepspeed.models.profiling.specimen import Specimen
from ibp_deepspeed.objectives.cross_entropy import CausalLMLoss
from ibp_deepspeed.objectives.head import Objective, last_objective


class Specimens:
    """Makes them, on the CPU.

    Args:
        model: cut, of the dtype that is computed with.
        options: of the auxiliary heads.
        samples, sequence_length: of a micro-batch.
        compiled: as with ``"compile": true``.
    """

    def __init__(
        self, model: CausalLM, options: AuxHeadConfig, *, samples: int, sequence_length: int, compiled: bool = False
    ) -> None:
        self._model, self._options, self._compiled = model, options, compiled
        self._kinds = model.layer_kinds()
        generator = torch.Generator().manual_seed(0)
        self._tokens = torch.randint(model.vocab_size, (samples, sequence_length), generator=generator)
        self._loss_fn = CausalLMLoss(options.chunk_tokens)

    def every(self) -> list[Specimen]:
        """A layer of each kind (embedding, decoder layers, the last one with its loss), and the head with its."""
        return [*map(self.layer, dict.fromkeys(self._kinds)), self.head()]

    def layer(self, index: int) -> Specimen:
        """Layer ``index``, the first of its kind."""
        last = self._model.num_layers - 1
        alike = [i for i, kind in enumerate(self._kinds) if kind == index]
        module = self._model.build_layer(index)
        if index == 0:
            return Specimen("embedding", alike, module, _layer, self._tokens.to, compiled=self._compiled)
        if index < last:
            name, run = f"decoder layer {index}", _layer
        else:
            name = "last layer and loss"
            run = partial(_with_loss, last_objective().configured(None, self._loss_fn), self._tokens)
        return Specimen(name, alike, module, run, partial(self._hidden, module), compiled=self._compiled)

    def head(self) -> Specimen:
        """An auxiliary head; its blocks are of the kinds that follow the middle of the model."""
        middle = (self._model.num_layers - 2) // 2
        objective = self._model.objective(0, self._options, after=middle)
        objective.token_counts = torch.ones(self._model.vocab_size, dtype=torch.int64)
        objective.configured(self._options, self._loss_fn)
        run, module = partial(_with_loss, objective, self._tokens), objective.module
        return Specimen("auxiliary head", [], module, run, partial(self._hidden, module), compiled=self._compiled)

    def _hidden(self, module: nn.Module, device: torch.device) -> Tensor:
        """Hidden states [B, S, H], a leaf."""
        dtype = next(module.parameters()).dtype
        return torch.randn(*self._tokens.shape, self._model.hidden_size, dtype=dtype, device=device, requires_grad=True)


def _layer(module: nn.Module, inputs: Any) -> Tensor:
    outputs: Tensor = module(inputs)
    return outputs


def _with_loss(objective: Objective, labels: Tensor, module: nn.Module, hidden: Tensor) -> Tensor:
    """A loss in training, on what ``module`` gives: the objective's own, or its copy with a split backward pass."""
    where = {"batch": 0, "micro_batch": 0, "index": 0}
    labels = labels.to(hidden.device)
    prediction = objective.training_loss(module(hidden), labels, **where)
    return prediction + objective.stage_loss(hidden.detach(), hidden, labels, **where)
