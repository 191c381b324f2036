"""A profile is measured by its script, planned with, and trained with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ibp_deepspeed import InterlockingError
from ibp_deepspeed.commands.training.arguments import parse_arguments
from ibp_deepspeed.commands.training.plan import make_plan
from ibp_deepspeed.models import CausalLM, load_config
from ibp_deepspeed.planner.profile import Profile, read_profile, write_profile
from ibp_deepspeed.planner.workload import over_mean
from tests.commands import Done, assert_one_sentence, script
from tests.docs.test_pages import commands
from tests.forks import ROOT
from tests.scripts.settings import SMALL, changed
from tests.shared import Shared

GPT = "gpt2-tiny"
WORDS = (*SMALL, "vocab_size=512", "--micro-batch-size", 2, "--fp32")


@pytest.fixture(scope="session")
def measured(shared: Shared) -> Path:
    """What the training of the fixtures consists of."""

    def make(folder: Path) -> None:
        head = ("--head", "readout=shared", "blocks=1", "--repeats", 2)
        done = script("profile_stage.py", *WORDS, *head, "--out", folder / "profile.json")
        assert done.returncode == 0, done.stdout + done.stderr
        (folder / "shown.txt").write_text(done.stdout)

    return shared.folder("profile", make) / "profile.json"


def words(data: Path, config: Path, partition: str) -> list[str | Path]:
    """A training on two stages in one process."""
    where: list[str | Path] = ["--deepspeed_config", config, "--data", data, "--one-process", "--stages", "2"]
    return [*where, "--partition", partition, *SMALL]


def bounds(given: list[str | Path], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.chdir(ROOT)
    return make_plan(parse_arguments(None, [str(word) for word in given])).bounds


def slower(of: Profile, layer: int, factor: float) -> Profile:
    """The same but for one decoder layer."""
    values = of.model_dump()
    kind = next(piece for piece in values["pieces"] if layer in piece["layers"])
    other = json.loads(json.dumps(kind))
    kind["layers"].remove(layer)
    other["layers"] = [layer]
    for name in ("forward", "input_gradient", "weight_gradient", "backward"):
        other[name] = {key: factor * value for key, value in other[name].items()}
    values["pieces"].append(other)
    return Profile.model_validate(values)


def test_a_profile_is_whole_and_says_what_it_is_of(measured: Path) -> None:
    made, shown = read_profile(measured), (measured.parent / "shown.txt").read_text()
    assert [(piece.name, piece.layers) for piece in made.pieces] == [
        ("embedding", [0]),
        ("decoder layer 1", [1, 2, 3, 4]),
        ("last layer and loss", [5]),
    ]
    for piece in (*made.pieces, made.head):
        assert piece.name in shown and piece.forward.low <= piece.forward.median <= piece.forward.high
        assert piece.forward.low > 0 and piece.backward.low > 0 and piece.parameters > 0 and piece.peak is None
    layer, head = made.pieces[1], made.head
    assert layer.weight_gradient.low > 0 and layer.kept > made.message_bytes == 2 * 32 * 128 * 4
    assert head.trained == head.parameters - 512 * 128, "a copied LM head is not trained"
    assert made.subject.config["vocab_size"] == 512 and made.subject.head["blocks"] == 1 and made.memory is None
    assert made.message is not None and made.message.size == made.message_bytes
    assert made.message.backend == "gloo" and "over gloo" in shown and f"wrote {measured}" in shown


def test_training_is_cut_by_a_profile(
    measured: Path, data: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow first layer stands alone, a slow last one too."""
    made = read_profile(measured)
    write_profile(slower(made, 1, 100.0), tmp_path / "first.json")
    write_profile(slower(made, 4, 100.0), tmp_path / "last.json")
    assert bounds(words(data, config, f"profile:{tmp_path / 'first.json'}"), monkeypatch) == [0, 2, 6]
    assert bounds(words(data, config, f"profile:{tmp_path / 'last.json'}"), monkeypatch) == [0, 4, 6]
    done = script(
        "train_lm.py",
        *words(data, config, f"profile:{tmp_path / 'first.json'}"),
        *("--steps", 1, "--eval-micro-batches", 1, "--output", tmp_path / "run"),
    )
    assert done.returncode == 0 and "layers [0, 2, 6]" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("--sequence-length", "64"), "with sequence length 32, here it is 64"),
        (("--set", "num_hidden_layers=6"), "with num_hidden_layers 4, here it is 6"),
        (("--partition", "profile:nowhere.json"), "the profile nowhere.json can't be read"),
        (("--partition", "profil:x.json"), "--partition profil:x.json: write decoder layers of each stage as numbers"),
    ],
)
def test_training_refuses_another_profile(
    change: tuple[str, str], sentence: str, measured: Path, data: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InterlockingError) as caught:
        bounds([*words(data, config, f"profile:{measured}"), *change], monkeypatch)
    said = str(caught.value)
    assert sentence in said and "\n" not in said
    if "measured with" in said:
        assert f"--set {change[1] if change[0] == '--set' else 'num_hidden_layers=4'} vocab_size=512 " in said, (
            "the vocabulary is that of the data, which the command must name"
        )


