"""Trainings whose processes are killed, restarted by torchrun's agent or by hand: nothing is lost, nothing twice."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.commands import Done, ranks, real
from tests.forks import ROOT
from tests.scripts.test_scripts import assert_same
from tests.shared import Shared

GPT = ["--model", "gpt2-tiny", "--sequence-length", "32"]
GPT += ["--set", "n_layer=2", "resid_pdrop=0.1", "embd_pdrop=0.1"]
"""With dropout, so that random states count too."""
STEPS = 6
FAULTY = str(ROOT / "tests" / "faulty_training.py")


def words(config: Path, data: Path, output: Path, *more: object) -> list[object]:
    return ["--deepspeed_config", config, "--data", data, "--output", output, "--eval-micro-batches", 0, *GPT, *more]


@pytest.fixture(scope="session")
def whole(config: Path, data: Path, shared: Shared) -> Path:
    """Six batches on two stages without a stop, all of them saved; nothing is evaluated."""

    def make(folder: Path) -> None:
        more = ("--steps", STEPS, "--save-interval", 1, "--keep", STEPS)
        done = ranks(2, "train_lm.py", *words(config, data, folder / "run", *more))
        assert done.returncode == 0, done.stderr

    return shared.folder("whole", make) / "run"


def assert_the_same(run: Path, whole: Path) -> None:
    """To the bit: weights, optimizer, random states, the place in the data; and each batch's losses once."""
    ends = [out / "checkpoint" / f"global_step{STEPS}" for out in (whole, run)]
    names = sorted(path.name for path in ends[0].glob("*.pt"))
    assert names == sorted(path.name for path in ends[1].glob("*.pt")) and len(names) >= 8
    for name in names:
        one, other = (torch.load(end / name, weights_only=False) for end in ends)
        assert_same(one, other, name)
    assert len({(end / "data_position.json").read_text() for end in ends}) == 1
    for kind in ("train", "stages"):
        rows = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
        steps = [row["step"] for row in rows if kind in row]
        assert steps == sorted(set(steps)), (kind, steps)


def errors(done: Done) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("error:")]


def torchrun(processes: int, faults: list[dict[str, Any]], train: list[object]) -> Done:
    """With two restarts; the agent looks at its processes ten times a second."""
    options = ("--standalone", "--nproc_per_node", processes, "--max-restarts", 2, "--monitor-interval", 0.1)
    return real(sys.executable, "-m", "torch.distributed.run", *options, FAULTY, json.dumps(faults), *train)


def test_torchrun_restarts_from_the_last_checkpoint(config: Path, data: Path, whole: Path, tmp_path: Path) -> None:
    """Two failures in one run: stage 1 is killed in its fourth batch, then rank 0 while it names a checkpoint."""
    faults = [
        {"restart": 0, "rank": 1, "act": "kill", "batch": 4, "instruction": "ForwardPass"},
        {"restart": 1, "rank": 0, "point": "rename global_step5.partial global_step5"},
    ]
    run, more = tmp_path / "run", ("--steps", STEPS, "--save-interval", 1, "--resume")
    done = torchrun(2, faults, words(config, data, run, *more))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "there is no checkpoint yet: starts from scratch" in done.stdout
    assert re.findall("resumes from (.*)", done.stdout) == ["global_step3", "global_step4"], done.stdout
    said = errors(done)
    assert len(said) == 2 and re.match(r"error: rank 0: stage 0, \w+ of micro-batch \d.*, batch \d.* stage 1", said[0])
    assert said[1].startswith("error: rank 1 lost another process"), said
    assert said[1].endswith("in stage 1, saving global_step5"), said
    assert_the_same(run, whole)


def test_a_job_that_is_killed_while_it_saves_goes_on(
    config: Path, data: Path, whole: Path, tmp_path: Path, full: bool
) -> None:
    """After three batches, at a point of the next checkpoint (tests/checkpoint/test_crash_points.py has all of one
    process); the same command then ends the training."""
    faults: list[dict[str, Any]] = [{"rank": 1, "point": "half of global_step4.partial/random_states_1.pt"}]
    if full:
        faults += [{"rank": 0, "point": number} for number in range(0, 66, 3)]
        faults += [{"rank": 1, "point": number} for number in range(3)]
    for fault in faults:
        run = tmp_path / "run"
        shutil.rmtree(run, ignore_errors=True)
        for step in (2, 3):
            shutil.copytree(whole / "checkpoint" / f"global_step{step}", run / "checkpoint" / f"global_step{step}")
        (run / "checkpoint" / "latest").write_text("global_step3")
        train = words(config, data, run, "--steps", STEPS, "--save-interval", 1, "--resume")
        done = ranks(2, FAULTY, json.dumps([fault]), *train)
        assert done.returncode != 0 and "Traceback" not in done.stderr, (fault, done.stderr)
        done = ranks(2, "train_lm.py", *train)
        assert done.returncode == 0 and re.search("resumes from global_step[345]", done.stdout), (fault, done.stderr)
        assert_the_same(run, whole)


@pytest.mark.parametrize(("stages", "fewer"), [(4, 2), (2, 2), (2, 1)])
def test_fewer_processes_go_on_in_another_shape(
    config: Path, data: Path, tmp_path: Path, full: bool, stages: int, fewer: int
) -> None:
    """Four processes, of which one is killed, and then two or one: half of the stages, or one replica in the place of
    two. Batches have the same samples, so that the place in the data says whether one was lost or repeated."""
    if (stages, fewer) != (4, 2) and not full:
        pytest.skip("the other shapes run with --full")
    fault = {"rank": 3, "act": "kill", "batch": 4, "instruction": "OptimizerStep"}
    settings = json.loads(config.read_text()) | {"train_batch_size": 8}
    del settings["gradient_accumulation_steps"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    train = words(tmp_path / "config.json", data, tmp_path / "run", "--save-interval", 1, "--steps", STEPS, "--resume")
    train = ["n_layer=4" if word == "n_layer=2" else word for word in train]
    done = ranks(4, FAULTY, json.dumps([fault]), "--stages", stages, *train)
    assert done.returncode != 0, done.stdout
    done = ranks(fewer, "train_lm.py", "--stages", fewer, *train)
    assert done.returncode == 0 and "resumes from global_step3" in done.stdout, done.stderr
    assert f"{fewer} stages × 1 replicas" in done.stdout
    last = tmp_path / "run" / "checkpoint" / f"global_step{STEPS}"
    assert json.loads((last / "data_position.json").read_text()) == {"epoch": 0, "samples": 8 * STEPS}
