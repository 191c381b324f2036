"""A run that is resumed trains the same, or says what is otherwise."""

from __future__ import annotations

import hashlib
import json
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from ibp_deepspeed import VirtualPipeline, measures
from ibp_deepspeed.commands.reporting.history import History
from ibp_deepspeed.commands.training.arguments import parse_arguments
from ibp_deepspeed.commands.training.checkpoints import resume, set_position
from ibp_deepspeed.commands.training.plan import Plan, make_plan
from ibp_deepspeed.data import MicroBatchLoader, open_tokens
from ibp_deepspeed.models.errors import ModelError
from ibp_deepspeed.models.runs.conditions import Changes
from tests.commands import script
from tests.forks import ROOT
from tests.scripts.settings import SMALL
from tests.single_process.test_virtual_pipeline import make
from tests.toys import micro_batches

TAG = "global_step8"


@pytest.fixture
def used(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained run."""
    return Path(shutil.copytree(trained, tmp_path / "used"))


def words(config: Path, data: Path, output: Path, *more: object) -> list[str]:
    given = ["--deepspeed_config", config, "--data", data, "--output", output, *SMALL, "--resume", *more]
    return [str(word) for word in given]


def plan(monkeypatch: pytest.MonkeyPatch, given: list[str]) -> Plan:
    """What rank 0 of 4 would do on two stages."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.chdir(ROOT)
    return make_plan(parse_arguments(None, [*given, "--stages", "2"]))


def test_another_training_is_refused_by_name_before_the_processes_meet(
    used: Path, data: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = plan(monkeypatch, words(config, data, used, "--steps", 8 + 1))
    assert same.resume == TAG and same.changes is not None
    assert [line.split('"')[1] for line in same.changes.lines] == ["scheduler.params.total_num_steps"]
    other = shutil.copytree(data, tmp_path / "other")
    with (other / "tokenizer" / "tokenizer.json").open("a") as file:
        file.write("\n")
    manifest = json.loads((other / "manifest.json").read_text())
    content = bytearray((other / "train.bin").read_bytes())
    content[0:2], content[2:4] = content[2:4], content[0:2]
    (other / "train.bin").write_bytes(content)
    manifest["train"]["sha256"] = hashlib.sha256(content).hexdigest()
    (other / "manifest.json").write_text(json.dumps(manifest))
    for given, said in (
        (words(config, data, used, "--seed", 5), "was trained with seed 0, not 5: resume with the same"),
        (
            words(config, other, used),
            "with data of checksum .*, tokenizer of checksum .* --allow-changed data tokenizer",
        ),
        (words(config, data, used, "--sequence-length", 16), "sequence-length 32, not 16"),
        (words(config, data, tmp_path / "new")[:-1] + ["--allow-changed", "seed"], "goes together with --resume"),
    ):
        with pytest.raises(ModelError, match=said) as caught:
            plan(monkeypatch, [*given, "--steps", "9"])
        assert "\n" not in str(caught.value)


def test_what_is_allowed_is_announced_and_done(used: Path, data: Path, config: Path) -> None:
    """One process goes on with half the batch, another seed, and another learning rate, which counts at once."""
    more = ("--one-process", "--stages", 2, "--steps", 10, "--seed", 7, "--learning-rate", 0.004, "--warmup-steps", 1)
    allowed = ("--allow-changed", "seed", "batch-size", "--eval-micro-batches", 0)
    done = script("train_lm.py", *words(config, data, used, *more, *allowed))
    assert done.returncode == 0, done.stderr
    for line in (
        f"resumes from {TAG}",
        "seed is 7, was 0: the rest of this epoch comes in another order",
        "batch-size is 4 (2 micro-batches of 2 samples × 1 replicas), was 8 (2 micro-batches of 2 samples × 2",
        f'since {TAG}: "optimizer.params.lr" is 0.004, was 0.00195',
        f'since {TAG}: "scheduler.params.total_num_steps" is 10, was 8',
    ):
        assert line in done.stdout, done.stdout
    rates = History.read(used).of_stage(0, measures.LEARNING_RATE)
    assert rates[0][-1] == 10 and rates[1][-1] == pytest.approx(decayed(10, 10, 0.004), rel=1e-6), rates
    position = json.loads((used / "checkpoint" / "global_step10" / "data_position.json").read_text())
    assert position == {"epoch": 0, "samples": 8 * 8 + 2 * 4}
    again = script("train_lm.py", *words(config, data, used, *more, *allowed))
    assert again.returncode == 0 and "has 10 batches of 10" in again.stdout


def decayed(batch: int, steps: int, rate: float) -> float:
    """The presets' WarmupStableDecayLR, which as DeepSpeed's schedules is a batch behind."""
    return rate * min(1.0, (steps - (batch - 2)) / round(steps / 4))


@pytest.mark.parametrize(("restarts", "samples"), [(False, 40), (True, 0)])
def test_an_epoch_of_other_samples_begins_again(restarts: bool, samples: int, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint" / TAG
    folder.mkdir(parents=True)
    (folder / "data_position.json").write_text(json.dumps({"epoch": 3, "samples": 40}))
    loader = MicroBatchLoader(open_tokens(data, "train", verify=False), 32, 4)
    changed: Any = Namespace(resume=TAG, changes=Changes(restarts_epoch=restarts))
    set_position(loader, changed, Namespace(output=tmp_path))
    assert loader.state_dict() == {"epoch": 3, "samples": samples}


@pytest.mark.parametrize("scheduled", [False, True])
def test_settings_of_the_optimizer_that_were_changed_count(scheduled: bool, tmp_path: Path) -> None:
    """Those alone: a rate that a user set by hand, and did not change in the configuration, goes on."""
    schedule: dict[str, Any] = {}
    if scheduled:
        schedule = {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.5, "warmup_num_steps": 4}}}

    def pipeline(**params: Any) -> VirtualPipeline:
        return make(optimizer={"type": "AdamW", "params": {"lr": 0.1, **params}}, **schedule)

    one = pipeline()
    for batch in range(6):
        one.train_batch(iter(micro_batches(batch, 1)))
    for optimizer in one.optimizers:
        optimizer.param_groups[0]["eps"] = 1e-3
    one.save_checkpoint(tmp_path / "checkpoint")
    other = pipeline(lr=0.3, weight_decay=0.2)
    changes = Changes(optimizer=frozenset({"lr", "weight_decay"}), schedule=True)
    given: Any = Namespace(resume="global_step6", changes=changes)
    resume(other, given, Namespace(output=tmp_path, resume="auto"))
    for optimizer in other.optimizers:
        decays = [group["weight_decay"] for group in optimizer.param_groups]
        assert decays == [0.2, 0.0] and optimizer.param_groups[0]["eps"] == 1e-3
        assert {group["lr"] for group in optimizer.param_groups} == {0.5 if scheduled else 0.3}
