"""Ctrl-C, SIGTERM, the end of the launcher: the batch is finished and saved on all ranks, with an exit code of its own;
a second signal ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed as dist

from ibp_deepspeed.checkpoint.store import checked
from ibp_deepspeed.commands.training.agreement import SAVE, STOP, Agreement
from ibp_deepspeed.commands.training.arguments import parse_arguments, save_interval
from ibp_deepspeed.commands.training.interruption import EXIT_CODE
from tests.commands import script
from tests.forks import ROOT
from tests.rendezvous import rendezvous
from tests.scripts.settings import SMALL

MANY = 100_000


def words(config: Path, data: Path, output: Path, *more: object) -> list[str]:
    all_of_them = [
        "--deepspeed_config",
        config,
        "--data",
        data,
        "--output",
        output,
        "--eval-interval",
        0,
        *SMALL,
        *more,
    ]
    return [str(word) for word in all_of_them]


def started(
    command: list[str], output: Path, log: Path, more: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """A training that has trained some batches, with more variables of the environment."""
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"} | dict(more or {})
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
    history, end = output / "history.jsonl", time.monotonic() + 200
    while time.monotonic() < end and process.poll() is None:
        if history.exists() and len(history.read_text().splitlines()) > 2:
            return process
        time.sleep(0.1)
    process.kill()
    raise AssertionError(log.read_text())


def rank_of(process: subprocess.Popen[bytes], rank: int) -> psutil.Process:
    children = psutil.Process(process.pid).children(recursive=True)
    return next(p for p in children if p.environ().get("RANK") == str(rank) and "train_lm.py" in " ".join(p.cmdline()))


def test_one_rank_is_told_and_all_stop_after_the_same_batch(config: Path, data: Path, tmp_path: Path) -> None:
    """As where one host of a job is taken away; rank 1 of two stages."""
    output, log = tmp_path / "out", tmp_path / "log"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = started([*launcher, "scripts/train_lm.py", *words(config, data, output, "--steps", MANY)], output, log)
    rank_of(process, 1).send_signal(signal.SIGTERM)
    assert process.wait(timeout=100) != 0
    said = log.read_text()
    tag = (output / "checkpoint" / "latest").read_text()
    batches = int(tag.removeprefix("global_step"))
    assert f"interrupted after batch {batches} of {MANY:,}".replace(",", "") in said, said
    manifest = checked(output / "checkpoint" / tag)
    assert manifest is not None and f"exitcode  : {EXIT_CODE}" in said
    rows = [json.loads(line) for line in (output / "history.jsonl").read_text().splitlines()]
    assert max(row["step"] for row in rows) <= batches


def test_the_ranks_end_well_when_deepspeeds_launcher_alone_is_told(config: Path, data: Path, tmp_path: Path) -> None:
    """As schedulers do, which know one process: it dies of the SIGTERM, and passes nothing on."""
    output, log = tmp_path / "out", tmp_path / "log"
    deepspeed = [sys.executable, str(Path(sys.executable).with_name("deepspeed")), "--quiet", "--num_accelerators", "2"]
    with rendezvous() as meeting:
        port = ["--master_port", meeting["MASTER_PORT"]]
        options = words(config, data, output, "--steps", MANY)
        process = started([*deepspeed, *port, "scripts/train_lm.py", *options], output, log, meeting)
        below = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == -signal.SIGTERM
        _, alive = psutil.wait_procs(below, timeout=100)
    assert not alive, log.read_text()
    tag = (output / "checkpoint" / "latest").read_text()
    assert checked(output / "checkpoint" / tag) is not None
    said = log.read_text()
    assert "the deepspeed launcher has ended: finishes the batch and saves it" in said
    assert f"interrupted after batch {tag.removeprefix('global_step')} of {MANY}" in said and "Traceback" not in said, (
        said
    )


def test_a_launcher_that_is_killed_is_noticed(tmp_path: Path) -> None:
    """``deepspeed.launcher.launch``, which starts the ranks; here one that would sleep on."""
    rank = (
        "import sys, time; from ibp_deepspeed.commands.training.launcher import launchers, when_one_ends; "
        "when_one_ends(launchers(), lambda why: (print(why, flush=True), __import__('os')._exit(3))); "
        "print('watches', len(launchers()), flush=True); time.sleep(600)"
    )
    launch = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {rank!r}])"
    command = [sys.executable, "-c", launch, "deepspeed.launcher.launch"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "watches 1\n"
    process.kill()
    assert process.stdout.read() == "the deepspeed launcher has ended\n"


@pytest.fixture
def alone(config: Path, data: Path, tmp_path: Path) -> Callable[..., subprocess.Popen[bytes]]:
    """A training in one process."""

    def start(*more: object) -> subprocess.Popen[bytes]:
        options = words(config, data, tmp_path / "out", "--one-process", "--stages", 2, "--steps", MANY, *more)
        return started([sys.executable, "scripts/train_lm.py", *options], tmp_path / "out", tmp_path / "log")

    return start


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_was_interrupted_goes_on(
    alone: Callable[..., subprocess.Popen[bytes]], config: Path, data: Path, tmp_path: Path, number: signal.Signals
) -> None:
    process = alone()
    process.send_signal(number)
    process.send_signal(number)  # as a terminal and a launcher do: one Ctrl-C
    assert process.wait(timeout=100) == EXIT_CODE, (tmp_path / "log").read_text()
    batches = int((tmp_path / "out" / "checkpoint" / "latest").read_text().removeprefix("global_step"))
    assert f"interrupted after {batches:,} of {MANY:,} batches" in (tmp_path / "out" / "run_report.html").read_text()
    more = ("--one-process", "--stages", 2, "--steps", batches + 2, "--resume", "--eval-micro-batches", 0)
    done = script("train_lm.py", *words(config, data, tmp_path / "out", *more))
    assert done.returncode == 0 and f"resumes from global_step{batches}" in done.stdout, done.stdout + done.stderr
    assert "unigrams" not in done.stdout, "--eval-micro-batches 0 evaluates nothing"
    assert (tmp_path / "out" / "checkpoint" / "latest").read_text() == f"global_step{batches + 2}"


def test_the_end_of_patience_ends_at_once(alone: Callable[..., subprocess.Popen[bytes]], tmp_path: Path) -> None:
    process = alone("--grace-seconds", 0)
    process.send_signal(signal.SIGTERM)
    code = process.wait(timeout=100)
    assert code == 1 and "not saved within --grace-seconds 0" in (tmp_path / "log").read_text()


def test_a_second_signal_ends_at_once() -> None:
    """Three seconds after the first, or later; a process that would sleep on."""
    code = (
        "import time; from ibp_deepspeed.commands.training.interruption import Interruption; "
        "Interruption(600, speaks=True); "
        "print('listens', flush=True)\nwhile True: time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"listens\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(3.5)
    assert process.poll() is None, "one signal finishes the batch"
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and b"SIGTERM again: ends at once" in said


class Store(dict[str, bytes]):
    """What an agreement uses of torch's."""

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)

    def set(self, key: str, value: str) -> None:
        self[key] = value.encode()

    def get(self, key: str) -> bytes:  # type: ignore[override]
        return self[key]

    def delete_key(self, key: str) -> None:
        del self[key]


