"""Cases of the parity worker while messages overtake each other; and what the transport itself promises."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from tests.transport.nccl_like import NcclLike
from tests.transport.out_of_order import OutOfOrder
from tests.workers import nccl, parity

_MESSAGES, _CHANNELS = 20, 6


def run_case(case: dict[str, Any]) -> Any:
    """``seed``: of the delays; ``nccl``: whether NCCL's rules hold too; without ``stages`` the order of arrivals."""
    if "stages" not in case:
        return arrivals(case)
    if case["nccl"]:
        return nccl.run_case({**case, "transport": {"kernels": 4, "late": case["seed"]}})
    with OutOfOrder(case["seed"]).installed():
        return parity.run_case(case)


def arrivals(case: dict[str, Any]) -> list[list[int]]:
    """Channel and number of each message that rank 0 sends round after round, in the order in which rank 1 has them."""
    transport = NcclLike(late=case["seed"]) if case["nccl"] else OutOfOrder(case["seed"])
    arrived: list[list[int]] = []
    with transport.installed():
        groups = [dist.new_group([0, 1]) for _ in range(_CHANNELS)]
        if dist.get_rank() == 0:
            sends: list[Any] = [
                dist.isend(torch.tensor([n]), 1, group=group) for n in range(_MESSAGES) for group in groups
            ]
            for work in sends:
                work.wait()
        else:
            threads = [threading.Thread(target=_receive(c, group, arrived)) for c, group in enumerate(groups)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    return arrived


def _receive(channel: int, group: Any, arrived: list[list[int]]) -> Callable[[], None]:
    def receive() -> None:
        number = torch.zeros(1, dtype=torch.int64)
        for _ in range(_MESSAGES):
            work: Any = dist.irecv(number, 0, group=group)
            work.wait()
            arrived.append([channel, int(number)])

    return receive
