"""Environment and versions: what is installed and what is pinned, the cards, what can be imported."""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.speed.harness import Row
from ibp_deepspeed.errors import first_line

REQUIREMENTS = Path(__file__).parents[2] / "requirements.txt"
PACKAGES = ("torch", "deepspeed", "transformers", "accelerate", "tokenizers", "triton", "liger-kernel")
MODULES = (
    "ibp_deepspeed.engine.engine",
    "ibp_deepspeed.models.build",
    "ibp_deepspeed.models.hf.weights",
    "ibp_deepspeed.models.exits.exits",
)
COLUMNS: dict[str, Callable[[Row], str]] = {"": lambda row: row["contender"], "found": lambda row: row["value"]}


def run(small: bool) -> list[Row]:
    """A row for each thing; a module of the project that can't be imported is a failure."""
    found = [*_versions(), *_devices()]
    return [{"contender": name, "value": value} for name, value in found] + [_import(name) for name in MODULES]


def _versions() -> Iterator[tuple[str, str]]:
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", REQUIREMENTS.read_text(encoding="utf-8"), re.MULTILINE))
    yield "python", platform.python_version()
    for package in PACKAGES:
        try:
            there = version(package)
        except PackageNotFoundError:
            there = "not installed"
        same = there.partition("+")[0] == pins.get(package, there.partition("+")[0])
        yield package, there if same else f"{there} (pinned: {pins[package]})"


def _devices() -> Iterator[tuple[str, str]]:
    yield "CPU cores", str(len(os.sched_getaffinity(0)))
    yield "nvcc, for DeepSpeed's own kernels", "on the path" if shutil.which("nvcc") else "not on the path"
    if not torch.cuda.is_available():
        yield "GPUs", "none"
        return
    yield "CUDA, cuDNN, NCCL of torch", f"{torch.version.cuda}, {torch.backends.cudnn.version()}, {_nccl()}"
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        about = f"{card.total_memory / 2**30:.1f} GiB, compute capability {card.major}.{card.minor}"
        yield f"GPU {index}", f"{card.name}, {about}"
    yield "bf16", "yes" if torch.cuda.is_bf16_supported() else "no"


def _nccl() -> str:
    parts: tuple[int, ...] = torch.cuda.nccl.version()
    return ".".join(map(str, parts))


def _import(name: str) -> Row:
    try:
        import_module(name)
    except Exception as error:  # of an internal module that another version has not, of a kind of its own
        why = f"{type(error).__name__}: {first_line(error)}"
        return {"contender": f"import {name}", "value": why, "failed": f"{name} can't be imported: {why}"}
    return {"contender": f"import {name}", "value": "works"}
