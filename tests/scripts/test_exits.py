"""Exits on some stages, as a user of the scripts meets them: what is shown, written, exported, and resumed."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from tests.commands import Done, assert_one_sentence, ranks, script
from tests.forks import ROOT
from tests.scripts.settings import SMALL, changed
from tests.shared import Shared

FOUR = ("--one-process", "--stages", 4)


def train(config: Path, data: Path, out: Path, *more: object) -> Done:
    """All stages in one process."""
    words = ("--deepspeed_config", config, "--data", data, "--output", out, "--eval-micro-batches", 3, *SMALL)
    done = script("train_lm.py", *words, *FOUR, *more)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="session")
def half(config: Path, data: Path, shared: Shared) -> Path:
    """Four batches on four stages, of which the second and the last have a loss."""

    def make(folder: Path) -> None:
        block = {"strategy": "local", "exits": 2, "aux_head": {}}
        half = changed(config, folder / "half.json", **block)
        settings = json.loads(half.read_text())
        settings["tensorboard"]["output_path"] = str(folder / "tensorboard")
        half.write_text(json.dumps(settings))
        done = train(half, data, folder / "run", "--steps", 4, "--eval-interval", 2)
        assert "exits 2, 4 of 4 have a loss\n" in done.stdout
        assert "nan" not in done.stdout + done.stderr
        lines = done.stdout.splitlines()
        table = [line.split()[:2] for line in lines[lines.index(next(x for x in lines if "perplexity" in x)) :]]
        assert [row[0] for row in table[1:4]] == ["exit", "model", "unigrams"] and table[1][1] == "2"

    return shared.folder("half", make) / "run"


def test_stages_without_a_loss_are_null_in_the_history_and_nowhere_else(half: Path) -> None:
    def no_constant(name: str) -> float:
        raise AssertionError(f"{name} is no JSON")

    lines = (half / "history.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=no_constant) for line in lines]
    for row in rows:
        losses = row.get("train") or row.get("held_out") or [stage.get("loss") for stage in row["stages"]]
        assert [loss is None for loss in losses] == [True, False, True, False], row
    events = EventAccumulator(str(next((half.parent / "tensorboard").rglob("events.*")).parent))
    events.Reload()
    names = ("Train/stage {}/loss", "Eval/stage {}/held-out loss (nats per token)")
    wanted = {name.format(k) for name in names for k in (1, 3)}
    found = {tag for tag in events.Tags()["scalars"] if re.search(r"/(held-out )?loss", tag)}
    assert found == wanted
    assert all(math.isfinite(event.value) for tag in found for event in events.Scalars(tag))


def test_a_model_that_is_larger_than_the_memory(half: Path, tmp_path: Path) -> None:
    """The same table, an export that is written layer by layer, and text with layers left in its files."""
    where, little = ("--checkpoint", half / "checkpoint"), ("--memory-gib", 1e-3)
    ways = [script("evaluate_lm.py", *where, "--max-batches", 2, *more).stdout for more in ((), little)]
    assert ways[0] == ways[1] and "model" in ways[0]
    done = script(
        "convert_hf.py", "export", *where, "--all-exits", "--max-batches", 1, *little, "--out", tmp_path / "f"
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "f" / "exit-4" / "model.safetensors.index.json").exists()
    rows = json.loads((tmp_path / "f" / "exits.json").read_text())
    assert [row["tokens_per_second"] for row in rows] == [None, None] and "| – |" in done.stdout
    greedy = ("generate.py", "--temperature", 0, "--tokens", 4)
    whole = script(*greedy, *where)
    assert script(*greedy, "--model", tmp_path / "f" / "exit-4", *little).stdout == whole.stdout != ""
    assert script(*greedy, "--model", tmp_path / "f", *little).stdout == whole.stdout
    assert_one_sentence(script(*greedy, *where, *little), "takes more than half of 0.001 GiB (--memory-gib): write it")
    for name in (("evaluate_lm.py", *where), ("convert_hf.py", "export", *where, "--out", tmp_path / "no"), greedy[:1]):
        source = where if name == greedy[:1] else ()
        assert_one_sentence(script(*name, *source, "--memory-gib", 0), "--memory-gib is 0: give more than 0")


def test_exits_that_there_are_and_are_not(half: Path, tmp_path: Path) -> None:
    where, table = ("--checkpoint", half / "checkpoint"), tmp_path / "exits.json"
    picture = tmp_path / "early.png"
    done = script("evaluate_lm.py", *where, "--max-batches", 2, "--json", table, "--figure", picture)
    assert done.returncode == 0, done.stderr
    found = json.loads(table.read_text())
    assert [row["exit"] for row in found["exits"]] == [2, 4]
    assert found["exits"][0]["agreement"] < found["exits"][1]["agreement"] == 1
    assert found["early_exit"][0]["saved"] == 0.5, "of two exits all leave at the first, behind half of the layers"
    assert "95% agree" in done.stdout and "layers saved" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG") and f"early exit is drawn in {picture}" in done.stdout
    for name in (("generate.py",), ("convert_hf.py", "export", "--out", tmp_path / "none")):
        assert_one_sentence(script(*name, *where, "--exit", 3), "has no exit 3: its exits are 2, 4 (the last one is")
    assert not (tmp_path / "none").exists()
    done = script("generate.py", *where, "--exit", 2, "--tokens", 4)
    assert done.returncode == 0 and done.stdout.startswith("import "), done.stderr
    family = tmp_path / "family"
    done = script("convert_hf.py", "export", *where, "--all-exits", "--max-batches", 2, "--out", family)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in family.iterdir() if path.is_dir()) == ["exit-2", "exit-4"]
    card = (family / "exit-2" / "README.md").read_text()
    assert "exits 2, 4 have a loss" in card and "| exits | 2, 4 |" in card
    card = (family / "README.md").read_text()
    assert "| 2 | 2 |" in card and 'subfolder="exit-2"' in card and "exits 2, 4 have a loss" in card
    rows = json.loads((family / "exits.json").read_text())
    shared = [(row["exit"], row["folder"], row["layers"], row["shared_layers"]) for row in rows]
    assert shared == [(2, "exit-2", 2, 2), (4, "exit-4", 4, 4)]
    check_family(half / "checkpoint", family)
    check_drafts(half / "checkpoint", family)


def check_family(checkpoint: Path, family: Path) -> None:
    """generate.py and transformers find an exit in it, and say when there is none."""
    words = ("--exit", 2, "--temperature", 0, "--tokens", 8)
    shown = [
        script("generate.py", *where, *words).stdout for where in (("--checkpoint", checkpoint), ("--model", family))
    ]
    assert shown[0] == shown[1] and shown[0]
    model = AutoModelForCausalLM.from_pretrained(family, subfolder="exit-2")
    assert model.config.num_hidden_layers == 2
    assert_one_sentence(
        script("generate.py", "--model", family, "--exit", 3), "no exit 3: its exits are 2, 4 (the last"
    )
    one = ("--model", family / "exit-4")
    assert_one_sentence(script("generate.py", *one, "--draft-exit", 1), "exit-4 is one model: give")
    assert_one_sentence(
        script("generate.py", "--model", family, "--draft-exit", 4), "drafts for exit 4: give a smaller"
    )
    text = (family / "exits.json").read_text()
    (family / "exits.json").write_text(text.replace("shared_layers", "layers_shared"))
    assert_one_sentence(script("generate.py", "--model", family), "is no family of exits: exits.json can't be read")
    (family / "exits.json").write_text(text)


def check_drafts(checkpoint: Path, family: Path) -> None:
    """By an exit of a checkpoint and by an export: the text of greedy decoding, and a line on what it brought."""
    plain = script("generate.py", "--checkpoint", checkpoint, "--temperature", 0, "--tokens", 12)
    by_exit = ("--checkpoint", checkpoint, "--draft-exit", 2)
    of_family = ("--model", family, "--draft-exit", 2)
    by_export = ("--model", family, "--draft-model", family / "exit-2")
    for words, name in (
        (by_exit, "draft by exit 2"),
        (of_family, "draft by exit 2"),
        (by_export, str(family / "exit-2")),
    ):
        done = script("generate.py", *words, "--tokens", 12)
        assert done.returncode == 0 and done.stdout == plain.stdout, done.stderr
        counted = (
            rf"{name}: (\d+) of (\d+) drafted tokens accepted(?: \(\d+%\))?, (\d+) passes of the model for 12 tokens "
        )
        found = re.search(counted, done.stderr)
        assert found is not None and "without it: the same tokens" in done.stderr, done.stderr
        accepted, drafted, passes = map(int, found.groups())
        assert accepted + passes == 12 and accepted <= drafted
        assert drafted or "--draft-exit" in words, "an exit of a model that has learned little is not sure of anything"


def test_other_exits_and_the_sum_of_all_when_a_run_goes_on(
    half: Path, config: Path, data: Path, tmp_path: Path
) -> None:
    """A head that comes says where from, one that goes says so; curves and comparison know both."""
    out = tmp_path / "run"
    every = changed(config, tmp_path / "every.json", strategy="local", aux_head={})
    weighted = {"strategy": "global", "mode": "sum", "exits": 2, "exit_weights": [0.3, 1.0]}
    everything = changed(config, tmp_path / "sum.json", aux_head={}, **weighted)
    modules = changed(config, tmp_path / "modules.json", strategy="local", exits=4, aux_head={"negatives": 50})
    train(every, data, out, "--steps", 2)
    gone = [f"head before layer {boundary}: dropped, none stands there now" for boundary in (2, 4)]
    done = train(everything, data, out, "--steps", 3, "--resume")
    assert lines_of_heads(done) == ["head before layer 3: from the checkpoint", *gone]
    done = train(every, data, out, "--steps", 4, "--resume")
    assert lines_of_heads(done)[::2] == [f"head before layer {b}: from the head before layer 3" for b in (2, 4)]
    done = script("evaluate_lm.py", "--checkpoint", out / "checkpoint", "--max-batches", 2)
    assert done.returncode == 0 and all(f"exit {k} " in done.stdout for k in (1, 2, 3)), done.stdout
    done = train(modules, data, out, "--steps", 5, "--resume")
    assert "the last of the 4 stages is the only exit: this is backpropagation\n" in done.stdout
    done = train(everything, data, out, "--steps", 6, "--resume")
    assert lines_of_heads(done) == ["head before layer 3: from the model's LM head"]
    for folder in (out, half):
        done = script("plot_losses.py", "--run", folder, "--out", tmp_path / "losses.png")
        assert done.returncode == 0 and not done.stderr, done.stderr
    done = script("compare_runs.py", half, out)
    assert "local, N = 1 of 2 exits " in done.stdout and "global, N = 2 of 2 exits, sum " in done.stdout, done.stderr


def lines_of_heads(done: Done) -> list[str]:
    """What a run says of them as it resumes."""
    return [line for line in done.stdout.splitlines() if line.startswith("head before")]


def test_modules_on_two_processes_are_backpropagation(data: Path, tmp_path: Path) -> None:
    """The preset, which leaves all sizes to the command line; one line says it."""
    settings = json.loads((ROOT / "ds_configs" / "modules_cpu.json").read_text())
    settings["tensorboard"]["enabled"] = False
    (tmp_path / "modules.json").write_text(json.dumps(settings))
    words = (
        "--deepspeed_config",
        tmp_path / "modules.json",
        "--data",
        data,
        "--steps",
        2,
        "--output",
        tmp_path,
        *SMALL,
    )
    sizes = ("--micro-batch-size", 2, "--gradient-accumulation-steps", 2, "--eval-micro-batches", 2)
    done = ranks(2, "train_lm.py", *words, *sizes)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the last of the 2 stages is the only exit: this is backpropagation\n") == 1
