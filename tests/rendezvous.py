"""Where the processes of a job meet: at a store of the test itself, at a port that the system gives it.

No port is chosen before it is taken, so none can be taken by somebody else in between.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed import TCPStore


@contextmanager
def rendezvous() -> Iterator[dict[str, str]]:
    """A new store, as variables of the environment of each process of one job; all of them are its clients."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # torch: rank 0 need not make one
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


def place(rank: int, world_size: int) -> dict[str, str]:
    """What a launcher tells a process of its place among the others."""
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
