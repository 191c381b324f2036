"""The scripts as a user runs them: real launchers, real text."""

from __future__ import annotations

import csv
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.commands import Done, assert_one_sentence, deepspeed, ranks, real, script, torchrun
from tests.scripts.settings import SMALL, changed


def test_training_leaves_history_scalars_and_a_checkpoint(trained: Path) -> None:
    rows = [json.loads(line) for line in (trained / "history.jsonl").read_text().splitlines()]
    held_out = [row for row in rows if "held_out" in row]
    assert [row["step"] for row in held_out] == [4, 8]
    assert all(len(row.get("train") or row.get("held_out") or row["stages"]) == 2 for row in rows)
    assert all(a > b for a, b in zip(held_out[0]["held_out"], held_out[1]["held_out"], strict=True)), "it learns"
    events = EventAccumulator(str(trained / "tensorboard"))
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    wanted = {f"Eval/stage {k}/held-out loss (nats per token)" for k in range(2)} | {
        "Train/copy of the LM head (bytes)"
    }
    reported = {row["step"]: row["stages"] for row in rows if "stages" in row}
    wanted |= {f"Train/stage {k}/{name}" for k in range(2) for name in reported[8][k]}
    assert wanted <= scalars and len(reported[8][0]) >= 14, scalars
    for name, value in reported[8][1].items():
        last = events.Scalars(f"Train/stage 1/{name}")[-1]
        assert last.step == 8 and last.value == pytest.approx(value, rel=1e-5), "the same in both, by the batch"
    for k, stage in enumerate(reported[8]):
        for name, value in stage.items():
            rows_of_csv = table(trained, f"Train/stage {k}/{name}")
            assert rows_of_csv[0] == ["step", name.rpartition("/")[2]]
            assert rows_of_csv[-1][0] == "8" and float(rows_of_csv[-1][1]) == pytest.approx(value, rel=1e-5)
    assert [row[0] for row in table(trained, "Train/stage 0/loss")] == ["step", "2", "4", "6", "8"]
    times = [row["time"] for row in rows]
    assert times == sorted(times) and time.time() - 86400 < times[0] <= times[-1] <= time.time()
    left = {row["step"]: row["seconds_left"] for row in rows if "stages" in row}
    assert left[2] > 0 == left[8]
    assert (trained / "checkpoint" / "latest").read_text() == "global_step8"


def table(run: Path, name: str) -> list[list[str]]:
    """Rows of what DeepSpeed's CSV monitor wrote of one scalar."""
    path = run / "csv" / f"{name.replace('/', '_').replace(' ', '_')}.csv"
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_evaluate_plot_export_generate(trained: Path) -> None:
    table = trained / "exits.json"
    done = script("evaluate_lm.py", "--checkpoint", trained / "checkpoint", "--max-batches", "4", "--json", table)
    assert done.returncode == 0, done.stderr
    exits = json.loads(table.read_text())["exits"]
    assert [row["exit"] for row in exits] == [1, 2] and all(row["perplexity"] > 1 for row in exits)
    done = script("plot_losses.py", "--run", trained)
    assert done.returncode == 0 and (trained / "losses.png").read_bytes().startswith(b"\x89PNG"), done.stderr
    done = script("convert_hf.py", "export", "--checkpoint", trained / "checkpoint", "--out", trained / "hf")
    assert done.returncode == 0, done.stderr
    done = script("generate.py", "--model", trained / "hf", "--prompt", "import ", "--tokens", "8")
    assert done.returncode == 0 and done.stdout.startswith("import "), done.stderr
    done = script("convert_hf.py", "export", "--checkpoint", trained / "checkpoint", "--out", trained / "hf")
    assert done.returncode == 1 and "exists already" in done.stderr


def test_runs_are_compared_by_loss_and_simulated_time(trained: Path) -> None:
    """Beside itself a run takes as long."""
    done = script("compare_runs.py", trained, trained)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith(str(trained))]
    assert len(rows) == 2 and rows[0] == rows[1] and rows[0][-1] == "1.00x"
    history = [json.loads(line) for line in (trained / "history.jsonl").read_text().splitlines()]
    last = [row for row in history if "held_out" in row][-1]  # a stage's report may come after it
    assert float(rows[0][-3]) == pytest.approx(last["held_out"][-1], abs=1e-3)
    done = script("compare_runs.py", "--equal-time", trained, trained)
    assert done.returncode == 0 and done.stdout == f"{last['step']}\n", (done.stdout, done.stderr)
    done = script("compare_runs.py", trained / "nothing")
    assert done.returncode == 1 and "there is no checkpoint in" in done.stderr


def test_evaluation_agrees_with_training(trained: Path, data: Path) -> None:
    """On all of the split: eval_batch of two replicas in the pipeline, and evaluate_lm.py in one process."""
    rows = [json.loads(line) for line in (trained / "history.jsonl").read_text().splitlines()]
    in_training = next(row for row in reversed(rows) if "held_out" in row)
    table = trained / "again.json"
    words = ("--checkpoint", trained / "checkpoint", "--batch-size", 3, "--json", table)
    done = script("evaluate_lm.py", *words)
    assert done.returncode == 0, done.stderr
    alone = json.loads(table.read_text())["exits"]
    assert [row["loss"] for row in alone] == pytest.approx(in_training["held_out"], rel=1e-5)
    assert {row["tokens"] for row in alone} == {in_training["tokens"]}


