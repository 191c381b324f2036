"""What waits for ever over NCCL, and what does not, in two ranks under the transport."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
import torch.distributed as dist

from tests.transport.nccl_like import NcclLike

_LONG_ENOUGH = 3.0  # seconds


def run_case(case: str) -> bool:
    """Whether a case comes to its end."""
    transport = NcclLike()
    with transport.installed():
        groups = [dist.new_group([0, 1]) for _ in range(2)]
        peer, cases = 1 - dist.get_rank(), {"unbatched": exchange, "batched": batched, "two groups": apart}
        run = {**cases, "synchronised": synchronised, "first meeting": first_meeting}[case]
        done = ends(lambda: run(transport, peer, groups))
    dist.barrier()
    return done


def ends(function: Callable[[], None]) -> bool:
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    thread.join(_LONG_ENOUGH)
    return not thread.is_alive()


def exchange(transport: NcclLike, peer: int, groups: list[dist.ProcessGroup]) -> None:
    """Both send first, on one communicator: each send waits for a receive that is behind the other's."""
    messages(transport, peer, groups[0], groups[0])


def apart(transport: NcclLike, peer: int, groups: list[dist.ProcessGroup]) -> None:
    """The same with a communicator for each direction."""
    messages(transport, peer, groups[peer], groups[1 - peer])


def messages(transport: NcclLike, peer: int, sending: dist.ProcessGroup, receiving: dist.ProcessGroup) -> None:
    transport.acquainted(peer, [sending, receiving])
    got = torch.zeros(3)
    works = [dist.isend(torch.ones(3), peer, group=sending), dist.irecv(got, peer, group=receiving)]
    for work in works:
        assert work is not None
        work.wait()
    assert got.tolist() == [1, 1, 1]


def batched(transport: NcclLike, peer: int, groups: list[dist.ProcessGroup]) -> None:
    """Both at once, as one group."""
    got = torch.zeros(3)
    operations = [
        dist.P2POp(dist.isend, torch.ones(3), peer, groups[0]),
        dist.P2POp(dist.irecv, got, peer, groups[0]),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    assert got.tolist() == [1, 1, 1]


def synchronised(transport: NcclLike, peer: int, groups: list[dist.ProcessGroup]) -> None:
    """A receive is posted, the device is synchronised, and only then would the peer be given what it needs to send."""
    if dist.get_rank() == 0:
        work = dist.irecv(torch.empty(3), peer, group=groups[0])
        transport.synchronize()
        dist.isend(torch.ones(3), peer, group=groups[1])
        assert work is not None
    else:
        needed = torch.empty(3)
        waiting = dist.irecv(needed, peer, group=groups[1])
        assert waiting is not None
        waiting.wait()
        dist.isend(needed, peer, group=groups[0])


def first_meeting(transport: NcclLike, peer: int, groups: list[dist.ProcessGroup]) -> None:
    """A receive for a message that never comes."""
    if dist.get_rank() == 0:
        dist.irecv(torch.empty(3), peer, group=groups[0])
