"""Run workers in the processes of one job and collect what they say."""

from __future__ import annotations

import json
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.forks import end, fork
from tests.rendezvous import place, rendezvous
from tests.workers import bootstrap


@dataclass
class Run:
    """Exit codes and output by rank, what the workers reported, and how long it took."""

    codes: list[int | None]
    output: list[str]
    reports: list[Any]
    seconds: float

    def check(self) -> Run:
        """Fail the test with the workers' own words unless all ended well."""
        text = "\n".join(
            f"--- rank {i}, exit {c}\n{o[-3000:]}" for i, (c, o) in enumerate(zip(self.codes, self.output, strict=True))
        )
        assert all(code == 0 for code in self.codes), text
        return self


def launch(
    worker: str, world_size: int, cases: Any, *, timeout: float = 300, end_with_first_failure: bool = False
) -> Run:
    """Run ``tests.workers.<worker>`` in ``world_size`` processes (see :mod:`tests.workers.bootstrap`).

    After ``timeout`` seconds the rest is killed (exit code None); with ``end_with_first_failure`` that happens as soon
    as one fails, which is what launchers do.
    """
    with tempfile.TemporaryDirectory() as name, rendezvous() as meeting:
        folder = Path(name)
        logs = [folder / f"{rank}.log" for rank in range(world_size)]
        paths = [folder / f"{rank}.json" for rank in range(world_size)]
        processes = [
            fork(
                bootstrap.run, worker, cases, paths[rank],
                environment=os.environ | meeting | place(rank, world_size), stdout=log, stderr=log,
            )
            for rank, log in enumerate(logs)
        ]  # fmt: skip
        started = time.monotonic()  # now: the first fork waits for its server
        codes = end(processes, timeout, with_first_failure=end_with_first_failure)
        output = [log.read_text() if log.exists() else "" for log in logs]
        reports = [json.loads(path.read_text()) if path.exists() else None for path in paths]
    return Run(codes, output, reports, time.monotonic() - started)
