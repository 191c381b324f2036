"""Trainings whose processes are killed, restarted by torchrun's agent or by hand: nothing is lost, nothing twice."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.commands import Done, ranks, real
from tests.forks import ROOT
from tests.scripts.test_scripts import assert_same
from tests.shared import Shared

GPT = ["--model", "models/configs/gpt2-tiny.json", "--sequence-length", "32"]
GPT += ["--set", "n_layer=2", "resid_pdrop=0.1", "embd_pdrop=0.1"]
"""With dropout, so that random states count too."""
STEPS = 6
FAULTY = ROOT / "tests" / "faulty_training.py"


def words(config: Path, data: Path, output: Path, *more: object) -> list[object]:
    return ["--deepspeed_config", config, "--data", data, "--output", output, "--eval-micro-batches", 0, *GPT, *more]


@pytest.fixture(scope="session")
def whole(config: Path, data: Path, shared: Shared) -> Path:
    """Six batches on two stages without a stop; nothing is evaluated."""

    def make(folder: Path) -> None:
        done = ranks(2, "train_lm.py", *words(config, data, folder / "run", "--steps", STEPS))
        assert done.returncode == 0, done.stderr

    return shared.folder("whole", make) / "run"


def assert_the_same(run: Path, whole: Path) -> None:
    """The last checkpoint to the bit (weights, optimizer, random states, place in the data), each batch's losses once."""
    ends = [out / "checkpoint" / f"global_step{STEPS}" for out in (whole, run)]
    names = sorted(path.name for path in ends[0].glob("*.pt"))
    assert names == sorted(path.name for path in ends[1].glob("*.pt")) and len(names) >= 8
    for name in names:
        assert_same(*(torch.load(end / name, weights_only=False) for end in ends), name)
    assert len({(end / "data_position.json").read_text() for end in ends}) == 1
    for kind in ("train", "stages"):
        rows = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
        steps = [row["step"] for row in rows if kind in row]
        assert steps == sorted(set(steps)), (kind, steps)


def test_torchrun_restarts_from_the_last_checkpoint(config: Path, data: Path, whole: Path, tmp_path: Path) -> None:
    """Two failures in one run: stage 1 is killed in its fourth batch, then rank 0 while it names a checkpoint."""
    faults = [
        {"restart": 0, "rank": 1, "act": "kill", "batch": 4, "instruction": "BackwardPass"},
        {"restart": 1, "rank": 0, "point": "rename global_step5.partial global_step5"},
    ]
    done = torchrun(
        2, faults, words(config, data, tmp_path / "run", "--steps", STEPS, "--save-interval", 1, "--resume")
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "there is no checkpoint yet: starts from scratch" in done.stdout
    assert re.findall("resumes from (.*)", done.stdout) == ["global_step3", "global_step4"], done.stdout
    said = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(said) == 2, done.stderr
    assert re.match(r"error: rank 0: stage 0, \w+ of micro-batch \d.*, batch \d.* stage 1", said[0]), said
    assert said[1].startswith("error: rank 1 lost another process") and "saves global_step5" in said[1], said
    assert_the_same(tmp_path / "run", whole)


def torchrun(processes: int, faults: list[dict[str, Any]], train: list[object]) -> Done:
    """With two restarts; the agent looks at its processes ten times a second."""
    options = ("--standalone", "--nproc_per_node", processes, "--max-restarts", 2, "--monitor-interval", 0.1)
    return real(sys.executable, "-m", "torch.distributed.run", *options, FAULTY, json.dumps(faults), *train)


def test_a_job_killed_at_any_point_goes_on(config: Path, data: Path, whole: Path, tmp_path: Path, full: bool) -> None:
    """Each start resumes from what the one before has left, is killed later, and the last one ends it."""
    faults: list[dict[str, Any]] = [
        {"rank": 1, "point": "half of global_step2.partial/random_states_1.pt"},
        {"rank": 0, "point": "rename latest.new latest"},
    ]
    if full:
        kinds = ("LoadMicroBatch", "RecvGrad", "SendActivation", "OptimizerStep")
        faults += [{"rank": 0, "act": "kill", "batch": 3, "instruction": kind} for kind in kinds]
        faults += [{"rank": number % 2, "point": number} for number in range(0, 80, 3)]
    run = tmp_path / "run"
    for fault in faults:
        more = ("--steps", 3 if "act" in fault or "point" in fault else STEPS)
        done = ranks(2, FAULTY, json.dumps([fault]), *words(config, data, run, *more, "--save-interval", 1, "--resume"))
        print(fault, done.returncode, done.stderr[-300:])
