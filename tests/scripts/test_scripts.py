"""The scripts as a user runs them: real launcher, real text, wrong arguments."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ibp_deepspeed import InterlockingError
from tests.launch import free_port

pytestmark = pytest.mark.xdist_group("test_scripts")  # one worker: they share fixtures of the module

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = str(Path(sys.executable).with_name("deepspeed"))


def run(
    *command: object, timeout: float = 240, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    env = dict(os.environ, DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", **(environment or {}))
    env.setdefault("MASTER_PORT", free_port())  # for --one-process: another test could take one that it finds itself
    env.update(PATH=f"{Path(sys.executable).parent}:{env['PATH']}")
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)


def script(name: str, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, ROOT / "scripts" / name, *arguments, environment=environment)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small prepared corpus of real sources."""
    folder = tmp_path_factory.mktemp("prepared") / "data"
    done = script("prepare_data.py", "--out", folder, "--vocab-size", "512", "--max-bytes", "400000")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pairwise preset with smaller batches and its TensorBoard folder in a temporary place."""
    folder = tmp_path_factory.mktemp("config")
    settings = json.loads((ROOT / "ds_configs" / "pairwise_cpu.json").read_text())
    settings.update(train_micro_batch_size_per_gpu=2, gradient_accumulation_steps=2, steps_per_print=2)
    settings["interlocking"]["aux_head"] = {"readout": "shared", "blocks": 1, "refresh_interval": 2}
    settings["tensorboard"]["output_path"] = str(folder / "tensorboard")
    (folder / "pairwise.json").write_text(json.dumps(settings))
    return folder / "pairwise.json"


def changed(config: Path, path: Path, **interlocking: Any) -> Path:
    """A configuration with other options of interlocking, written to ``path``."""
    settings = json.loads(config.read_text())
    settings["interlocking"].update(interlocking)
    path.write_text(json.dumps(settings))
    return path


SMALL = ["--model", "models/configs/llama-tiny.json", "--sequence-length", "32", "--set", "num_hidden_layers=4"]


@pytest.fixture(scope="module")
def trained(data: Path, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight batches on two stages × two replicas through the deepspeed launcher."""
    out = tmp_path_factory.mktemp("run")
    done = run(
        *(LAUNCHER, "--num_accelerators", "4", "--master_port", free_port(), "scripts/train_lm.py", "--stages", "2"),
        *(
            "--deepspeed_config",
            config,
            "--data",
            data,
            "--steps",
            "8",
            "--eval-interval",
            "4",
            "--output",
            out,
            *SMALL,
        ),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 stages × 2 replicas" in done.stdout and "unigram entropy" in done.stdout
    assert re.search(r"readout \([\d,]+ bytes\) goes to all heads every 2 batches and is used 2 batches", done.stdout)
    return out


def test_training_leaves_history_scalars_and_a_checkpoint(trained: Path, config: Path) -> None:
    rows = [json.loads(line) for line in (trained / "history.jsonl").read_text().splitlines()]
    held_out = [row for row in rows if "held_out" in row]
    assert [row["step"] for row in held_out] == [4, 8]
    assert all(len(row.get("train", row.get("held_out"))) == 2 for row in rows)
    assert all(a > b for a, b in zip(held_out[0]["held_out"], held_out[1]["held_out"], strict=True)), "it learns"
    events = EventAccumulator(str(next((config.parent / "tensorboard").rglob("events.*")).parent))
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    wanted = {f"{kind}/Exits/stage_{k}_loss" for kind in ("Train", "Eval") for k in range(2)}
    wanted.add("Train/Readout/bytes_per_refresh")
    assert wanted <= scalars, scalars
    assert (trained / "checkpoint" / "latest").read_text() == "global_step8"


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


def test_evaluation_agrees_with_training(trained: Path, data: Path) -> None:
    """eval_batch in the pipeline and evaluate_lm.py in one process see the same held-out losses."""
    rows = [json.loads(line) for line in (trained / "history.jsonl").read_text().splitlines()]
    in_training = next(row["held_out"] for row in reversed(rows) if "held_out" in row)
    table = trained / "again.json"
    # 16 micro-batches of 2 on 2 replicas are the first 64 windows: 16 batches of 4
    script(
        "evaluate_lm.py",
        "--checkpoint",
        trained / "checkpoint",
        "--batch-size",
        "4",
        "--max-batches",
        "16",
        "--json",
        table,
    )
    alone = [row["loss"] for row in json.loads(table.read_text())["exits"]]
    assert alone == pytest.approx(in_training, rel=1e-5)


def test_torchrun_and_one_process_train_the_same(data: Path, config: Path, tmp_path: Path) -> None:
    """Two stages, heads behind borrowed layers, as processes and as virtual ones: the same losses, and files that
    evaluate alike."""
    borrowing = changed(config, tmp_path / "borrow.json", aux_head={"readout": "shared", "borrow": 1})
    words = ["scripts/train_lm.py", "--deepspeed_config", borrowing, "--data", data, "--steps", "3", *SMALL, "--output"]
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port())
    done = run(*torchrun, *words, tmp_path / "two")
    assert done.returncode == 0, done.stdout + done.stderr
    done = run(sys.executable, *words, tmp_path / "one", "--one-process", "--stages", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    ends = []
    for name in ("two", "one"):
        rows = [json.loads(line) for line in (tmp_path / name / "history.jsonl").read_text().splitlines()]
        ends.append([row["held_out"] for row in rows if "held_out" in row][-1])
        assert (tmp_path / name / "checkpoint" / "latest").read_text() == "global_step3"
    assert ends[0] == pytest.approx(ends[1], rel=1e-5)
    done = script("evaluate_lm.py", "--checkpoint", tmp_path / "one" / "checkpoint", "--max-batches", "2")
    assert done.returncode == 0, done.stderr


def test_a_resumed_run_is_the_same_bit_for_bit(data: Path, config: Path, tmp_path: Path) -> None:
    """Dropout, a shared readout on its way, streaming: three batches and three more are six."""
    gpt = ["--model", "models/configs/gpt2-tiny.json", "--sequence-length", "32"]
    gpt += ["--set", "n_layer=2", "resid_pdrop=0.1", "embd_pdrop=0.1", "--save-interval", "3", "--eval-interval", "4"]

    def train(out: Path, *more: str) -> subprocess.CompletedProcess[str]:
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
        where = ("--deepspeed_config", config, "--data", data, "--output", out)
        return run(sys.executable, *torchrun, "scripts/train_lm.py", *where, *gpt, *more)

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    done = train(whole, "--steps", "6", "--resume")
    assert done.returncode == 0 and "no checkpoint yet: starts anew" in done.stdout, done.stderr
    shutil.copytree(whole / "checkpoint" / "global_step3", stopped / "checkpoint" / "global_step3")
    (stopped / "checkpoint" / "latest").write_text("global_step3")
    shutil.copy(whole / "history.jsonl", stopped)
    done = train(stopped, "--steps", "6", "--resume", "--keep", "1")
    assert done.returncode == 0 and "goes on from global_step3" in done.stdout, done.stderr
    assert sorted(p.name for p in (stopped / "checkpoint").iterdir()) == ["global_step6", "latest"]
    ends = [out / "checkpoint" / "global_step6" for out in (whole, stopped)]
    names = sorted(path.name for path in ends[0].glob("*.pt"))
    assert names == sorted(path.name for path in ends[1].glob("*.pt")) and len(names) >= 9
    for name in names:
        one, other = (torch.load(end / name, weights_only=False) for end in ends)
        assert_same(one, other, name)
    steps = [json.loads(line)["step"] for line in (stopped / "history.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] == 6


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


def test_no_compiler_is_needed(data: Path, config: Path, tmp_path: Path) -> None:
    """Two stages on a path without c++ and ninja, nothing compiled before."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("bash", "sh", "env", "ls", "uname"):
        (folder / name).symlink_to(shutil.which(name) or f"/bin/{name}")
    command = [sys.executable, LAUNCHER, "--num_accelerators", "2", "--master_port", free_port(), "scripts/train_lm.py"]
    words = ["--deepspeed_config", config, "--data", data, "--steps", "2", "--output", tmp_path / "out", *SMALL]
    env = {
        "PATH": str(folder),
        "HOME": os.environ.get("HOME", "/"),
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
    }
    env |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([str(w) for w in [*command, *words]], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (done.stdout + done.stderr).count("no C++ compiler: gloo takes the place") == 1
    assert not (tmp_path / "extensions").exists()


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


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"interlocking": {"stratgy": "local"}}, 'unknown key "interlocking.stratgy" (did you mean "strategy"?)'),
        ({"interlocking": {"strategy": "nwise", "width": 0}}, "greater than or equal to 1, got 0"),
        ({"interlocking": {"strategy": "nwise", "width": -1}}, "got -1"),
        ({"settings": {"fp16": {"enabled": True}}}, "fp16 is not supported"),
        ({"settings": {"zero_optimization": {"stage": 3}}}, "ZeRO stage 3 does not work with pipelines"),
        ({"--stages": "3"}, "4 processes can't be divided into pipelines of 3 stages"),
        ({"--partition": "1,1,1"}, "[1, 1, 1]"),
        ({"--model": "nowhere.json"}, "no model config in 'nowhere.json'"),
        ({"--sequence-length": "100000"}, "is longer than the model's"),
        ({"--data": "nowhere"}, "nowhere"),
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
    spec = importlib.util.spec_from_file_location("train_lm", ROOT / "scripts" / "train_lm.py")
    assert spec is not None and spec.loader is not None
    train_lm = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "train_lm", train_lm)  # dataclasses look their module up
    spec.loader.exec_module(train_lm)
    with pytest.raises(InterlockingError) as caught:
        train_lm.check(train_lm.parse_arguments([str(word) for word in words]))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_one_sentence(done: subprocess.CompletedProcess[str], sentence: str) -> None:
    said = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert len(said) == 1 and sentence in said[0], done.stderr


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
    refusal(wrong(tmp_path, data, config, **{"--steps": "401", "--partition": "9"}), monkeypatch)
    assert "learning rate ends at batch 400, --steps is 401" in capsys.readouterr().err


def test_a_slow_mode_is_named(
    data: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for mode, warned in (("furthest", True), ("window", False)):
        slow = str(changed(config, tmp_path / "slow.json", mode=mode, aux_head={}))
        refusal(wrong(tmp_path, data, config, **{"--deepspeed_config": slow, "--partition": "9"}), monkeypatch)
        assert ('mode "furthest" at width 2 with linear heads' in capsys.readouterr().err) == warned


def test_an_error_is_printed_once_and_ends_the_process(data: Path, config: Path, tmp_path: Path) -> None:
    arguments = wrong(tmp_path, data, config, interlocking={"stratgy": "local"})
    done = script("train_lm.py", *arguments, RANK="0", WORLD_SIZE="4")
    assert_one_sentence(done, 'unknown key "interlocking.stratgy"')


def test_the_launcher_ends_with_one_sentence(data: Path, config: Path, tmp_path: Path) -> None:
    """Data shorter than one batch is known when the processes have met: rank 0 speaks, everybody ends."""
    huge = {"settings": {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 5000}}
    arguments = wrong(tmp_path, data, config, **huge)
    launcher = (LAUNCHER, "--num_accelerators", "2", "--master_port", free_port(), "scripts/train_lm.py")
    done = run(*launcher, *arguments, timeout=120)
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("error:")]
    assert done.returncode != 0 and len(said) == 1 and "a batch needs" in said[0], done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_help_and_no_launcher() -> None:
    names = ("train_lm.py", "evaluate_lm.py", "plot_losses.py", "generate.py", "prepare_data.py", "convert_hf.py")
    started = {n: subprocess.Popen([sys.executable, ROOT / "scripts" / n, "--help"], stdout=-1) for n in names}
    for name, process in started.items():
        assert b"usage:" in process.communicate()[0] and process.returncode == 0, name
    done = script("train_lm.py", "--deepspeed_config", "x", "--data", "x", "--model", "x")
    assert_one_sentence(done, "needs a launcher (deepspeed")
    done = script("train_lm.py", "--one-process", "--deepspeed_config", "x", "--data", "y", "--model", "z")
    assert_one_sentence(done, "--one-process needs --stages")
