"""Meeting again after a failure, at a store that still has what the processes of the attempt before have written.

torchrun's agent starts failed processes again (``--max-restarts``) and keeps its store. torch 2.13 uses the keys of the
attempt before again, so that a new process connects to the address of a dead one, or reads a dead one's answer, and
waits for ever (pytorch/pytorch#135712). The number of the attempt (``TORCHELASTIC_RESTART_COUNT``) is each agent's own,
so it does not tell attempts apart on several hosts. Here the processes agree on a name of the attempt first, and use
the store under it.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

_SCHEME = "ibp-attempt"
_PAUSE = 0.02  # seconds between two looks
_HELLO, _WELCOME = "ibp_hello", "ibp_welcome"


def init_method() -> str | None:
    """For ``init_process_group``, on all ranks alike; None: torch's own, because the store ends with the processes."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True):
        return None
    with contextlib.suppress(RuntimeError):  # it is registered already
        register_rendezvous_handler(_SCHEME, _handler)
    return f"{_SCHEME}://"


def _handler(url: str, timeout: timedelta, **options: Any) -> Iterator[tuple[dist.Store, int, int]]:
    """torch's own meeting, with the store under the attempt's name."""
    for store, rank, size in rendezvous(url.replace(_SCHEME, "env", 1), timeout=timeout, **options):
        name = agree(store, rank, size, timeout.total_seconds())
        yield dist.PrefixStore(f"attempt_{name}", store), rank, size


def agree(store: dist.Store, rank: int, size: int, seconds: float) -> str:
    """On all processes that are started together: a name that no process before has had.

    Each writes a new word. Rank 0 tells which words it has seen, again and again as others come: a rank that finds its
    own among them knows that rank 0 lives, and answers under rank 0's word, the name.

    Raises:
        DistStoreError: they have not all come.
    """
    word, end = uuid.uuid4().hex, time.monotonic() + seconds
    store.set(f"{_HELLO}/{rank}", word)
    answers = [f"{_HELLO}/{word}/{other}" for other in range(1, size)]
    while time.monotonic() < end:
        if rank == 0:
            if not answers or store.check(answers):
                return word
            seen = {str(other): _read(store, f"{_HELLO}/{other}") for other in range(1, size)}
            store.set(_WELCOME, json.dumps({"name": word, "seen": seen}))
        else:
            welcome = json.loads(_read(store, _WELCOME) or "null")
            if welcome is not None and welcome["seen"].get(str(rank)) == word:
                store.set(f"{_HELLO}/{welcome['name']}/{rank}", "")
                return str(welcome["name"])
        time.sleep(_PAUSE)
    raise dist.DistStoreError(f"the {size} processes of the job have not met within {seconds:.0f} s")


def _read(store: dist.Store, key: str) -> str | None:
    return store.get(key).decode() if store.check([key]) else None