def test_ranks_do_the_same_after_the_same_batch() -> None:
    """Rank 0 begins each batch before another rank ends it; rank 1 is told to stop while it is behind."""
    store: Any = Store()
    first, other = Agreement(store, 0), Agreement(store, 1)
    wanted = ({1: {SAVE}}, {3: {STOP}})
    done: tuple[dict[int, set[str]], dict[int, set[str]]] = ({}, {})
    for step in range(1, 8):  # rank 1 trains the batch before
        first.before(step, partial(set, wanted[0].get(step, ())))
        if step > 1:
            done[1][step - 1] = other.after(step - 1)
            other.before(step, partial(set, wanted[1].get(step, ())))
        done[0][step] = first.after(step)
        if STOP in done[0][step]:  # rank 0 waits in the checkpoint for the other one
            done[1][step] = other.after(step)
            break
    assert done[0][1] == done[1][1] == {SAVE}
    assert [key for key in store if key.startswith("after")] == [f"after {step}"], "decisions don't pile up"
    assert step > 3 and done[0] == done[1] and STOP in done[0][step]


def test_no_process_ends_before_the_first() -> None:
    """Which still writes the page of the run, and a launcher would end it with the others."""
    store = dist.HashStore()
    other = threading.Thread(target=Agreement(store, 1).leave)
    other.start()
    other.join(0.5)
    assert other.is_alive()
    Agreement(store, 0).leave()
    other.join(60)
    assert not other.is_alive()
    Agreement(None, 0).leave()


def test_a_tenth_of_a_run_is_saved_unless_another_interval_is_given() -> None:
    given = ["--deepspeed_config", "x", "--data", "y", "--model", "z"]
    for more, interval in (
        ([], 20),
        (["--steps", "40"], 0),
        (["--save-interval", "7"], 7),
        (["--save-interval", "0"], 0),
    ):
        assert save_interval(parse_arguments(None, [*given, *more])) == interval
