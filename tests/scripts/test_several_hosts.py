"""Training on hosts of their own, by each launcher, with what happens when one dies or is told to end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from ibp_deepspeed.checkpoint.store import checked
from tests.commands import script
from tests.forks import ROOT
from tests.scripts.settings import SMALL
from tests.several_hosts import Host, hosts, missing

MANY = 100_000
PORT = "29500"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
DEEPSPEED = [sys.executable, str(Path(sys.executable).with_name("deepspeed")), "--quiet"]


def words(config: Path, data: Path, output: Path, *more: object) -> list[object]:
    rest = ["--eval-micro-batches", 0, *SMALL, *more]
    return ["scripts/train_lm.py", "--deepspeed_config", config, "--data", data, "--output", output, *rest]


def until(holds: Callable[[], object], *, seconds: float, log: Path) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, log.read_text() if log.exists() else "nothing was said"
        time.sleep(0.1)


def has_trained(output: Path, launchers: list[subprocess.Popen[bytes]]) -> Callable[[], bool]:
    """Whether there is a checkpoint and a batch more, or no hope of it."""

    def holds() -> bool:
        history = output / "history.jsonl"
        further = history.exists() and len(history.read_text().splitlines()) > 2
        return (further and (output / "checkpoint" / "latest").exists()) or any(p.poll() is not None for p in launchers)

    return holds


def losses(output: Path) -> dict[int, list[float]]:
    rows = [json.loads(line) for line in (output / "history.jsonl").read_text().splitlines()]
    return {row["step"]: row["train"] for row in rows if "train" in row}


@pytest.fixture
def constant(config: Path, tmp_path: Path) -> Path:
    """A learning rate that does not depend on the number of batches."""
    settings = {key: value for key, value in json.loads(config.read_text()).items() if key != "scheduler"}
    (tmp_path / "constant.json").write_text(json.dumps(settings))
    return tmp_path / "constant.json"


@pytest.mark.skipif(missing() is not None, reason=f"hosts of their own: {missing()}")
def test_torchrun_on_two_hosts_and_the_death_of_one(constant: Path, data: Path, tmp_path: Path) -> None:
    """Numbers are those of one process; the other host ends too, with its reason; what was saved goes on elsewhere."""
    output, alone = tmp_path / "out", tmp_path / "alone"
    with hosts(tmp_path, 2) as (first, second):
        launchers, logs = [], [tmp_path / "0.log", tmp_path / "1.log"]
        for number, (host, log) in enumerate(zip((first, second), logs, strict=True)):
            place = ("--nnodes", 2, "--node-rank", number, "--nproc-per-node", 1)
            command = [*TORCHRUN, *place, "--master-addr", first.name, "--master-port", PORT]
            run = words(constant, data, output, "--steps", MANY, "--save-interval", 2)
            launchers.append(host.start(*command, *run, log=log))
        until(has_trained(output, launchers), seconds=200, log=logs[0])
        second.stop()
        code, said = launchers[0].wait(timeout=100), logs[0].read_text()
        assert code == 1 and re.search("error: rank 0.* lost (the connection for|another process)", said), said
        assert launchers[1].wait(timeout=100) != 0
    tag = (output / "checkpoint" / "latest").read_text()
    assert checked(output / "checkpoint" / tag) is not None
    batches = int(tag.removeprefix("global_step"))
    one = ("--one-process", "--stages", 2, "--steps", batches + 2)
    for folder, more in ((output, ["--resume"]), (alone, [])):
        done = script("train_lm.py", *words(constant, data, folder, *one, *more)[1:])
        assert done.returncode == 0, done.stdout + done.stderr
    there, here = losses(output), losses(alone)
    assert max(there) == batches + 2
    assert all(here[step] == pytest.approx(there[step], rel=1e-5) for step in there)


@pytest.fixture
def reachable(full: bool, tmp_path: Path) -> Iterator[list[Host]]:
    """Two hosts that reach each other by ssh."""
    reason = missing("ssh", "/usr/sbin/sshd", "pdsh") if full else "--full runs it"
    if reason is not None:
        pytest.skip(f"deepspeed's launcher over ssh: {reason}")
    with hosts(tmp_path, 2, ssh=True) as made:
        yield made


def test_deepspeeds_launchers_over_ssh(reachable: list[Host], config: Path, data: Path, tmp_path: Path) -> None:
    """Two stages × two replicas: by pdsh, told to end, and resumed by one ssh a host, without pdsh."""
    first, second = reachable
    output, log, hostfile = tmp_path / "out", tmp_path / "log", tmp_path / "hostfile"
    hostfile.write_text(f"{first.name} slots=2\n{second.name} slots=2\n")
    start = [*DEEPSPEED, "--hostfile", hostfile, "--master_port", PORT]
    run = words(config, data, Path(os.path.relpath(output, ROOT)), "--stages", 2)
    launcher = first.start(*start, *run, "--steps", MANY, "--save-interval", 2, log=log)
    until(has_trained(output, [launcher]), seconds=300, log=log)
    assert launcher.poll() is None, log.read_text()
    assert sorted(first.ranks()) == [0, 1] and sorted(second.ranks()) == [2, 3]
    psutil.Process(launcher.pid).children()[0].send_signal(signal.SIGTERM)  # nsenter's child
    assert launcher.wait(timeout=100) == 1
    until(lambda: not first.ranks() and not second.ranks(), seconds=100, log=log)
    tag = (output / "checkpoint" / "latest").read_text()
    batches = int(tag.removeprefix("global_step"))
    assert checked(output / "checkpoint" / tag) is not None
    page = (output / "run_report.html").read_text()
    assert f"interrupted after {batches:,} of {MANY:,} batches" in page, "also when nobody reads what it prints"
    more = (*run, "--steps", batches + 2, "--resume")
    lines, launchers = [tmp_path / "0.log", tmp_path / "1.log"], []
    for number, host in enumerate(reachable):
        words_there = [*start, "--no_ssh", "--node_rank", number, "--master_addr", first.name, *more]
        remote = f"cd {ROOT} && {' '.join(map(str, words_there))}"
        launchers.append(first.start("ssh", host.name, remote, log=lines[number]))
    assert [launcher.wait(timeout=300) for launcher in launchers] == [0, 0], lines[0].read_text() + lines[1].read_text()
    assert f"resumes from {tag}" in lines[0].read_text() and "2 stages × 2 replicas" in lines[0].read_text()
    assert (output / "checkpoint" / "latest").read_text() == f"global_step{batches + 2}"
