"""The folder of a run: nothing is written over unasked, one training at a time, and a finished run ends well."""

from __future__ import annotations

import json
import os
import shutil
from argparse import Namespace
from pathlib import Path

import pytest

from ibp_deepspeed.commands.training.loop import open_history
from ibp_deepspeed.commands.training.output import check_output, claim
from ibp_deepspeed.errors import OutputError
from tests.commands import assert_one_sentence, ranks, script
from tests.scripts.settings import SMALL


def arguments(output: Path, *, overwrite: bool = False, resume: str | None = None) -> Namespace:
    return Namespace(output=output, overwrite=overwrite, resume=resume)


@pytest.fixture
def used(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained run."""
    return Path(shutil.copytree(trained, tmp_path / "used"))


def test_a_run_is_not_written_over(used: Path, config: Path, data: Path, tmp_path: Path) -> None:
    words = ("--deepspeed_config", config, "--data", data, "--output", used, "--one-process", "--stages", 2, *SMALL)
    before = sorted(path.name for path in used.rglob("*"))
    assert_one_sentence(
        script("train_lm.py", *words), "has a run already (global_step8): go on with --resume, remove it"
    )
    assert sorted(path.name for path in used.rglob("*")) == before
    done = script("train_lm.py", *words, "--overwrite", "--steps", 1, "--eval-micro-batches", 0)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (used / "checkpoint").glob("global_step*")] == ["global_step1"]
    assert not (used / "trace.json").exists() and len((used / "history.jsonl").read_text().splitlines()) <= 2


def test_a_finished_run_that_is_started_again_ends_well(used: Path, config: Path, data: Path) -> None:
    """On all ranks, before they meet."""
    words = ("--deepspeed_config", config, "--data", data, "--output", used, "--steps", 8, "--resume", *SMALL)
    done = ranks(4, "train_lm.py", "--stages", 2, *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("has 8 batches of 8: all are trained, more with a larger --steps") == 1


def test_the_last_checkpoint_that_can_be_trained_on_stays(config: Path, data: Path, tmp_path: Path) -> None:
    """The rate is 0 in two batches and far too high in the third, whose weights would be saved and rotate them out."""
    settings = json.loads(config.read_text())
    warmup = {"warmup_min_lr": 0, "warmup_max_lr": 1e38, "warmup_num_steps": 2, "warmup_type": "linear"}
    settings["scheduler"] = {"type": "WarmupLR", "params": warmup}
    settings["optimizer"] = {"type": "SGD", "params": {"lr": 0, "weight_decay": 1e3}}  # 1e41 of a weight: infinite
    (tmp_path / "config.json").write_text(json.dumps(settings))
    where = ("--deepspeed_config", tmp_path / "config.json", "--data", data, "--output", tmp_path / "run")
    done = ranks(2, "train_lm.py", *where, "--steps", 4, "--save-interval", 1, "--keep", 1, *SMALL)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "is not finite, so no checkpoint is written; go on from the last one" in done.stderr
    kept = [path.name for path in (tmp_path / "run" / "checkpoint").iterdir() if not path.name.endswith(".partial")]
    assert sorted(kept) == ["global_step2", "latest"]


def test_a_folder_belongs_to_one_training(tmp_path: Path) -> None:
    """As long as it lives: the lock goes with its file."""
    first = claim(arguments(tmp_path / "run"))
    with pytest.raises(OutputError, match=f"in use by process {os.getpid()} on"):
        claim(arguments(tmp_path / "run"))
    first.close()
    claim(arguments(tmp_path / "run")).close()


def test_a_file_and_a_folder_in_a_file_are_no_output(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file: give a folder"):
        check_output(arguments(tmp_path / "file"))
    with pytest.raises(OutputError, match="can't write into --output"):
        claim(arguments(tmp_path / "file" / "run"))


def test_what_is_resumed_or_overwritten_may_be_there(used: Path) -> None:
    check_output(arguments(used, resume="auto"))
    check_output(arguments(used, overwrite=True))
    check_output(arguments(used / "new"))
    with pytest.raises(OutputError, match="another folder"):
        check_output(arguments(used))


def test_a_run_goes_on_from_a_history_with_anything_in_it(tmp_path: Path) -> None:
    """Rows of later batches, a row that is cut off and lines of something else go."""
    rows = [
        '{"step": 1}',
        '{"step": 3}',
        "[" * 100_000,
        '{"step": "x"}',
        "5",
        '{"step": 2, "train": [1.0]}',
        '{"step": 2',
    ]
    (tmp_path / "history.jsonl").write_text("\n".join(rows))
    open_history(tmp_path / "history.jsonl", 2).close()
    assert (tmp_path / "history.jsonl").read_text() == '{"step": 1}\n{"step": 2, "train": [1.0]}\n'
