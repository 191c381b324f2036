"""GPUs that are known: their peak in dense bf16 and their memory, from the vendor's data sheets; and the processor."""

from __future__ import annotations

import platform
import re
from pathlib import Path

from ibp_deepspeed.errors import first_line
from ibp_deepspeed.models.errors import ModelError

PEAK_FLOPS: dict[str, float] = {
    "B200": 2250e12,  # NVIDIA HGX B200: 36 PFLOPS sparse for eight, dense is half
    "H200 NVL": 835e12,  # NVIDIA H200 data sheet: 1671 sparse
    "H200": 989e12,  # the same: 1979 sparse
    "H100 NVL": 835e12,  # NVIDIA H100 data sheet: 1671 sparse
    "H100 PCIe": 756e12,  # the same: 1513 sparse
    "H100": 989e12,  # the same, SXM: 1979 sparse
    "A100": 312e12,  # NVIDIA A100 data sheet
    "A30": 165e12,  # NVIDIA A30 data sheet
    "L40S": 362e12,  # NVIDIA L40S data sheet
    "L4": 121e12,  # NVIDIA L4 data sheet: 242 sparse
    "A10": 125e12,  # NVIDIA A10 data sheet
}
"""Words of the name that the driver gives a GPU → floating-point operations a second; the first that fits counts."""


def check_device(name: str) -> None:
    """That torch can compute on the device of an option --device.

    Raises:
        ModelError: there is no such device here.
    """
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(f"--device {name} can't be used here: {first_line(error)} (cpu always can.)") from None


def peak_flops(name: str) -> float | None:
    """Peak of the GPU of this name (``torch.cuda.get_device_name()``) in dense bf16; None if it is not known."""
    found = (peak for words, peak in PEAK_FLOPS.items() if re.search(rf"\b{words}\b", name))
    return next(found, None)


MEMORY_GIB: dict[str, float] = {
    "B200": 180,
    "H200 NVL": 141,
    "H200": 141,
    "H100 NVL": 94,
    "H100 PCIe": 80,
    "H100": 80,
    "A100": 80,  # there is one with 40
    "A30": 24,
    "L40S": 48,
    "L4": 24,
    "A10": 24,
}
"""The same names → GB as sold; what a process can have is some GiB less."""


def processor() -> str:
    """The name of this machine's CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