def test_torchrun_and_one_process_train_the_same(data: Path, config: Path, tmp_path: Path) -> None:
    """Two stages, heads behind borrowed layers, as processes and as virtual ones: the same losses, and files that
    evaluate alike."""
    borrowing = changed(config, tmp_path / "borrow.json", aux_head={"readout": "shared", "borrow": 1})
    words = ["scripts/train_lm.py", "--deepspeed_config", borrowing, "--data", data, "--steps", 3]
    words += ["--eval-micro-batches", 3, *SMALL, "--output"]
    done = torchrun(2, *words, tmp_path / "two")
    assert done.returncode == 0, done.stdout + done.stderr
    done = real(sys.executable, *words, tmp_path / "one", "--one-process", "--stages", "2")
    assert done.returncode == 0 and "[WARNING]" not in done.stdout + done.stderr, done.stdout + done.stderr
    ends = []
    for name in ("two", "one"):
        rows = [json.loads(line) for line in (tmp_path / name / "history.jsonl").read_text().splitlines()]
        ends.append([row["held_out"] for row in rows if "held_out" in row][-1])
        assert (tmp_path / name / "checkpoint" / "latest").read_text() == "global_step3"
    assert ends[0] == pytest.approx(ends[1], rel=1e-5)
    # a sample of 3 micro-batches of 2, spread over the split, is one of 2 batches of 3
    words = ["--checkpoint", tmp_path / "one" / "checkpoint", "--batch-size", 3, "--max-batches", 2]
    done = script("evaluate_lm.py", *words, "--json", tmp_path / "exits.json")
    assert done.returncode == 0, done.stderr
    alone = [row["loss"] for row in json.loads((tmp_path / "exits.json").read_text())["exits"]]
    assert alone == pytest.approx(ends[0], rel=1e-5) and "6 of " in done.stdout


def test_a_resumed_run_is_the_same_bit_for_bit(data: Path, config: Path, tmp_path: Path) -> None:
    """Dropout, a shared readout on its way, streaming: three batches and three more are six."""
    gpt = ["--model", "gpt2-tiny", "--sequence-length", "32"]
    own = tmp_path / "own.json"  # monitors write under --output
    own.write_text(json.dumps({**json.loads(config.read_text()), "tensorboard": {"enabled": True}}))
    gpt += ["--set", "n_layer=2", "resid_pdrop=0.1", "embd_pdrop=0.1", "--save-interval", "3", "--eval-interval", "4"]

    def train(out: Path, *more: str) -> Done:
        where = ("--deepspeed_config", own, "--data", data, "--output", out)
        return ranks(2, "train_lm.py", *where, *gpt, *more)

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    done = train(whole, "--steps", "6", "--resume")
    assert done.returncode == 0 and "no checkpoint yet: starts from scratch" in done.stdout, done.stderr
    shutil.copytree(whole / "checkpoint" / "global_step3", stopped / "checkpoint" / "global_step3")
    (stopped / "checkpoint" / "latest").write_text("global_step3")
    for name in ("history.jsonl", "csv", "tensorboard"):  # with all six batches: three are written again
        copy = shutil.copy if name.endswith("jsonl") else shutil.copytree
        copy(whole / name, stopped / name)
    done = train(stopped, "--steps", "6", "--resume", "--keep", "1")
    assert done.returncode == 0 and "resumes from global_step3" in done.stdout, done.stderr
    assert sorted(p.name for p in (stopped / "checkpoint").iterdir()) == ["global_step6", "latest"]
    ends = [out / "checkpoint" / "global_step6" for out in (whole, stopped)]
    names = sorted(path.name for path in ends[0].glob("*.pt"))
    assert names == sorted(path.name for path in ends[1].glob("*.pt")) and len(names) >= 9
    for name in names:
        one, other = (torch.load(end / name, weights_only=False) for end in ends)
        assert_same(one, other, name)
    rows = [json.loads(line) for line in (stopped / "history.jsonl").read_text().splitlines()]
    for kind in ("train", "held_out", "stages"):
        steps = [row["step"] for row in rows if kind in row]
        assert steps == sorted(set(steps)) and steps[-1] <= 6
    assert [row["step"] for row in rows if "stages" in row] == [2, 4, 6]
    assert [row[0] for row in table(stopped, "Train/stage 1/loss")] == ["step", "2", "4", "6"]
    events = EventAccumulator(str(stopped / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("Train/stage 1/loss")] == [2, 4, 6]


def assert_same(one: Any, other: Any, where: str) -> None:
    """Equal bit for bit, through dictionaries and lists."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where}/{index}")


def test_nothing_is_compiled(data: Path, config: Path, tmp_path: Path) -> None:
    """Two stages on a path without c++ and ninja."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("bash", "sh", "env", "ls", "uname"):
        (folder / name).symlink_to(shutil.which(name) or f"/bin/{name}")
    words = ["--deepspeed_config", config, "--data", data, "--steps", "2", "--output", tmp_path / "out", *SMALL]
    env = {
        "PATH": str(folder),
        "HOME": os.environ.get("HOME", "/"),
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
    }
    env |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = deepspeed(2, "scripts/train_lm.py", *words, environment=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (tmp_path / "extensions").exists()


def test_help_and_no_launcher() -> None:
    names = (
        "report.py",
        "train_lm.py",
        "evaluate_lm.py",
        "plot_losses.py",
        "generate.py",
        "prepare_data.py",
        "convert_hf.py",
    )
    for name in names:
        done = script(name, "--help")
        assert "usage:" in done.stdout and done.returncode == 0, name
    done = script("train_lm.py", "--deepspeed_config", "x", "--data", "x", "--model", "x")
    assert_one_sentence(done, "needs a launcher (deepspeed")
    done = script("train_lm.py", "--one-process", "--deepspeed_config", "x", "--data", "y", "--model", "z")
    assert_one_sentence(done, "--one-process needs --stages")
