"""What the training script refuses: a sentence before the processes meet, or one from all of them together."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from ibp_deepspeed import InterlockingError
from ibp_deepspeed.commands.training.arguments import parse_arguments
from ibp_deepspeed.commands.training.plan import make_plan
from ibp_deepspeed.commands.training.sources import say_sources
from tests.commands import assert_one_sentence, deepspeed, real, script
from tests.forks import ROOT
from tests.scripts.settings import SMALL, changed


def wrong(tmp_path: Path, data: Path, config: Path, **changes: Any) -> list[str | Path]:
    """Arguments with one thing wrong; ``interlocking`` changes the configuration's block, ``settings`` the rest."""
    settings = json.loads(config.read_text())
    settings["interlocking"] = changes.pop("interlocking", settings["interlocking"])
    settings.update(changes.pop("settings", {}))
    (tmp_path / "config.json").write_text(json.dumps(settings))
    options = {"--deepspeed_config": tmp_path / "config.json", "--data": data, "--output": tmp_path / "out"}
    options |= dict(zip(SMALL[:4:2], SMALL[1:4:2], strict=True)) | changes
    return [word for pair in options.items() for word in pair] + SMALL[4:]


def truncated(data: Path, tmp_path: Path, keep: int | None) -> Path:
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    if keep is None:
        (copy / "train.bin").unlink()
    else:
        os.truncate(copy / "train.bin", keep)
    return copy


