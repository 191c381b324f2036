"""transformers' habits: its callbacks on our loop, its names of options, --report-to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import TrainingArguments

from ibp_deepspeed.commands.training.monitors import reporting_to
from ibp_deepspeed.commands.training.trainer_names import OURS, with_our_names
from ibp_deepspeed.errors import ConfigError
from tests.commands import Done, assert_one_sentence, ranks, script
from tests.scripts.settings import SMALL

PRESET = ("--deepspeed_config", "local_cpu")
MODULE = '''
import json
from transformers import TrainerCallback


class Notes(TrainerCallback):
    """Writes what it is told, has batch 2 evaluated and saved behind the next one, and ends it in batch 4."""

    def note(self, event, args, state, **more):
        row = {"event": event, "step": state.global_step, "steps": args.max_steps, **more}
        with open("notes.jsonl", "a") as file:
            file.write(json.dumps(row) + "\\n")

    def on_train_begin(self, args, state, control, **kwargs):
        self.note("begin", args, state, zero=state.is_world_process_zero, batches=kwargs["pipeline"].global_steps)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            control.should_save = control.should_evaluate = True
        control.should_training_stop = state.global_step >= 4
        self.note("step", args, state)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.note("log", args, state, logs=logs)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.note("evaluate", args, state, metrics=metrics, best=state.best_metric)

    def on_save(self, args, state, control, **kwargs):
        self.note("save", args, state)

    def on_train_end(self, args, state, control, **kwargs):
        self.note("end", args, state)


class Other:
    pass
'''


def train(data: Path, folder: Path, *words: object) -> Done:
    """With transformers' names of options, in a folder with a module of callbacks."""
    (folder / "mine.py").write_text(MODULE)
    sizes = ("--per_device_train_batch_size", 2, "--gradient-accumulation-steps=1", "--eval-micro-batches", 2)
    where = ("--data", data, "--output_dir", folder / "run", "--one-process", "--stages", 2)
    return script("train_lm.py", *PRESET, *SMALL, *sizes, *where, *words, folder=folder)


def test_a_callback_is_told_and_asks(data: Path, tmp_path: Path) -> None:
    done = train(data, tmp_path, "--max_steps", 9, "--eval_steps", 0, "--callbacks", "mine:Notes")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "notes.jsonl").read_text().splitlines()]
    told = [(row["event"], row["step"]) for row in rows if row["event"] != "log"]
    asked = [("save", 3), ("evaluate", 3)]
    last = [("save", 5), ("evaluate", 5), ("end", 5)]
    steps = [("step", k) for k in range(1, 6)]
    assert told == [("begin", 0), *steps[:3], *asked, *steps[3:], *last]
    assert rows[0]["zero"] and rows[0]["batches"] == 0 and {row["steps"] for row in rows} == {9}
    logs = [row["logs"] for row in rows if row["event"] == "log"]
    history = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    trained = {row["step"]: row["train"] for row in history if "train" in row}
    assert {log["step"]: [log["loss_exit_1"], log["loss"]] for log in logs} == trained and trained
    evaluated = [row for row in rows if row["event"] == "evaluate"]
    held_out = [row["held_out"] for row in history if "held_out" in row]
    assert [[row["metrics"]["eval_loss_exit_1"], row["metrics"]["eval_loss"]] for row in evaluated] == held_out
    assert evaluated[0]["best"] is None and evaluated[1]["best"] == held_out[0][-1]
    assert "ended after batch 5 of 9, as a callback asked" in done.stdout
    assert (tmp_path / "run" / "checkpoint" / "latest").read_text() == "global_step5"


def test_early_stopping_ends_all_ranks(data: Path, tmp_path: Path) -> None:
    """Nothing is learned at a rate of nothing: two evaluations that are no lower than the first."""
    options = ("--steps", 20, "--eval-interval", 2, "--micro-batch-size", 2, "--gradient-accumulation-steps", 1)
    words = ("--learning-rate", 1e-30, "--early-stopping-patience", 2, "--eval-micro-batches", 2)
    where = ("--data", data, "--output", tmp_path / "run")
    done = ranks(2, "train_lm.py", *PRESET, *SMALL, *options, *words, *where)
    assert done.returncode == 0, done.stderr
    assert "ended after batch 7 of 20, as a callback asked" in done.stdout, done.stdout


def test_what_is_no_callback_is_refused(data: Path, tmp_path: Path) -> None:
    for name, sentence in (
        ("mine", "--callbacks mine: write it as module:Class, such as mine:Notify for mine.py beside you."),
        ("mine:Absent", "--callbacks mine:Absent can't be made: module 'mine' has no attribute 'Absent'."),
        ("absent:Any", "--callbacks absent:Any can't be made: No module named 'absent'."),
        ("mine:Other", "--callbacks mine:Other is a Other, not a transformers.TrainerCallback."),
    ):
        assert_one_sentence(train(data, tmp_path, "--callbacks", name), sentence)
    done = train(data, tmp_path, "--early-stopping-patience", 0)
    assert_one_sentence(done, "--early-stopping-patience is 0: give at least 1.")
    assert not (tmp_path / "run").exists()


def test_monitors_by_name() -> None:
    config = {"tensorboard": {"enabled": True, "job_name": "mine"}, "train_batch_size": 4}
    assert reporting_to(config, None) == config
    assert reporting_to(config, ["csv"]) == {
        "tensorboard": {"enabled": False, "job_name": "mine"},
        "csv_monitor": {"enabled": True},
        "train_batch_size": 4,
    }
    assert reporting_to(config, ["none"])["tensorboard"]["enabled"] is False
    with pytest.raises(ConfigError, match=r"--report-to none csv: give none alone, or the others without it\."):
        reporting_to(config, ["none", "csv"])


def test_names_of_training_arguments() -> None:
    """Each is a field of transformers', and other words are left alone."""
    assert set(OURS) <= set(TrainingArguments.__dataclass_fields__)
    words = ["--max_steps", "5", "--max-steps=5", "--output_dir", "--max_steps", "max_steps", "--seed", "1"]
    assert with_our_names(words) == ["--steps", "5", "--steps=5", "--output", "--steps", "max_steps", "--seed", "1"]
