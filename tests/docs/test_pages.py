"""The commands of pages on Hugging Face, exits, vision, checkpoints and data, run in their order on small models."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from ibp_deepspeed.data.tokenizer import train_tokenizer
from ibp_deepspeed.models import load_config
from tests.commands import script
from tests.forks import ROOT
from tests.prepared_data import DOCUMENTS

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
LAUNCHER = ["deepspeed", "--num_accelerators"]


def commands(page: str) -> list[list[str]]:
    """The words of all commands in the page's bash blocks, continued lines joined, comments left out."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    lines = "\n".join(re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def at_small_size(words: list[str]) -> list[str]:
    """Stages in one process, which saves their start, and short trainings on little text."""
    if words[:2] == LAUNCHER:
        words = ["python", *words[3:], "--one-process", "--stages", words[2]]
    if words[1] == "scripts/train_lm.py":
        words += ["--sequence-length", "32", "--eval-micro-batches", "2"]
        for option in {"--steps", "--save-interval"} & set(words):
            value = words.index(option) + 1
            words[value] = str(int(words[value]) // 100)
    if words[1] == "scripts/train_vision.py":
        value = words.index("--steps") + 1
        words[value] = str(int(words[value]) // 100)
    if words[1] == "scripts/prepare_data.py" and "--dialogues" not in words:
        words += ["--max-bytes", "200000"]
    if words[1] == "scripts/evaluate_lm.py" or "--all-exits" in words:
        words += ["--max-batches", "2"]
    return [words[1].removeprefix("scripts/"), *words[2:]]


def run_page(page: str, folder: Path) -> str:
    """All commands of a page in ``folder``; returns what they print."""
    if not (folder / "ds_configs").exists():
        (folder / "ds_configs").symlink_to(ROOT / "ds_configs")
    printed = []
    for words in commands(page):
        done = script(*at_small_size(words), folder=folder)
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}{done.stderr}"
        printed.append(done.stdout)
    return "\n".join(printed)


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A Llama of four layers with a tokenizer that has a chat template, and rows to tune it on."""
    folder = tmp_path / "path" / "to" / "model"
    config = load_config("llama-tiny", vocab_size=400, num_hidden_layers=4)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer = train_tokenizer(DOCUMENTS, 400)
    tokenizer._tokenizer.chat_template = TEMPLATE
    tokenizer.save(folder)
    rows = [{"prompt": f"What is {i} + {i}?", "response": f"It is {2 * i}."} for i in range(300)]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def test_commands_of_the_hugging_face_and_exits_pages(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    printed = run_page("huggingface.md", tmp_path)
    assert "begins with the weights of path/to/model" in printed and "| exit | decoder layers |" in printed
    family = json.loads((tmp_path / "runs/tuned/family/exits.json").read_text())
    evaluated = re.findall(r"^ +(?:exit \d|model) +([\d.]+)", printed, flags=re.MULTILINE)
    assert [f"{row['loss']:.4f}" for row in family] == evaluated[-4:], (
        "the table of evaluate_lm.py, after training's own"
    )
    assert "loads with PeftModel.from_pretrained onto path/to/model" in printed
    assert "nothing to train but a head" in printed
    for folder, layers in (("hf", 4), ("half", 2), ("family/exit-1", 1), ("family/exit-4", 4)):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "runs/tuned" / folder)
        assert model.config.num_hidden_layers == layers
        assert (tmp_path / "runs/tuned" / folder / "README.md").exists()
    check_exits_page(tmp_path, monkeypatch, capfd)


def test_commands_of_the_first_hour(hub: Path, tmp_path: Path) -> None:
    """From a model to its exits, then the recipes."""
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    printed = run_page("quickstart.md", tmp_path)
    assert "begins with the weights of path/to/model, heads as its final norm and LM head" in printed
    for folder in ("walk/family/exit-1", "walk/family/exit-4", "adapters/peft"):
        assert list((tmp_path / "runs" / folder).glob("*.safetensors"))
    assert "| 4 | 4 |" in printed and "runs/local" in printed


def check_exits_page(folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """It goes on where the other page ends; its code writes what its drafting command prints."""
    printed = run_page("exits.md", folder)
    assert "99% agree" in printed and "early exit is drawn in runs/tuned/early_exit.png" in printed
    rows = json.loads((folder / "runs/tuned/exits.json").read_text())["exits"]
    assert [row["agreement"] for row in rows][-1] == 1.0 and all(0 <= row["calibration_error"] <= 1 for row in rows)
    monkeypatch.chdir(folder)
    text = (ROOT / "docs" / "exits.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    capfd.readouterr()
    exec(compile(code, "docs/exits.md", "exec"), {})
    own = capfd.readouterr().out
    assert own.startswith("def main(") and printed.endswith(own)


def test_commands_of_the_data_page(tmp_path: Path) -> None:
    """Three sources, mixed."""
    (tmp_path / "notes").mkdir()
    for number, text in enumerate(DOCUMENTS):
        (tmp_path / "notes" / f"{number}.txt").write_text(text)
    (tmp_path / "path" / "to" / "set").mkdir(parents=True)
    rows = (json.dumps({"body": text, "number": n}) for n, text in enumerate(DOCUMENTS))
    (tmp_path / "path" / "to" / "set" / "train.jsonl").write_text("\n".join(rows))
    printed = run_page("data.md", tmp_path)
    assert "data: a mixture of 70.0% code, 20.0% notes, 10.0% set" in printed
    assert "documents: packed whole into samples, and masked from each other (default)" in printed
    history = (tmp_path / "runs/mixed/history.jsonl").read_text().splitlines()
    drawn = [row["drawn"] for row in map(json.loads, history) if "drawn" in row]
    assert [list(tokens) for tokens in drawn] == [["code", "notes", "set"]] * 3


def test_commands_of_the_vision_page(tmp_path: Path) -> None:
    """A residual network and a vision Transformer learn digits; evaluation and export are of the first."""
    printed = run_page("vision.md", tmp_path)
    assert "accuracies" in printed and "every key there, the same logits" in printed
    assert (tmp_path / "runs/digits/hf/preprocessor_config.json").exists() and (
        tmp_path / "runs/vit/checkpoint"
    ).exists()


def test_commands_of_the_checkpoints_page(tmp_path: Path) -> None:
    """Training, resuming, and resuming in two other shapes."""
    printed = run_page("checkpoints.md", tmp_path)
    assert "resumes from global_step2" in printed and "resumes from global_step4" in printed
    lines = [line for line in printed.splitlines() if line.startswith("head before layer")]
    assert lines == [
        "head before layer 5: from the checkpoint",
        "head before layer 3: dropped, none stands there now",
        "head before layer 7: dropped, none stands there now",
        "head before layer 3: from the head before layer 5",
        "head before layer 5: from the checkpoint",
        "head before layer 7: from the head before layer 5",
    ]
    names = sorted(path.name for path in (tmp_path / "runs/first/checkpoint").iterdir())
    assert names == ["global_step4", "global_step5", "latest"]
    rows = [json.loads(line) for line in (tmp_path / "runs/first/history.jsonl").read_text().splitlines()]
    held_out = {row["step"]: len(row["held_out"]) for row in rows if "held_out" in row}
    assert held_out == {2: 4, 3: 4, 4: 2, 5: 4}
