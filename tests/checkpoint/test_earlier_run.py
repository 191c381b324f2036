"""What an earlier version trained loads, evaluates, exports and resumes with the same numbers.

``earlier_run`` was made before the package had folders: three batches of three stages with a shared LM head whose
copies were on their way, in three processes. ``numbers.json`` is what that version went on to; CPU, fp32.
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from ibp_deepspeed.data import HeldOut, open_tokens
from ibp_deepspeed.models.exits.evaluation import evaluate
from ibp_deepspeed.models.exits.exits import Exits
from tests.commands import Done, ranks, script

FOLDER = Path(__file__).resolve().parent / "earlier_run"
NUMBERS: dict[str, Any] = json.loads((FOLDER / "numbers.json").read_text())
SIZES = ["hidden_size=16", "intermediate_size=24", "num_hidden_layers=4", "num_attention_heads=2"]
SIZES += ["num_key_value_heads=2", "max_position_embeddings=64"]
TOLERANCE = 1e-5  # other processors round otherwise


def held_out(batch_size: int) -> HeldOut:
    return HeldOut(open_tokens(FOLDER / "data", "heldout"), 16, batch_size)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_its_exits_have_the_same_losses(batch_size: int) -> None:
    losses = evaluate(Exits(FOLDER / "checkpoint"), held_out(batch_size)).losses
    assert losses == pytest.approx(NUMBERS["shared"]["global_step3"], rel=TOLERANCE)


@pytest.mark.parametrize("exit_", [1, 3])
def test_its_exports_have_the_same_logits(exit_: int) -> None:
    model = Exits(FOLDER / "checkpoint").to_hugging_face(exit_)
    with torch.no_grad():
        logits = model(torch.tensor(NUMBERS["ids"])).logits[0, -1, :8].tolist()
    assert logits == pytest.approx(NUMBERS["logits"][str(exit_)], abs=1e-6)


def train(config: str | Path, out: Path, *words: str, processes: int = 0) -> Done:
    """In processes of a job, or in one."""
    where = ("--deepspeed_config", FOLDER / config, "--data", FOLDER / "data", "--output", out)
    what = ("--model", "llama-tiny", "--set", *SIZES, "--partition", "0,2,4,6")
    start = partial(ranks, processes) if processes else script
    done = start("train_lm.py", *where, *what, "--sequence-length", "16", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def check(out: Path, expected: dict[str, Any], steps: range, tag: str) -> None:
    """The losses of training, where they were reported (processes may be ahead), and of the checkpoint at the end."""
    rows = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["train"] for row in rows if "train" in row}
    for step in losses.keys() & set(steps):
        assert losses[step] == pytest.approx(expected["train"][str(step)], rel=TOLERANCE), step
    end = evaluate(Exits(out / "checkpoint" / tag), held_out(4)).losses
    assert end == pytest.approx(expected[tag], rel=TOLERANCE)


@pytest.mark.parametrize("one_process", [False, True])
def test_it_resumes_as_it_would_have(tmp_path: Path, one_process: bool) -> None:
    """In processes, whose optimizer files are DeepSpeed's, and in one."""
    shutil.copytree(FOLDER / "checkpoint", tmp_path / "checkpoint")
    how = ("--one-process", "--stages", "3") if one_process else ()
    done = train("shared.json", tmp_path, "--steps", "6", "--resume", *how, processes=0 if one_process else 3)
    assert "resumes from global_step3" in done.stdout
    check(tmp_path, NUMBERS["shared"], range(4, 6), "global_step6")


def test_it_resumes_with_decay_on_matrices_alone(tmp_path: Path) -> None:
    """The default of today, whose optimizer has two groups instead of the checkpoint's one."""
    shutil.copytree(FOLDER / "checkpoint", tmp_path / "checkpoint")
    config = json.loads((FOLDER / "shared.json").read_text())
    del config["interlocking"]["decay"]
    (tmp_path / "today.json").write_text(json.dumps(config))
    done = train(tmp_path / "today.json", tmp_path, "--steps", "4", "--resume", "--one-process", "--stages", "3")
    assert "weight decay acts on matrices alone from here on" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    first = next(row["train"] for row in rows if row["step"] == 4 and "train" in row)
    assert first == pytest.approx(NUMBERS["shared"]["train"]["4"], rel=TOLERANCE), "before any step of its own"


def test_a_run_from_scratch_begins_with_the_same_weights_and_samples(tmp_path: Path) -> None:
    """Heads of low rank behind borrowed layers, on half of the positions, every third batch backpropagation."""
    train("borrowed.json", tmp_path, "--steps", "4", "--one-process", "--stages", "3")
    check(tmp_path, NUMBERS["borrowed"], range(1, 5), "global_step4")
