"""``torch.compile`` of layers, in place, so that names in checkpoints stay as they are."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from ibp_deepspeed.errors import ConfigError


def compile_layers(layers: Iterable[Any], heads: Iterable[nn.Module], device: torch.device) -> None:
    """Compile the layers of a trunk, and what heads have of the same kind.

    A layer is compiled whole, unless it has a method ``compiled_parts()`` that says which of its modules are; of a head
    only such layers are.

    Raises:
        ConfigError: torch finds no compiler for the device.
    """
    _check_compiler(device)
    # A stage goes backward through one graph several times, whose saved tensors must not be given away the first time.
    torch._functorch.config.donated_buffer = False
    chosen = [layer for layer in layers if isinstance(layer, nn.Module)]
    chosen += [part for head in heads for part in head.modules() if hasattr(part, "compiled_parts")]
    for layer in chosen:
        named: Callable[[], list[nn.Module]] | None = getattr(layer, "compiled_parts", None)
        for part in [layer] if named is None else named():
            part.compile()


def _check_compiler(device: torch.device) -> None:
    if device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        raise ConfigError('"interlocking.compile" needs a C++ compiler on CPU, and g++ was not found: leave it out.')
    if device.type == "cuda" and not torch.utils._triton.has_triton():
        raise ConfigError('"interlocking.compile" needs Triton on a GPU, which was not found: leave it out.')
