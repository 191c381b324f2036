"""How processes meet: backends and devices."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import deepspeed
import pytest
import torch
from deepspeed.accelerator import get_accelerator

from ibp_deepspeed.comm import distributed
from ibp_deepspeed.comm.message import Memory
from tests.forks import end, fork
from tests.rendezvous import place, rendezvous

COMM: Any = import_module("deepspeed.comm.torch")


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A machine with two GPUs, as far as ``init_distributed`` looks; the backends that it asks DeepSpeed for."""
    asked: list[str] = []
    gpus = SimpleNamespace(
        device_name=lambda: "cuda", device_count=lambda: 2, communication_backend_name=lambda: "nccl"
    )
    monkeypatch.setattr(distributed, "get_accelerator", lambda: gpus)
    monkeypatch.setattr(deepspeed, "init_distributed", lambda backend, init_method: asked.append(backend))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
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


class Gpu:
    """This machine's accelerator, which says that it is one GPU."""

    def __getattr__(self, name: str) -> Any:
        return getattr(get_accelerator(), name)

    def device_name(self) -> str:
        return "cuda"

    def device_count(self) -> int:
        return 1

    def device(self, index: int) -> torch.device:
        return torch.device("cuda", index)


def share(report: Path) -> None:
    """In a process of two that have one "GPU": meet, and make a group of one rank."""
    gpu = Gpu()
    with (
        mock.patch.object(distributed, "get_accelerator", lambda: gpu),
        mock.patch.object(COMM, "get_accelerator", lambda: gpu),
    ):
        distributed.init_distributed()
    torch.distributed.new_group([0])
    world = torch.distributed.group.WORLD
    assert world is not None
    report.write_text(f"{torch.distributed.get_backend()} {world.bound_device_id} {deepspeed.comm.get_world_size()}")


def test_processes_that_share_a_gpu_bind_none(tmp_path: Path) -> None:
    """DeepSpeed would bind it, and gloo has no communicator to split for a group of some ranks."""
    with rendezvous() as meeting:
        reports = [tmp_path / str(rank) for rank in range(2)]
        processes = [
            fork(
                share,
                report,
                environment={**os.environ, **meeting, **place(rank, 2), "LOCAL_WORLD_SIZE": "2"},
                stdout=tmp_path / f"{rank}.log",
                stderr=tmp_path / f"{rank}.log",
            )
            for rank, report in enumerate(reports)
        ]
        codes = end(processes, 60, with_first_failure=True)
    assert codes == [0, 0], [(tmp_path / f"{rank}.log").read_text() for rank in range(2)]
    assert [report.read_text() for report in reports] == ["gloo None 2"] * 2
