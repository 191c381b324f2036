"""--data with several sources: trained on several stages and replicas, resumed, evaluated, reported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ibp_deepspeed.commands.reporting.history import History
from ibp_deepspeed.commands.training.arguments import Source, parse_arguments
from ibp_deepspeed.data import DataError
from ibp_deepspeed.models.errors import ModelError
from ibp_deepspeed.models.runs.description import Description
from tests.commands import deepspeed, script
from tests.scripts.settings import SMALL
from tests.scripts.test_resume import plan, words


@pytest.fixture(scope="module")
def other(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other text, prepared with the tokenizer of the first."""
    folder = tmp_path_factory.mktemp("other")
    (folder / "poems.txt").write_text(
        "\n\n".join(f"{i} green bottles, hanging on the wall " * (i % 9) for i in range(400))
    )
    prepared = ("--input", folder / "poems.txt", "--tokenizer", data / "tokenizer", "--out", folder / "poems")
    done = script("prepare_data.py", *prepared)
    assert done.returncode == 0, done.stderr
    return folder / "poems"


def mixed(data: Path, other: Path, weights: tuple[float, float] = (0.7, 0.3)) -> list[str]:
    return [f"{data}={weights[0]}", f"{other}={weights[1]}"]


def parsed(*folders: str) -> Any:
    return parse_arguments(None, ["--deepspeed_config", "c", "--model", "m", "--data", *folders])


def test_one_folder_is_a_folder_and_several_have_weights() -> None:
    assert parsed("a=b/c").data == Path("a=b/c") and parsed("a=b/c").mixture == [Source(Path("a=b/c"), None)]
    args = parsed("a/b=0.7", "c=3")
    assert args.data == Path("a/b") and args.mixture == [Source(Path("a/b"), 0.7), Source(Path("c"), 3.0)]


def test_two_sources_train_on_two_stages_and_resume_and_are_evaluated(
    data: Path, other: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two replicas in the first half, one process with half the batch in the second."""
    base = ["--deepspeed_config", config, "--data", *mixed(data, other), *SMALL, "--eval-micro-batches", 2]
    done = deepspeed(4, "scripts/train_lm.py", "--stages", 2, *base, "--steps", 3, "--output", tmp_path / "two")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "data: a mixture of 70.0% data, 30.0% poems" in done.stdout
    sizes = ("--micro-batch-size", 4) if False else ()
    more = ("--resume", "--allow-changed", "batch-size", *sizes)
    done = script(
        "train_lm.py", "--one-process", "--stages", 2, *base, "--steps", 5, "--output", tmp_path / "two", *more
    )
    assert done.returncode == 0, done.stderr
    drawn = History.read(tmp_path / "two").drawn
    assert [step for step, _ in drawn] == [1, 2, 3, 4, 5]
    assert all(list(tokens) == ["data", "poems"] for _, tokens in drawn)
    position = json.loads((tmp_path / "two" / "checkpoint" / "global_step5" / "data_position.json").read_text())
    assert position == {"epoch": 0, "samples": 3 * 8 + 2 * 4}
    totals = History.read(tmp_path / "two").drawn_tokens()
    page = (tmp_path / "two" / "run_report.html").read_text()
    assert all(f"{tokens:,}" in page and f"tokens of {name}" in page for name, tokens in totals.items())
    description = Description.read(tmp_path / "two" / "checkpoint" / "global_step5")
    assert description.mixture == {str(data): 0.7, str(other): 0.3}
    done = script("evaluate_lm.py", "--checkpoint", tmp_path / "two" / "checkpoint", "--max-batches", 2)
    assert done.returncode == 0, done.stderr
    given = words(config, data, tmp_path / "two", "--steps", "9", "--allow-changed", "batch-size")
    at = given.index("--data") + 1
    with pytest.raises(ModelError, match="was trained with data of checksum"):
        plan(monkeypatch, [*given[:at], *mixed(data, other, (0.6, 0.4)), *given[at + 1 :]])
    same = plan(monkeypatch, [*given[:at], *mixed(data, other), *given[at + 1 :]])
    assert same.mixture is not None and same.mixture.counts(512).sum() > 0


def test_what_can_not_be_mixed_is_refused_before_a_process_starts(
    data: Path, other: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = words(config, data, tmp_path / "new")
    at = given.index("--data") + 1
    foreign = Path(shutil.copytree(other, tmp_path / "foreign"))
    with (foreign / "tokenizer" / "tokenizer.json").open("a") as file:
        file.write("\n")
    for sources, said in (
        ([str(data), f"{other}=1"], f"--data {data} has no weight, and there are several: write --data"),
        ([f"{data}=1", f"{data}=2"], f"--data names {data} twice"),
        ([f"{data}=1", f"{foreign}=1"], f"{foreign} was made with another tokenizer than {data}: prepare it again"),
        ([f"{data}=1", f"{other}=-1"], "the weight of poems is -1.0: give a positive number"),
        ([f"{data}=1", f"{tmp_path / 'absent'}=1"], f"{tmp_path / 'absent'} is not a folder"),
    ):
        with pytest.raises(DataError) as caught:
            plan(monkeypatch, [*given[:at], *sources, *given[at + 1 :]])
        assert said in str(caught.value) and "\n" not in str(caught.value)
