"""train_vision.py and evaluate_vision.py as a user runs them, on scikit-learn's digits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification

from ibp_deepspeed.models.vision.cifar_resnet import register
from tests.commands import assert_one_sentence, ranks, script
from tests.forks import ROOT

SMALL = ["--model", "resnet-digits", "--set", "depths=[1,1,1]", "--data", "digits", "--image-size", "8"]
BATCH = ["--micro-batch-size", "16", "--gradient-accumulation-steps", "2", "--deepspeed_config", "vision_pairwise"]
TRAINING = [*SMALL, *BATCH, "--eval-interval", "3", "--eval-micro-batches", "4"]


def rows(run: Path, key: str) -> list[dict[str, Any]]:
    lines = (run / "history.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if key in row]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six batches by two processes, saved after every third."""
    run = tmp_path_factory.mktemp("vision") / "run"
    done = ranks(2, "train_vision.py", *TRAINING, "--steps", "6", "--save-interval", "3", "--output", run)
    assert done.returncode == 0, done.stderr
    assert "images: 1,618 to train on, 179 held out, 10 classes, made 8 × 8 (digits)" in done.stdout
    assert "accuracies" in done.stdout and "images/s a process" in done.stdout
    return run


def test_a_run_has_accuracies_of_all_exits_and_a_page(trained: Path) -> None:
    held_out = rows(trained, "held_out")
    assert [row["step"] for row in held_out] == [3, 6]
    assert all(len(row["accuracy"]) == 2 and min(row["accuracy"]) >= 0 for row in held_out)
    page = (trained / "run_report.html").read_text()
    assert "Held-out accuracy of the exits" in page and "class frequencies" in page and "per token" not in page
    record = json.loads((trained / "run.json").read_text())
    assert record["counted"] == "images" and record["tokens_per_batch"] == 32 and len(record["costs"]) == 2


def test_processes_and_one_process_train_the_same(trained: Path, tmp_path: Path) -> None:
    """Images, crops, losses and running statistics: the same held-out losses and accuracies in fp32."""
    one = tmp_path / "one"
    done = script("train_vision.py", *TRAINING, "--steps", "6", "--output", one, "--one-process", "--stages", "2")
    assert done.returncode == 0, done.stderr
    for ours, theirs in zip(rows(one, "held_out"), rows(trained, "held_out"), strict=True):
        assert ours["held_out"] == pytest.approx(theirs["held_out"], rel=1e-4)
        assert ours["accuracy"] == theirs["accuracy"] and ours["images"] == theirs["images"]


def test_a_resumed_run_is_the_uninterrupted_one(trained: Path, tmp_path: Path) -> None:
    """From batch 3, by one process: the same images, crops and rates follow. Other crops are refused."""
    run = tmp_path / "resumed"
    shutil.copytree(trained / "checkpoint" / "global_step3", run / "checkpoint" / "global_step3")
    (run / "checkpoint" / "latest").write_text("global_step3")
    same = [*TRAINING, "--steps", "6", "--output", run, "--one-process", "--stages", "2", "--resume"]
    assert_one_sentence(script("train_vision.py", *same, "--augment", "flip"), "was trained with data of checksum")
    done = script("train_vision.py", *same)
    assert done.returncode == 0 and "resumes from global_step3" in done.stdout, done.stderr
    (ours,), theirs = rows(run, "held_out"), rows(trained, "held_out")[-1]
    assert ours["held_out"] == pytest.approx(theirs["held_out"], rel=1e-4)


def test_the_checkpoint_evaluates_and_exports_as_it_was_trained(trained: Path, tmp_path: Path) -> None:
    table, folder = tmp_path / "exits.json", tmp_path / "hf"
    words = ["--checkpoint", trained / "checkpoint", "--max-batches", "1", "--json", table, "--export", folder]
    done = script("evaluate_vision.py", *words)
    assert done.returncode == 0, done.stderr
    exits, last = json.loads(table.read_text())["exits"], rows(trained, "held_out")[-1]
    assert [row["loss"] for row in exits] == pytest.approx(last["held_out"], rel=1e-5)
    assert [row["accuracy"] for row in exits] == pytest.approx(last["accuracy"])
    register()
    model, info = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()) and model.config.id2label[3] == "3"
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    assert processor["size"] == {"height": 8, "width": 8} and len(processor["image_mean"]) == 1
    assert AutoImageProcessor.from_pretrained(folder).size.height == 8
    assert_one_sentence(script("evaluate_vision.py", *words), "exists already")


def test_a_vision_transformer_trains_saves_and_exports(tmp_path: Path) -> None:
    run, folder = tmp_path / "run", tmp_path / "hf"
    words = ["--model", "vit-digits", "--set", "num_hidden_layers=3", "--data", "digits", "--image-size", "16"]
    options = ["--one-process", "--stages", "3", "--steps", "2", "--output", run, "--learning-rate", "0.01"]
    done = script("train_vision.py", *words, *BATCH, *options)
    assert done.returncode == 0, done.stderr
    done = script("evaluate_vision.py", "--checkpoint", run / "checkpoint", "--max-batches", "1", "--export", folder)
    assert done.returncode == 0, done.stderr
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert model(torch.zeros(1, 1, 16, 16)).logits.shape == (1, 10)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "vit-digits", "--set"], "images are 8 × 8, the model takes 16: --set image_size=8"),
        (["--model", "llama-tiny", "--set"], "has no 'num_channels'"),
        (["--partition", "1,1,9"], "does not fit 2 stages of a model with 3 blocks"),
        (["--partition", "profile:x"], "profiles are of language models"),
        (["--data", "nowhere"], "--data nowhere is no folder"),
        (["--micro-batch-size", "2000"], "digits has 1618 images, a batch needs 4000"),
        (["--warmup-steps", "5"], '"scheduler.params.warmup_num_steps"'),
    ],
)
def test_a_mistake_is_one_sentence(words: list[str], said: str, tmp_path: Path) -> None:
    options = ["--one-process", "--stages", "2", "--steps", "1", "--output", tmp_path / "run"]
    done = script("train_vision.py", *SMALL, *BATCH, *options, *words)
    assert_one_sentence(done, said)


def test_another_number_of_stages_goes_on(trained: Path, tmp_path: Path) -> None:
    """Layers keep weights and statistics; a head of other maps is a new one."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    more = ["--steps", "7", "--output", run, "--one-process", "--stages", "3", "--resume"]
    done = script("train_vision.py", *TRAINING, *more)
    assert done.returncode == 0 and "head before layer" in done.stdout, done.stdout + done.stderr
    assert len(rows(run, "held_out")[-1]["accuracy"]) == 3


def test_checkpoints_of_the_other_kind_are_refused(trained: Path) -> None:
    for command in (["evaluate_lm.py"], ["convert_hf.py", "export", "--out", trained / "out"]):
        done = script(*command, "--checkpoint", trained / "checkpoint")
        assert_one_sentence(done, "is of an image classifier: evaluate_vision.py reads and exports it")
    earlier = ROOT / "tests/checkpoint/earlier_run/checkpoint/global_step3"
    assert_one_sentence(
        script("evaluate_vision.py", "--checkpoint", earlier), "of a language model: use evaluate_lm.py"
    )
