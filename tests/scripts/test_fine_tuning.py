"""From a Hugging Face folder through training on processes and back: the scripts as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ibp_deepspeed.data import HeldOut, open_tokens
from ibp_deepspeed.models import load_config
from tests.commands import assert_one_sentence, ranks, script
from tests.forks import ROOT
from tests.models.test_causal_lm import perturbed

SEQUENCE = 32
PRESET = ROOT / "ds_configs" / "pairwise_cpu.json"
ALONE = ["--one-process", "--stages", "2", "--sequence-length", str(SEQUENCE), "--micro-batch-size", "8"]
ALONE += ["--gradient-accumulation-steps", "1", "--eval-interval", "0", "--eval-micro-batches", "1"]


@pytest.fixture(scope="module")
def hub(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied GPT-2 in several shards, with the tokenizer of the data."""
    folder = tmp_path_factory.mktemp("hub") / "model"
    config = load_config("gpt2-tiny", vocab_size=512, n_layer=3, tie_word_embeddings=True)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    perturbed([model])
    model.save_pretrained(folder, max_shard_size="500KB")
    AutoTokenizer.from_pretrained(data / "tokenizer").save_pretrained(folder)
    return folder


def config(folder: Path, rate: float) -> Path:
    """Pairwise with private heads on small batches."""
    settings = json.loads((ROOT / "ds_configs" / "pairwise_cpu.json").read_text())
    settings.update(train_micro_batch_size_per_gpu=2, gradient_accumulation_steps=2)
    settings["optimizer"]["params"]["lr"] = rate
    settings["interlocking"]["aux_head"] = {}
    del settings["scheduler"], settings["tensorboard"]
    (folder / "config.json").write_text(json.dumps(settings))
    return folder / "config.json"


def held_out_loss(model: PreTrainedModel, data: Path, micro_batches: int) -> float:
    tokens = open_tokens(data, "heldout")
    held_out = HeldOut(tokens, SEQUENCE, 2, samples=2 * micro_batches, document_masks=False)
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(model(ids).logits.flatten(0, 1), labels.flatten()).item()
            for ids, labels, _ in held_out
        ]
    return sum(losses) / len(losses)


def test_processes_read_their_own_layers_and_change_nothing_at_rate_zero(hub: Path, data: Path, tmp_path: Path) -> None:
    """Two real stages: the last exit has the loss of the model in the folder, and the export its weights."""
    words = ["--init-from", hub, "--data", data, "--sequence-length", str(SEQUENCE), "--eval-micro-batches", "4"]
    words += ["--no-document-masks"]
    out = tmp_path / "run"
    where = ("--deepspeed_config", config(tmp_path, 0.0), "--output", out)
    done = ranks(2, "train_lm.py", *where, *words, "--steps", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"begins with the weights of {hub}, heads as its final norm and LM head" in done.stdout
    assert "the LM head is not tied to the embedding" in done.stdout
    model = AutoModelForCausalLM.from_pretrained(hub).eval()
    rows = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    held_out = next(row["held_out"] for row in rows if "held_out" in row)
    assert held_out[-1] == pytest.approx(held_out_loss(model, data, 4), rel=1e-5)
    done = script("convert_hf.py", "export", "--checkpoint", out / "checkpoint", "--out", tmp_path / "hf")
    assert done.returncode == 0, done.stderr
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    want = model.state_dict()
    assert all(torch.equal(value, want[name]) for name, value in back.state_dict().items())
    assert (tmp_path / "hf" / "generation_config.json").exists()
    done = script("convert_hf.py", "export", "--checkpoint", out / "checkpoint", "--exit", "1", "--out", tmp_path / "e")
    assert done.returncode == 0 and "exit 1 of 2" in done.stdout, done.stderr
    first = AutoModelForCausalLM.from_pretrained(tmp_path / "e").eval()
    assert held_out_loss(first, data, 4) == pytest.approx(held_out[0], rel=1e-5)


def test_wrong_starts_are_one_sentence(hub: Path, data: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    assert script("prepare_data.py", "--out", other, "--vocab-size", "400", "--max-bytes", "100000").returncode == 0
    words: list[str | Path] = [
        "--one-process",
        "--stages",
        "2",
        "--deepspeed_config",
        config(tmp_path, 1e-3),
        "--sequence-length",
        "32",
    ]

    def refused(sentence: str, *more: str | Path) -> None:
        assert_one_sentence(script("train_lm.py", *words, "--output", tmp_path / "out", *more), sentence)

    refused("were made with another tokenizer than the model's", "--init-from", hub, "--data", other)
    refused("is no folder, and can't be had from the hub", "--init-from", tmp_path / "nowhere", "--data", data)
    refused(
        "weight transformer.wte.weight of (512, 128), the model's is (512, 64)",
        "--init-from",
        hub,
        "--data",
        data,
        "--set",
        "n_embd=64",
    )
    assert not (tmp_path / "out" / "checkpoint").exists()


@pytest.fixture(scope="module")
def pretrained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers that has learned something of the sources."""
    out = tmp_path_factory.mktemp("pretrained")
    words = ("--model", "llama-tiny", "--set", "num_hidden_layers=2", "--steps", 160)
    done = script("train_lm.py", *ALONE, "--deepspeed_config", PRESET, "--data", data, "--output", out, *words)
    assert done.returncode == 0, done.stderr
    return out / "checkpoint"


def loss_on(data: Path, checkpoint: Path) -> float:
    """Of the whole model, held out."""
    table = checkpoint.parent / f"{data.name}.json"
    done = script("evaluate_lm.py", "--checkpoint", checkpoint, "--data", data, "--max-batches", 12, "--json", table)
    assert done.returncode == 0, done.stderr
    return float(json.loads(table.read_text())["exits"][-1]["loss"])


def test_the_rate_of_fine_tuning_keeps_what_that_of_training_destroys(
    pretrained: Path, data: Path, tmp_path: Path
) -> None:
    """One seed, on other text, the documents; at the rate of random weights the sources are forgotten."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for page in (ROOT / "docs").glob("*.md"):
        (texts / f"{page.stem}.txt").write_text(page.read_text())
    words: list[object] = ["--input", texts, "--tokenizer", data / "tokenizer", "--held-out-fraction", "0.2"]
    assert script("prepare_data.py", *words, "--out", tmp_path / "pages").returncode == 0
    before = {text: loss_on(text, pretrained) for text in (data, tmp_path / "pages")}
    after = {}
    for name, more in (("finetune", ()), ("pairwise", ("--learning-rate", "2e-3"))):
        where = ("--init-from", pretrained, "--data", tmp_path / "pages", "--output", tmp_path / name, "--steps", 40)
        preset = ROOT / "ds_configs" / f"{name}_cpu.json"
        done = script("train_lm.py", *ALONE, "--deepspeed_config", preset, *where, *more)
        assert done.returncode == 0, done.stderr
        after[name] = {text: loss_on(text, tmp_path / name / "checkpoint") for text in before}
    kept, lost = (after[name][data] - before[data] for name in ("finetune", "pairwise"))
    assert after["finetune"][tmp_path / "pages"] < before[tmp_path / "pages"], (before, after)
    assert lost > 0.1 and kept < lost / 3, (before, after)
