"""Processes that meet again at a store that remembers the attempt before."""

from __future__ import annotations

import threading
import time

import pytest
import torch.distributed as dist

from ibp_deepspeed.comm.attempts import agree


def meet(store: dist.Store, size: int, late: int) -> list[str]:
    """What each of that many ranks, of which one comes late, agrees on."""
    names: dict[int, str] = {}

    def come(rank: int) -> None:
        names[rank] = agree(store, rank, size, 20)

    ranks = [threading.Thread(target=come, args=(rank,), daemon=True) for rank in range(size)]
    for rank in ranks:
        if rank is not ranks[late]:
            rank.start()
    time.sleep(0.1)
    ranks[late].start()
    for rank in ranks:
        rank.join(30)
    return [names[rank] for rank in range(size)]


@pytest.mark.parametrize("late", [0, 1, 2])
def test_all_agree_on_a_name_that_is_new(late: int) -> None:
    """Time and again, also if there are fewer or more of them than before."""
    store = dist.HashStore()
    seen = set()
    for size in (4, 4, 3, 4):
        names = meet(store, size, late)
        assert len(set(names)) == 1, names
        seen.add(names[0])
    assert len(seen) == 4


def test_who_died_before_is_not_taken_for_the_new_one() -> None:
    """Rank 1 has come once and is dead: rank 0 does not go on without the new one."""
    store = dist.HashStore()
    with pytest.raises(dist.DistStoreError, match="2 processes of the job have not met within 0 s"):
        agree(store, 1, 2, 0.1)
    with pytest.raises(dist.DistStoreError, match="have not met"):
        agree(store, 0, 2, 0.2)
    names = meet(store, 2, 1)
    assert names[0] == names[1]
