"""Meet the other processes, with or without a C++ compiler on the machine."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.constants import default_pg_timeout
from deepspeed.git_version_info import installed_ops
from torch import Tensor
from torch.utils import cpp_extension

from ibp_deepspeed.comm.attempts import init_method
from ibp_deepspeed.errors import ConfigError

_COMPILES_MINUTES = 20.0
_COMPILED_ON_CPU = ("adam", "adamw", "adagrad", "lion", "lamb")


def init_distributed() -> None:
    """As ``deepspeed.init_distributed``, without an extension that it compiles for CPUs, and for shared GPUs.

    Its shared-memory all-reduce is marked as not available: only DeepSpeed's inference calls it
    (``inference_all_reduce``), compiling takes minutes at the first start, and one that is killed meanwhile leaves a
    lock in torch's cache that every later start waits for without a word. With more processes than GPUs on a machine,
    several share one: see :func:`share_devices`.

    Raises:
        ConfigError: another process listens at the port where they are to meet.
    """
    backend = get_accelerator().communication_backend_name()
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    processes, devices = _local_processes(), get_accelerator().device_count()
    if _needs_no_compiler() and 0 < devices < processes:
        share_devices(devices)
        backend = "gloo"
        _tell(f"{processes} processes share {devices} GPUs: gloo carries messages through host memory.")
    try:
        deepspeed.init_distributed(backend, init_method=init_method())
    except RuntimeError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise ConfigError(
            f"port {os.environ.get('MASTER_PORT')}, where the processes are to meet, is taken, perhaps by another "
            "training: give another one, with deepspeed --master_port N or torchrun --master-port N."
        ) from error


def share_devices(devices: int) -> None:
    """Before processes meet: give this one a device that exists; NCCL wants one for each.

    DeepSpeed's own communication then passes through host memory too, by the hook that it has for gloo on machines
    whose device gloo can't reach. Our messages do by themselves (:class:`ibp_deepspeed.comm.message.Memory`).
    """
    os.environ["LOCAL_RANK"] = str(int(os.environ["LOCAL_RANK"]) % devices)
    import_module("deepspeed.comm.torch")._needs_cpu_staging = _lives_on_device  # type: ignore[attr-defined]
    if not torch.distributed.is_initialized():
        # not by DeepSpeed, which binds the device for gloo too: every later group of some ranks would then ask gloo to
        # split a communicator, which it can't (torch's _new_process_group_helper, perform_nocolor_split)
        torch.distributed.init_process_group("gloo", init_method=init_method(), timeout=default_pg_timeout)


def _lives_on_device(value: object) -> bool:
    return isinstance(value, Tensor) and value.device.type != "cpu"


def _local_processes() -> int:
    """Processes of this job on this machine, as torchrun or DeepSpeed's launcher say; 1 if neither does."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def _tell(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)


def has_compiler() -> bool:
    """Whether torch could compile an extension: ninja and a C++ compiler are on the path."""
    compiler = os.environ.get("CXX", "c++")
    return shutil.which("ninja") is not None and bool(shutil.which(compiler) or shutil.which("g++"))


def check_compiler(ds_config: Mapping[str, Any]) -> None:
    """Refuse an optimizer that DeepSpeed would have to compile where it can't.

    Raises:
        ConfigError: on CPU without a compiler, with the setting that needs none; or where a start that was killed while
            it compiled has left its lock, which torch waits for without a word.
    """
    optimizer = ds_config.get("optimizer", {})
    name = str(optimizer.get("type", "")).lower()
    if name not in _COMPILED_ON_CPU or (name.startswith("adam") and optimizer.get("params", {}).get("torch_adam")):
        return
    if _needs_no_compiler():
        if cpp_extension.CUDA_HOME:
            _tell_of_compiling(name)
        return
    if has_compiler():
        _check_locks(optimizer["type"])
        _tell_of_compiling(name)
        return
    raise ConfigError(
        f"DeepSpeed compiles its {optimizer['type']} for CPU and no C++ compiler was found: install g++, or use "
        f'"AdamW" with "torch_adam": true.'
    )


def _tell_of_compiling(name: str) -> None:
    """That the first start with an optimizer takes longer, unless torch's cache of extensions has it."""
    stem = name.removesuffix("w")
    if not installed_ops.get(f"fused_{stem}") and not any(_extensions().glob(f"**/*{stem}*/*.so")):
        _tell(f"DeepSpeed compiles its {stem.capitalize()} now, at the first start on this machine: a minute or two.")


def _extensions() -> Path:
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())


def _check_locks(optimizer: str) -> None:
    """Of DeepSpeed's optimizers in torch's cache of extensions: an old lock is an error, a young one is told of."""
    for lock in sorted(_extensions().glob("**/cpu_*/lock")):
        minutes = (time.time() - lock.stat().st_mtime) / 60
        if minutes > _COMPILES_MINUTES:
            raise ConfigError(
                f"DeepSpeed's {optimizer} would wait for ever: a process that compiled it {minutes:.0f} minutes ago "
                f'has left {lock}; remove that file, or use "AdamW" with "torch_adam": true.'
            )
        _tell(f"waiting for another process that compiles {lock.parent.name}; if there is none, remove {lock}.")


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
