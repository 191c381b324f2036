"""Meet the other processes, with or without a C++ compiler on the machine."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from typing import Any

import deepspeed
from deepspeed.accelerator import get_accelerator

from ibp_deepspeed.config import ConfigError

_COMPILED_ON_CPU = ("adam", "adamw", "adagrad", "lion", "lamb")


def init_distributed() -> None:
    """As ``deepspeed.init_distributed``, but on CPU processes the extension that it compiles at first use is optional.

    Without a compiler DeepSpeed's shared-memory all-reduce is marked as not available, and gloo does its work.
    """
    if _needs_no_compiler() or has_compiler():
        deepspeed.init_distributed(get_accelerator().communication_backend_name())
        return
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if os.environ.get("RANK", "0") == "0":
        print("no C++ compiler: gloo takes the place of DeepSpeed's shared-memory extension.", file=sys.stderr)
    deepspeed.init_distributed(get_accelerator().communication_backend_name())


def has_compiler() -> bool:
    """Whether torch could compile an extension: ninja and a C++ compiler are on the path."""
    compiler = os.environ.get("CXX", "c++")
    return shutil.which("ninja") is not None and bool(shutil.which(compiler) or shutil.which("g++"))


def check_compiler(settings: Mapping[str, Any]) -> None:
    """Refuse an optimizer that DeepSpeed would have to compile where it can't.

    Raises:
        ConfigError: on CPU without a compiler, with the setting that needs none.
    """
    optimizer = settings.get("optimizer", {})
    name = str(optimizer.get("type", "")).lower()
    if _needs_no_compiler() or has_compiler() or name not in _COMPILED_ON_CPU:
        return
    if name.startswith("adam") and optimizer.get("params", {}).get("torch_adam"):
        return
    raise ConfigError(
        f"DeepSpeed compiles its {optimizer['type']} for CPU and no C++ compiler was found: install g++, or use "
        f'"AdamW" with "torch_adam": true.'
    )


def check_connections(backend: str) -> None:
    """Refuse a launch queue in which a posted receive would hold up the stream that its sender waits for.

    Raises:
        ConfigError: NCCL with ``CUDA_DEVICE_MAX_CONNECTIONS=1``.
    """
    if backend == "nccl" and os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1":
        raise ConfigError(
            "CUDA_DEVICE_MAX_CONNECTIONS is 1, with which stages that post receives ahead can block each other: "
            "unset it."
        )


def _needs_no_compiler() -> bool:
    return bool(get_accelerator().device_name() != "cpu")