def test_a_training_without_heads_takes_any_head(
    measured: Path, data: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one with others does not."""
    alone = changed(config, tmp_path / "alone.json", strategy="global", exits=2, aux_head=None)
    assert len(bounds(words(data, alone, f"profile:{measured}"), monkeypatch)) == 3
    other = changed(config, tmp_path / "other.json", aux_head={"rank": 8})
    with pytest.raises(InterlockingError, match="with the head's readout shared, here it is private"):
        bounds(words(data, other, f"profile:{measured}"), monkeypatch)


def plan(*more: object) -> Done:
    return script("plan.py", *WORDS, "--stages", 2, "--head", "readout=shared", "blocks=1", *more)


def test_a_plan_takes_times_and_messages_from_the_profile(measured: Path, tmp_path: Path) -> None:
    made, target = read_profile(measured), tmp_path / "plan.json"
    done = plan("--profile", measured, "--micro-batches", 1, "--json", target)
    assert done.returncode == 0, done.stderr
    assert f"{made.device}: measured, {measured} (float32" in done.stdout
    assert "messages inside a host too (over gloo)" in done.stdout and "balanced by parameters" in done.stdout
    rows = {row["candidate"]["name"]: row for row in json.loads(target.read_text())["rows"]}
    assert made.message is not None
    computing = sum(layer.total + layer.at_once for layer in made.workload().layers)
    link = made.message.link().boundary(made.message_bytes)
    assert rows["1F1B"]["batch_time"] == pytest.approx(computing + 2 * (link.latency + link.sending))
    assert plan("--partition", f"profile:{measured}", "--micro-batches", 1).stdout == done.stdout
    other = plan("--profile", measured, "--gbps", 100, "--micro-batches", 1)
    assert other.returncode == 0 and "messages inside" not in other.stdout


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--device", "A100"), "--device A100 and the profile"),
        (("--reached", "0.4"), "--reached 0.4 and the profile"),
        (("--partition", "profile:other.json"), "give one profile"),
        (("--micro-batch-size", "4"), "with micro-batch size 2, here it is 4: measure again with python scripts/"),
        (("--head", "rank=8"), "with the head's readout shared, here it is private"),
    ],
)
def test_a_plan_refuses_what_does_not_fit_the_profile(more: tuple[str, str], sentence: str, measured: Path) -> None:
    assert_one_sentence(plan("--profile", measured, *more), sentence)


def test_the_pages_commands_measure_and_plan(tmp_path: Path) -> None:
    found = [words for words in commands("planning.md") if "profile.json" in words]
    assert [words[1] for words in found] == ["scripts/profile_stage.py", "scripts/plan.py"]
    measuring, planning = ([words[1].removeprefix("scripts/"), *words[2:]] for words in found)
    done = script(*measuring, "--repeats", 1, folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    done = script(*planning, folder=tmp_path)
    assert done.returncode == 0 and "measured, profile.json" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--repeats", "0"), "--repeats is 0: give at least 1"),
        (("--out", "nowhere/p.json"), "there is no folder nowhere to write p.json to"),
        (("--head", "borrow=1"), "have a row of their own"),
        (("--sequence-length", "-1"), "--sequence-length is -1: give at least 1"),
        (("--sequence-length", "1024"), "--sequence-length 1024 is longer than the model's 512 positions"),
        (("--set", "hidden_sizes=3"), "has no 'hidden_sizes' to override"),
    ],
)
def test_wrong_arguments_are_one_sentence(more: tuple[str, str], sentence: str) -> None:
    assert_one_sentence(script("profile_stage.py", "--model", GPT, *more), sentence)


def test_a_measured_gpt_with_a_real_vocabulary_is_shared_evenly(tmp_path: Path) -> None:
    """Twelve layers and 32k tokens: by the measured times no stage is more than 10% over the mean."""
    sizes = ("n_layer=12", "vocab_size=32000", "n_embd=64")
    shape = ("--sequence-length", 32, "--repeats", 3, "--fp32", "--out", tmp_path / "gpt.json")
    done = script("profile_stage.py", "--model", GPT, "--set", *sizes, *shape)
    assert done.returncode == 0, done.stdout + done.stderr
    work = read_profile(tmp_path / "gpt.json").workload()
    given: Any = {"n_layer": 12, "vocab_size": 32_000, "n_embd": 64}
    model = CausalLM(load_config(GPT, **given))
    assert over_mean(work.layers, model.partition(2, measured=work), work.head, range(2)) <= 0.10
