"""How far the clocks of the processes are apart."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.distributed as dist

_ROUNDS = 16


def offset_to_first(group: dist.ProcessGroup, clock: Callable[[], float] = time.perf_counter) -> tuple[float, float]:
    """What this process adds to its clock to have that of the group's first rank; called on all of them.

    Each rank in turn asks the first one for its time, some times over; of the shortest round trip the answer is taken
    to be from its middle (Cristian, "Probabilistic clock synchronization", 1989).

    Args:
        group: over gloo.
        clock: seconds.

    Returns:
        the offset, and half of that round trip, by which it may be wrong, in seconds.
    """
    rank, found = dist.get_rank(group), (0.0, 0.0)
    for other in range(1, dist.get_world_size(group)):
        if rank == 0:
            _answer(group, other, clock)
        elif rank == other:
            found = _ask(group, clock)
    return found


def _answer(group: dist.ProcessGroup, other: int, clock: Callable[[], float]) -> None:
    message = torch.zeros(1, dtype=torch.float64)
    for _ in range(_ROUNDS):
        dist.recv(message, group=group, group_src=other)
        message[0] = clock()
        dist.send(message, group=group, group_dst=other)


def _ask(group: dist.ProcessGroup, clock: Callable[[], float]) -> tuple[float, float]:
    message = torch.zeros(1, dtype=torch.float64)
    trips: list[tuple[float, float]] = []
    for _ in range(_ROUNDS):
        asked = clock()
        dist.send(message, group=group, group_dst=0)
        dist.recv(message, group=group, group_src=0)
        answered = clock()
        trips.append((answered - asked, message.item() - (asked + answered) / 2))
    trip, offset = min(trips)
    return offset, trip / 2
