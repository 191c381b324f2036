"""The balance of experts: Hugging Face's auxiliary loss of routers, of the layers of one stage.

Over all L layers with experts Hugging Face has LB = E · Σ_e f_e · p_e (Switch Transformer, Fedus et al. 2021, section
2.2): f_e is the mean over layers of how many of its choices a token gives to expert e, p_e that of e's probability, and
the loss gets coef · LB. A stage takes the means over its own L_k layers, LB_k, and adds coef · L_k/L · LB_k. On one
stage that is Hugging Face's loss. On several, Σ L_k/L · LB_k has no products f·p of layers on different stages: it
equals LB where all stages use the experts alike, and asks each stage to be balanced, not only the mean of all layers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.utils.output_capturing import OutputRecorder

from ibp_deepspeed.models.errors import ModelError
from ibp_deepspeed.models.shell import Shell
from ibp_deepspeed.objectives.side_loss import SideLoss

ROUTER_LOSS = "router loss"
"""LB_k in reports: experts per token if all are used alike, more otherwise."""
SWITCH = "output_router_logits"
"""The key of a config that asks for this loss, as it does of the uncut model."""


def is_balanced(hf_config: PretrainedConfig) -> bool:
    """Whether a config asks for the loss."""
    return bool(getattr(hf_config, SWITCH, False))


def has_experts(hf_config: PretrainedConfig) -> bool:
    """Whether it could."""
    return hasattr(hf_config, SWITCH) and hasattr(hf_config, "router_aux_loss_coef")


def routers(layer: nn.Module, decoder: nn.Module) -> list[tuple[nn.Module, int]]:
    """The routers of a decoder layer, and where in their output the logits are: as the architecture itself says."""
    recorder = (getattr(decoder, "_can_record_outputs", None) or {}).get("router_logits")
    if recorder is None:
        return []
    if not isinstance(recorder, OutputRecorder):
        recorder = OutputRecorder(recorder)
    named = layer.named_modules()
    name = recorder.layer_name or ""
    return [(m, recorder.index) for at, m in named if isinstance(m, recorder.target_class) and name in at]


@runtime_checkable
class NotesRouters(Protocol):
    """A layer that keeps what its routers said."""

    def take_router_logits(self) -> list[Tensor]:
        """Of its last forward pass, [tokens, experts] each; it forgets them."""
        ...


class RouterBalance:
    """LB_k of a stage's layers, see above.

    Args:
        shell: of a model whose config asks for it.

    Raises:
        ModelError: the architecture has no such loss.
    """

    def __init__(self, shell: Shell) -> None:
        model, kind = shell.model, shell.hf_config.model_type
        found = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
        self._layers = sum(len(routers(layer, shell.decoder)) for layer in shell.layers)
        if found is None or not self._layers:
            raise ModelError(f"{SWITCH}=True, but model type '{kind}' has no routers with a loss: set it to False.")
        self._loss: Callable[..., Tensor] = found
        self._experts, self._chosen = model.num_experts, model.num_experts_per_tok
        self._coefficient = float(model.router_aux_loss_coef)  # type: ignore[arg-type]

    def __call__(self, layers: Iterable[Any]) -> SideLoss | None:
        """Of the layers of a stage, right after their forward pass."""
        logits = [each for layer in layers if isinstance(layer, NotesRouters) for each in layer.take_router_logits()]
        if not logits:
            return None
        value = self._loss(tuple(logits), self._experts, self._chosen)
        return SideLoss(ROUTER_LOSS, value, self._coefficient * len(logits) / self._layers)
