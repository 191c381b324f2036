"""How processes meet: backends and devices."""

from __future__ import annotations

import os
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch

from ibp_deepspeed.comm import distributed
from ibp_deepspeed.comm.message import Memory

COMM: Any = import_module("deepspeed.comm.torch")


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A machine with two GPUs, as far as ``init_distributed`` looks; the backends that it asks DeepSpeed for."""
    asked: list[str] = []
    gpus = SimpleNamespace(
        device_name=lambda: "cuda", device_count=lambda: 2, communication_backend_name=lambda: "nccl"
    )
    monkeypatch.setattr(distributed, "get_accelerator", lambda: gpus)
    monkeypatch.setattr(deepspeed, "init_distributed", asked.append)
    monkeypatch.setattr(COMM, "_needs_cpu_staging", COMM._needs_cpu_staging)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "3")
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return asked


@pytest.mark.parametrize("variable", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])  # torchrun's, DeepSpeed's launcher's
def test_more_processes_than_gpus_share_them(
    backends: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variable: str
) -> None:
    monkeypatch.setenv(variable, "4")
    distributed.init_distributed()
    assert backends == ["gloo"] and os.environ["LOCAL_RANK"] == "1"
    assert "4 processes share 2 GPUs" in capsys.readouterr().err
    staged = COMM._needs_cpu_staging
    assert staged(torch.empty(1, device="meta")) and not staged(torch.empty(1)) and not staged([1])


@pytest.mark.parametrize("processes", [None, "2"])
def test_a_gpu_each_is_nccl(
    backends: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], processes: str | None
) -> None:
    if processes:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    distributed.init_distributed()
    assert backends == ["nccl"] and os.environ["LOCAL_RANK"] == "3"
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("device", "backend", "staged"), [("cuda", "gloo", True), ("cuda", "nccl", False), ("cpu", "gloo", False)]
)
def test_messages_pass_through_the_host_where_the_backend_has_to(
    monkeypatch: pytest.MonkeyPatch, device: str, backend: str, staged: bool
) -> None:
    monkeypatch.setattr(torch.distributed, "get_backend", lambda *_: backend)
    assert Memory.of(torch.device(device)).staged is staged


def test_a_staged_payload_is_a_copy() -> None:
    memory: Any = Memory(torch.device("cpu"), staged=True)
    payload = torch.ones(3)
    fetched = memory.fetch(payload)
    payload.zero_()
    assert fetched.tolist() == [1, 1, 1]