def optimizer(**params: Any) -> dict[str, Any]:
    """DeepSpeed's block of AdamW with these parameters."""
    return {"optimizer": {"type": "AdamW", "params": params}}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"interlocking": {"stratgy": "local"}}, 'unknown key "interlocking.stratgy" (did you mean "strategy"?)'),
        ({"interlocking": {"strategy": "nwise", "width": 0}}, "greater than or equal to 1, got 0"),
        ({"interlocking": {"strategy": "nwise", "width": -1}}, "got -1"),
        ({"interlocking": {"exits": [1, 7]}}, '"interlocking.exits" names stage 7, the 4 stages are 0 … 3'),
        ({"interlocking": {"strategy": "nwise", "width": 2, "mode": "sum"}}, 'mode "sum" is for width 4 or more'),
        (
            {"interlocking": {"strategy": "global", "mode": "sum", "exits": 2, "exit_weights": [1, 1, 1]}},
            '"interlocking.exit_weights" has 3 values for the 2 exits on 4 stages',
        ),
        ({"interlocking": {"strategy": "global", "channel_depth": 1}}, '"interlocking.channel_depth" is 1, the least'),
        ({"interlocking": {"strategy": "local", "aux_head": None}}, "needs a head for every exit"),
        (
            {"interlocking": {"strategy": "local", "aux_head": {"negatives": 99999}}},
            '"aux_head.negatives" is 99999, the vocabulary has',
        ),
        (
            {"settings": {"scheduler": {"type": "WarmupStableDecayLR", "params": {"total_num_steps": 9, "decay": 2}}}},
            "unexpected keyword argument 'decay'",
        ),
        ({"settings": {"fp16": {"enabled": True}}}, "fp16 is not supported"),
        ({"settings": {"zero_optimization": {"stage": 3}}}, "ZeRO stage 3 does not work with pipelines"),
        ({"--stages": "0"}, "--stages is 0: give at least 1, or leave it out"),
        ({"--stages": "-2"}, "--stages is -2: give at least 1"),
        ({"--steps": "-3"}, "--steps is -3: give a larger one"),
        ({"--eval-interval": "-1"}, "--eval-interval is -1: give 0 or more"),
        ({"--keep": "0", "--save-interval": "0"}, "--keep is 0: keep at least 1 checkpoint"),
        ({"settings": {"optimizer": {"type": "AdmW"}}}, '"optimizer.type" is \'AdmW\' (did you mean "AdamW"?)'),
        (
            {"settings": {"optimizer": {"params": {"lr": 1e-3}}}},
            '"optimizer" names no type, so nothing',
        ),
        (
            {"settings": {"optimizer": {"type": "Muon", "params": {"muon_lr": 0.02}}}},
            '"optimizer.params.muon_lr" is a rate of DeepSpeed\'s own Muon',
        ),
        ({"settings": {"optimizer": None}}, '"optimizer" must be an object, not None'),
        ({"settings": optimizer(torch_adam=True, beta=[0.9, 0.95])}, "unexpected keyword argument 'beta'"),
        ({"settings": optimizer(beta=[0.9, 0.95])}, "unexpected keyword argument 'beta'"),
        ({"settings": optimizer(torch_adam=True, betas=[0.9, 1.5])}, "Invalid beta parameter at index 1: 1.5"),
        ({"settings": optimizer(lr="2e-3")}, "\"optimizer.params.lr\" is '2e-3': give a number"),
        ({"settings": {"train_batch_size": 7}}, '"train_batch_size" 7, "train_micro_batch_size_per_gpu" 2'),
        (
            {"settings": {"gradient_accumulation_steps": 0}},
            '"gradient_accumulation_steps" is 0: give a whole number',
        ),
        (
            {"settings": {"wandb": {"enabled": True}}},
            '"wandb" is enabled and wandb is not installed: pip',
        ),
        ({"settings": {"comet": {"enabled": True}}}, '"comet" is enabled and comet_ml is not installed'),
        ({"settings": {"tensorboard": {"enabled": "maybe"}}}, 'DeepSpeed refuses "tensorboard.enabled" of the conf'),
        ({"settings": {"gradient_clipping": "much"}}, "\"gradient_clipping\" is 'much': give a number"),
        ({"settings": {"zero_optimization": {"stage": "auto"}}}, '"zero_optimization.stage" is "auto", which nothing'),
        ({"--stages": "3"}, "4 processes can't be divided into pipelines of 3 stages"),
        ({"--partition": "1,1,1"}, "[1, 1, 1]"),
        ({"--model": "nowhere.json"}, "no model config in 'nowhere.json'"),
        ({"--sequence-length": "100000"}, "is longer than the model's"),
        ({"--data": "nowhere"}, "nowhere"),
        ({"--steps": "0"}, "--steps is 0: give a larger one"),
        ({"--learning-rate": "-1"}, "--learning-rate is -1.0: give a larger one"),
        (
            {"--micro-batch-size": "3"},
            '--micro-batch-size is 3, the configuration\'s "train_micro_batch_size_per_gpu" 2',
        ),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_refused_before_the_processes_meet(
    changes: dict[str, Any], sentence: str, data: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sentence in refusal(wrong(tmp_path, data, config, **changes), monkeypatch)


def refusal(words: list[str | Path], monkeypatch: pytest.MonkeyPatch) -> str:
    """What rank 0 of 4 would say about a command line, in one sentence."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.chdir(ROOT)
    with pytest.raises(InterlockingError) as caught:
        make_plan(parse_arguments(None, [str(word) for word in words]))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_damaged_data_and_too_small_vocabularies(
    data: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for keep, sentence in ((100, "truncated"), (None, "train.bin")):
        copy = truncated(data, tmp_path, keep)
        assert sentence in refusal(wrong(tmp_path, copy, config), monkeypatch)
        shutil.rmtree(copy)
    copy = truncated(data, tmp_path, (data / "train.bin").stat().st_size)
    with (copy / "train.bin").open("r+b") as file:
        file.write(b"\x01\x01\x01\x01")
    assert "content changed" in refusal(wrong(tmp_path, copy, config), monkeypatch)
    small = [*wrong(tmp_path, data, config), "vocab_size=300"]  # the words end with those of --set
    assert "300" in refusal(small, monkeypatch)
    shallow = [*wrong(tmp_path, data, config), "num_hidden_layers=3"]
    assert "4 stages do not fit a model with 3 decoder layers" in refusal(shallow, monkeypatch)


def test_a_learning_rate_that_ends_too_early_is_named(
    data: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scheduler = {"type": "WarmupCosineLR", "params": {"total_num_steps": 400}}
    words = {"settings": {"scheduler": scheduler}, "--steps": "401", "--partition": "9"}
    refusal(wrong(tmp_path, data, config, **words), monkeypatch)
    assert "learning rate ends at batch 400, --steps is 401" in capsys.readouterr().err


def test_a_key_that_does_nothing_is_named(
    data: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {"settings": {"gradient_cliping": 1.0}, "--partition": "9"}
    refusal(wrong(tmp_path, data, config, **words), monkeypatch)
    assert 'nobody reads "gradient_cliping" (did you mean "gradient_clipping"?)' in capsys.readouterr().err


def test_who_said_what_comes_first(
    data: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a configuration without the block, and of one process that a launcher started alone."""
    bare = {"train_micro_batch_size_per_gpu": "auto", "optimizer": {"type": "SGD", "params": {"lr": "auto"}}}
    (tmp_path / "bare.json").write_text(json.dumps(bare))
    words = ["--deepspeed_config", tmp_path / "bare.json", "--data", data, "--learning-rate", "0.5", *SMALL[:4]]
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.chdir(ROOT)
    args = parse_arguments(None, [str(word) for word in words])
    say_sources(make_plan(args), args)
    said = capsys.readouterr()
    assert said.out.splitlines() == [
        f'strategy: pairwise, mode furthest (defaults: {tmp_path / "bare.json"} has no "interlocking" block)',
        "stages: 1 (a process each); replicas: 1 (1 processes)",
        "batch: 8 samples: 1 micro-batches (default) of 8 samples (default of --micro-batch-size) in each replica",
        "learning rate: 0.5 (--learning-rate)",
        f"vocabulary: 512 tokens ({data}, in the place of the 4,096 of {SMALL[1]})",
        "documents: packed whole into samples, and masked from each other (default)",
    ]
    assert "one process was started, which is one stage" in said.err and "--num_accelerators K" in said.err
    args = parse_arguments(None, [str(word) for word in wrong(tmp_path, data, config)])
    monkeypatch.setenv("WORLD_SIZE", "4")
    say_sources(make_plan(args), args)
    said = capsys.readouterr()
    assert f"strategy: pairwise, mode window ({tmp_path / 'config.json'})\nstages: 4 (a process each);" in said.out
    assert f"2 samples ({tmp_path / 'config.json'})" in said.out and not said.err


def test_rows_that_leave_nothing_to_evaluate_name_the_option(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: Path
) -> None:
    """Ten rows, one of which is held out; their responses are too far behind."""
    rows = [{"prompt": "why " * 90 + str(i), "response": "because"} for i in range(10)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--input", tmp_path / "rows.jsonl", "--tokenizer", data / "tokenizer", "--out", tmp_path / "rows"]
    done = script("prepare_data.py", "--dialogues", *words)
    assert done.returncode == 0 and "held-out: 1 rows" in done.stdout, done.stdout + done.stderr
    said = refusal(wrong(tmp_path, tmp_path / "rows", config), monkeypatch)
    assert "heldout.bin has 0 rows with a response" in said and "prepare_data.py --held-out-fraction" in said


def test_a_slow_mode_is_named(
    data: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for mode, exits, warned in (("furthest", "every", True), ("window", "every", False), ("furthest", 2, False)):
        slow = str(changed(config, tmp_path / "slow.json", mode=mode, exits=exits, aux_head={}))
        refusal(wrong(tmp_path, data, config, **{"--deepspeed_config": slow, "--partition": "9"}), monkeypatch)
        assert ('mode "furthest" at width 2 with linear heads' in capsys.readouterr().err) == warned


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("generate.py", "--tokens", "-1"), "--tokens is -1: give at least 1"),
        (("generate.py", "--temperature", "-1"), "--temperature is -1: give 0"),
        (("generate.py", "--device", "cuda"), "--device cuda can't be used here"),
        (("generate.py", "--prompt", ""), "--prompt '' has no tokens to continue: give some text"),
        (("generate.py", "--draft-exit", "2"), "--draft-exit 2 drafts for exit 2: give a smaller one"),
        (("generate.py", "--draft-exit", "7"), "has no exit 7: its exits are 1, 2"),
        (("generate.py", "--draft-exit", "1", "--temperature", "1"), "--temperature is 1: a draft is for greedy"),
        (("evaluate_lm.py", "--device", "gpu"), "--device gpu can't be used here"),
        (("evaluate_lm.py", "--json", "nowhere/exits.json"), "there is no folder nowhere to write exits.json to"),
        (("evaluate_lm.py", "--json", "docs"), "docs is a folder: give a file"),
        (("evaluate_lm.py", "--figure", "nowhere/early.png"), "there is no folder nowhere to write early.png to"),
        (("convert_hf.py", "export", "--out", "x", "--shard-size", "banana"), "--shard-size banana: write a number"),
    ],
)
def test_other_scripts_refuse_in_one_sentence(words: tuple[str, ...], sentence: str, trained: Path) -> None:
    assert_one_sentence(script(*words, "--checkpoint", trained / "checkpoint"), sentence)


