"""What of a language model is trained: all of it, or not some layers, or low-rank adapters on its weights (LoRA).

LoRA (Hu et al. 2021, arXiv:2106.09685) is peft's: its layers are injected into each decoder layer as that is built, and
its own functions name their tensors. docs/huggingface.md says what is trained and what a checkpoint then holds.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ibp_deepspeed.models.errors import ModelError
from ibp_deepspeed.models.layers import DecoderLayer
from ibp_deepspeed.models.meta import seeded
from ibp_deepspeed.models.shell import Shell

ALL_LINEAR = "all-linear"
"""In the place of targets: every linear map of a decoder layer, as peft calls it."""


class Lora(BaseModel):
    """Options of adapters: W·x becomes W·x + alpha/rank · B·A·x, A and B of that rank; W stays as it is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: int = Field(default=8, ge=1)
    alpha: int = Field(default=16, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Of x before A."""
    targets: tuple[str, ...] = ()
    """Names of the linear maps that have adapters; none: those that peft knows for the model type."""

    @classmethod
    def parse(cls, text: str) -> Lora:
        """``rank=8,alpha=16,dropout=0,targets=q_proj+v_proj``, any of them; alpha is twice the rank if not given.

        Raises:
            ModelError: something else.
        """
        values: dict[str, Any] = {}
        for pair in filter(None, text.split(",")):
            key, separator, value = pair.partition("=")
            if key not in cls.model_fields or not separator or not value:
                raise ModelError(
                    f"--lora {text}: '{pair}' is none of rank=8, alpha=16, dropout=0, targets=q_proj+v_proj, with "
                    "commas between them."
                )
            values[key] = tuple(value.split("+")) if key == "targets" else value
        try:
            lora = cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            raise ModelError(f"--lora {text}: {first['loc'][0]}: {first['msg'].lower()}.") from None
        return lora if "alpha" in values else lora.model_copy(update={"alpha": 2 * lora.rank})

    def for_model(self, shell: Shell) -> Lora:
        """With its targets named.

        Raises:
            ModelError: peft knows none for this model type, or the model has none of that name.
        """
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

        kind, there = shell.hf_config.model_type, linear_maps(shell.layers[0])
        wanted = self.targets or KNOWN.get(kind, ())
        if wanted == (ALL_LINEAR,):
            wanted = there
        if not wanted:
            raise ModelError(
                f"peft knows no targets of LoRA for model type '{kind}': give --lora targets={'+'.join(there[:2])}, or "
                f"{ALL_LINEAR}; its linear maps are {', '.join(there)}."
            )
        unknown = [name for name in wanted if name not in there]
        if unknown:
            raise ModelError(f"--lora: model type '{kind}' has no linear map {unknown[0]}, but {', '.join(there)}.")
        return self.model_copy(update={"targets": tuple(wanted)})

    def peft_config(self, layer: nn.Module, **more: Any) -> Any:
        """peft's ``LoraConfig`` for layers like this one."""
        from peft import LoraConfig

        ends = tuple(f".{target}" for target in self.targets)
        transposed = any(isinstance(m, Conv1D) and f".{name}".endswith(ends) for name, m in layer.named_modules())
        return LoraConfig(
            fan_in_fan_out=transposed,
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=list(self.targets),
            task_type="CAUSAL_LM",
            **more,
        )


class Tuning(BaseModel):
    """What is trained; layers are counted as in ``CausalLM.layer_specs``: embedding, decoder layers, head."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    frozen: tuple[int, ...] = ()
    """Layers that are not trained, rising."""
    lora: Lora | None = None
    """Adapters in the other decoder layers, which are all that is trained then."""
    base: str | None = None
    """Digest of the weights that the adapters belong to."""

    def trains(self, index: int, layers: int) -> bool:
        """Whether anything of layer ``index`` of so many is trained."""
        return index not in self.frozen and (self.lora is None or 0 < index < layers - 1)

    def frozen_stages(self, bounds: Sequence[int]) -> tuple[int, ...]:
        """The stages of a partition with nothing to train but a head."""
        stages = enumerate(zip(bounds, bounds[1:], strict=False))
        return tuple(k for k, (a, b) in stages if not any(self.trains(i, bounds[-1]) for i in range(a, b)))

    def apply(self, layer: nn.Module, index: int, seed: int) -> nn.Module:
        """To layer ``index`` with its weights: what is not trained has ``requires_grad`` off, and is not in the layer's
        state dict where there are adapters, so that checkpoints hold these alone.

        Args:
            layer: as ``CausalLM`` builds it.
            index: where it stands.
            seed: of the adapters' first values.
        """
        if self.lora is None:
            return layer.requires_grad_(index not in self.frozen)
        layer.requires_grad_(False)
        self.adapt(layer, index, seed)
        layer.register_state_dict_post_hook(_adapters_alone)
        layer.register_load_state_dict_post_hook(_base_is_elsewhere)
        return layer

    def adapt(self, layer: nn.Module, index: int, seed: int = 0) -> None:
        """Put adapters into a layer that has some."""
        if not isinstance(layer, DecoderLayer) or index in self.frozen or self.lora is None:
            return
        from peft import inject_adapter_in_model

        with seeded(f"{seed}/adapters of layer {index}"):
            inject_adapter_in_model(self.lora.peft_config(layer.layer), layer.layer)

    def __str__(self) -> str:
        frozen = f"layers {', '.join(map(str, self.frozen))} frozen" if self.frozen else ""
        lora = f"LoRA of {self.lora}" if self.lora is not None else ""
        return " and ".join(filter(None, (frozen, lora))) or "all weights trained"


EVERYTHING = Tuning()
"""Is trained."""


def parse_freeze(text: str, decoder_layers: int) -> tuple[int, ...]:
    """Indices of the layers that ``--freeze`` names: N, the embedding and the first N decoder layers, or a list such as
    ``embedding,layers.0-5,head``.

    Raises:
        ModelError: something else, or layers that the model does not have.
    """
    if text.isdecimal():
        text = "embedding" if int(text) == 0 else f"embedding,layers.0-{int(text) - 1}"
    found: set[int] = set()
    for name in text.split(","):
        numbers = re.fullmatch(r"layers\.(\d+)(?:-(\d+))?", name)
        if name in ("embedding", "head"):
            found.add(0 if name == "embedding" else decoder_layers + 1)
        elif numbers is not None and int(numbers[1]) <= int(numbers[2] or numbers[1]) < decoder_layers:
            found.update(range(int(numbers[1]) + 1, int(numbers[2] or numbers[1]) + 2))
        else:
            raise ModelError(
                f"--freeze names '{name}': give the number of the first decoder layers that are not trained, or a list "
                f"of embedding, head, layers.0 … layers.{decoder_layers - 1} and ranges such as layers.0-2."
            )
    return tuple(sorted(found))


def linear_maps(layer: nn.Module) -> list[str]:
    """Names of the linear maps in a decoder layer, each once."""
    found = (name.rpartition(".")[2] for name, m in layer.named_modules() if isinstance(m, nn.Linear | Conv1D))
    return list(dict.fromkeys(found))


def merged_state(layer: nn.Module, adapters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a layer as if it had no adapters: their product is in the weights.

    Args:
        layer: with its base weights and adapters in it (:meth:`Tuning.adapt`).
        adapters: their values, as a checkpoint has them.

    Raises:
        ModelError: values that the layer has no place for, or places without a value.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    missing, unknown = layer.load_state_dict(dict(adapters), strict=False)
    lost = [name for name in missing if ".lora_" in name]
    if lost or unknown:
        raise ModelError(f"the adapters don't fit the model: missing {lost}, unknown {unknown}.")
    for module in layer.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
    state = layer.state_dict()
    return {name.replace(".base_layer.", "."): value for name, value in state.items() if ".lora_" not in name}


def _adapters_alone(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    for name in [name for name in state if name.startswith(prefix) and ".lora_" not in name]:
        del state[name]


def _base_is_elsewhere(module: nn.Module, keys: Any) -> None:
    keys.missing_keys[:] = [name for name in keys.missing_keys if ".lora_" in name]


def check_something_is_trained(tuning: Tuning, layers: int, heads: Collection[int]) -> None:
    """Raises a ModelError where neither a layer nor a head is left."""
    if not heads and not any(tuning.trains(index, layers) for index in range(layers)):
        raise ModelError(f"nothing is left to train: {tuning}, and there are no heads.")
