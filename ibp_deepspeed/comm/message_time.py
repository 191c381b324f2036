"""What a message takes between two processes of this host: started for that, they send it to and fro."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing

WARM_UP = 5


def message_seconds(sizes: Sequence[int], repeats: int, backend: str) -> list[list[float]]:
    """Seconds of messages, half of the time there and back.

    Args:
        sizes: bytes.
        repeats: interleaved.
        backend: ``gloo``, from and to the CPU, or ``nccl``, between the first two GPUs.

    Returns:
        for each size that many times.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = (folder, list(sizes), repeats, backend)
        multiprocessing.start_processes(_exchange, arguments, nprocs=2, start_method="spawn")
        found: list[list[float]] = torch.load(Path(folder, "seconds.pt"), weights_only=True)
    return found


def _exchange(rank: int, folder: str, sizes: list[int], repeats: int, backend: str) -> None:
    """One of the two: sends first, or sends back."""
    device = torch.device("cpu" if backend == "gloo" else f"cuda:{rank}")
    about: dict[str, Any] = {} if backend == "gloo" else {"device_id": device}
    store = dist.FileStore(str(Path(folder, "store")), 2)
    dist.init_process_group(backend, store=store, rank=rank, world_size=2, **about)
    tensors = [torch.zeros(size, dtype=torch.uint8, device=device) for size in sizes]
    rounds = [[_message_time(rank, tensor) / 2 for tensor in tensors] for _ in range(WARM_UP + repeats)]
    if rank == 0:
        torch.save([list(column) for column in zip(*rounds[WARM_UP:], strict=True)], Path(folder, "seconds.pt"))
    dist.destroy_process_group()


def _message_time(rank: int, tensor: Tensor) -> float:
    began = time.perf_counter()
    for turn in (0, 1):
        if turn == rank:
            dist.send(tensor, 1 - rank)
        else:
            dist.recv(tensor, 1 - rank)
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter() - began
