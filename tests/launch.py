"""Start real processes for a test and collect what they say."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_PORTS_OF_A_WORKER = 2000
_ports = itertools.count(os.getpid())  # another start in the next run: ports stay taken for a minute


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


def free_port() -> str:
    """A port that nobody listens at, and that no other worker of these tests will take meanwhile.

    Below the ports that systems give to outgoing connections, each worker has a range of its own.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        port = 20000 + _PORTS_OF_A_WORKER * worker + next(_ports) % _PORTS_OF_A_WORKER
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return str(port)


def launch(
    worker: str, world_size: int, argument: Any = None, *, timeout: float = 300, end_with_first_failure: bool = False
) -> Run:
    """Run ``tests.workers.<worker>`` in ``world_size`` processes, each given ``argument`` as JSON.

    A worker calls :func:`report` with its result. After ``timeout`` seconds the rest is killed (exit code None);
    with ``end_with_first_failure`` that happens as soon as one fails, which is what launchers do.
    """
    port = free_port()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(world_size):
            env = dict(os.environ, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
            env.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
            env.update(IBP_REPORT=f"{folder}/{rank}.json", PYTHONPATH=str(ROOT))
            log = open(f"{folder}/{rank}.log", "w")  # noqa: SIM115
            command = [sys.executable, "-m", f"tests.workers.{worker}", json.dumps(argument)]
            processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT))
        codes = _wait(processes, started + timeout, end_with_first_failure)
        output = [Path(f"{folder}/{rank}.log").read_text() for rank in range(world_size)]
        paths = [Path(f"{folder}/{rank}.json") for rank in range(world_size)]
        reports = [json.loads(p.read_text()) if p.exists() else None for p in paths]
    return Run(codes, output, reports, time.monotonic() - started)


def _wait(processes: list[subprocess.Popen[bytes]], deadline: float, end_with_first_failure: bool) -> list[int | None]:
    while any(p.poll() is None for p in processes) and time.monotonic() < deadline:
        if end_with_first_failure and any(p.poll() for p in processes):
            break
        time.sleep(0.05)
    codes = [p.poll() for p in processes]
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.wait()
    return codes


def report(value: Any) -> None:
    """Called by a worker: hand a JSON value to the test."""
    Path(os.environ["IBP_REPORT"]).write_text(json.dumps(value))
