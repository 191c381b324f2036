"""A Hugging Face model without weights, parts of which get real ones, drawn by the model's own rules or given."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ibp_deepspeed.models.errors import ModelError

M = TypeVar("M", bound=nn.Module)


class MetaModel:
    """A model on the meta device, of whose parts pipeline layers are copies.

    Args:
        model: its parameters on meta, its buffers real.

    Attributes:
        model: the same.
        hf_config: its config.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.hf_config: PretrainedConfig = model.config

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.hf_config.model_type})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # nothing in it changes, so copies of layers share it

    def copy_of(self, part: M, *swaps: tuple[nn.Module, nn.Module]) -> M:
        """A copy of a part, still on meta, in which the first of each pair of modules is replaced by the second."""
        memo: dict[int, Any] = {id(old): new for old, new in swaps}
        return copy.deepcopy(part, {**memo, id(self.hf_config): self.hf_config})

    def initialise(
        self, module: nn.Module, part: str, seed: int, dtype: torch.dtype, values: Mapping[str, Tensor]
    ) -> None:
        """Give the parameters of a module that are on meta real memory on the CPU, and values.

        Args:
            module: a copy of a part of the model.
            part, seed: what drawn values depend on, and nothing else; they are drawn by the model's own rules.
            dtype: values are drawn in fp32 and rounded to it. Buffers keep those that the model gave them.
            values: by name in the module's state dict, instead of drawn ones.

        Raises:
            ModelError: a value of another shape, or a parameter that the model's rules forget.
        """
        for owner, name, parameter in _own_parameters(module):
            if parameter.is_meta:
                # NaN, so that a parameter that the model's rules forget is seen below
                filled = torch.full(parameter.shape, torch.nan, dtype=torch.float32, device="cpu")
                setattr(owner, name, nn.Parameter(filled, requires_grad=parameter.requires_grad))
        if not module.state_dict().keys() <= values.keys():
            with torch.no_grad(), seeded(f"{seed}/{part}"):
                for child in reversed(list(module.modules())):  # parents last: gpt2's rescale what children drew
                    self.model._init_weights(child)
        self._fill(module, part, values)
        for owner, name, parameter in _own_parameters(module):
            if parameter.isnan().any():
                raise ModelError(
                    f"model type '{self.hf_config.model_type}' leaves {type(owner).__name__}.{name} of {part} without "
                    "an initial value (not a number)"
                )
            parameter.data = parameter.data.to(dtype)

    @staticmethod
    @torch.no_grad()
    def _fill(module: nn.Module, part: str, values: Mapping[str, Tensor]) -> None:
        state = module.state_dict()
        for name, value in values.items():
            if state[name].shape != value.shape:
                raise ModelError(
                    f"{part} has a weight {name} of {tuple(value.shape)}, the model's is {tuple(state[name].shape)}: "
                    "the sizes in the model's config must be those of the weights."
                )
            state[name].copy_(value)


def _own_parameters(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            yield owner, name, parameter


@contextmanager
def seeded(text: str) -> Iterator[None]:
    """Draw from a seed made of a text; the generators of the caller are as before afterwards."""
    state = torch.random.default_generator.get_state()
    try:
        # only the CPU's generator: torch.manual_seed would also set the accelerators'
        digest = hashlib.sha256(text.encode()).digest()
        torch.random.default_generator.manual_seed(int.from_bytes(digest[:7]))
        yield
    finally:
        torch.random.default_generator.set_state(state)