def test_a_taken_port_is_named(data: Path, config: Path, tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        job = {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_PORT": port,
            "TORCHELASTIC_USE_AGENT_STORE": "False",
        }
        done = real(sys.executable, "scripts/train_lm.py", *wrong(tmp_path, data, config), environment=job)
    assert_one_sentence(done, f"port {port}, where the processes are to meet, is taken")
    assert "--master_port" in done.stderr


def test_an_error_is_printed_once_and_ends_the_process(data: Path, config: Path, tmp_path: Path) -> None:
    arguments = wrong(tmp_path, data, config, interlocking={"stratgy": "local"})
    done = real(sys.executable, "scripts/train_lm.py", *arguments, environment={"RANK": "0", "WORLD_SIZE": "4"})
    assert_one_sentence(done, 'unknown key "interlocking.stratgy"')


def test_the_launcher_ends_with_one_sentence(data: Path, config: Path, tmp_path: Path) -> None:
    """Data shorter than one batch is known when the processes have met: rank 0 speaks, everybody ends."""
    huge = {"settings": {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 5000}}
    arguments = wrong(tmp_path, data, config, **huge)
    done = deepspeed(2, "scripts/train_lm.py", *arguments, timeout=120)
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("error:")]
    assert done.returncode != 0 and len(said) == 1 and "a batch needs" in said[0], done.stdout + done.stderr
    assert "Traceback" not in done.stderr
