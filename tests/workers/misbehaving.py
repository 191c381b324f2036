"""Ranks that don't end as they should."""

from __future__ import annotations

import os
import time


def run_case(case: str) -> None:
    rank = int(os.environ["RANK"])
    print(f"rank {rank} was here", flush=True)
    if case == "raises" and rank == 1:
        raise ValueError("this rank broke")
    if case == "dies" and rank == 1:
        os._exit(7)
    if case == "hangs" and rank == 1:
        time.sleep(3600)
