"""Adapters and frozen layers, from the command line to peft and back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from ibp_deepspeed.checkpoint.tensor_file import read
from ibp_deepspeed.models import load_config
from ibp_deepspeed.models.exits.exits import Exits
from tests.commands import assert_one_sentence, ranks, script
from tests.models.test_causal_lm import perturbed
from tests.scripts.test_fine_tuning import config

SHORT = ["--sequence-length", "32", "--eval-interval", "0", "--eval-micro-batches", "1", "--steps", "3"]
LORA = ["--lora", "rank=4,alpha=8"]


def save_base(folder: Path, data: Path, name: str = "llama-tiny", seed: int = 1) -> Path:
    values = {"n_layer": 4} if "gpt2" in name else {"num_hidden_layers": 4}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(load_config(name, vocab_size=512, tie_word_embeddings=True, **values))
    perturbed([model])
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(data / "tokenizer").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of four layers."""
    return save_base(tmp_path_factory.mktemp("base") / "model", data)


def train(data: Path, base: Path, out: Path, *more: object, processes: int = 1) -> Any:
    """Two stages; the rate is large, so that adapters are far from nothing after three batches."""
    where = ("--deepspeed_config", config(out.parent, 0.02), "--output", out, "--data", data, "--init-from", base)
    if processes > 1:
        return ranks(processes, "train_lm.py", *where, *SHORT, *more)
    return script("train_lm.py", "--one-process", "--stages", "2", *where, *SHORT, *more)


@pytest.fixture(scope="module")
def trained(data: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters that two processes have trained."""
    out = tmp_path_factory.mktemp("lora") / "run"
    done = train(data, base, out, *LORA, processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "of rank=4 alpha=8 dropout=0.0 targets=('q_proj', 'v_proj')" in done.stdout, done.stdout
    return out


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(512, (2, 24), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model.eval()(ids).logits


def test_a_checkpoint_holds_adapters_alone_and_says_whose(trained: Path, base: Path) -> None:
    folder = trained / "checkpoint" / "global_step3"
    layers = {path.name: read(path) for path in sorted(folder.glob("layer_*"))}
    names = [name for state in layers.values() for name in state]
    assert len(layers) == 6 and len(names) == 4 * 2 * 2 and all(".lora_" in name for name in names)
    about = json.loads((folder / "interlocked_model.json").read_text())
    assert about["init_from"] == str(base) and len(about["tuning"]["base"]) == 16
    optimizer = read(folder / "mp_rank_00_model_states.pt")
    trained_names = [name for name in optimizer["parameter_names"] if not name.startswith("head")]
    assert len(trained_names) == 8 and all(".lora_" in name for name in trained_names)


def test_processes_train_the_adapters_that_one_process_trains(
    trained: Path, data: Path, base: Path, tmp_path: Path
) -> None:
    """Which is plain autograd; and adapters can be trained on that checkpoint, with its own in the weights."""
    done = train(data, base, tmp_path / "run", *LORA)
    assert done.returncode == 0, done.stderr
    for path in sorted((trained / "checkpoint" / "global_step3").glob("layer_*")):
        alone = read(tmp_path / "run" / "checkpoint" / "global_step3" / path.name.replace("model_00-", ""))
        for name, value in read(path).items():
            assert (value - alone[name]).norm() <= 1e-4 * value.norm(), (path.name, name)
    done = train(data, trained / "checkpoint", tmp_path / "more", "--lora", "--freeze", "embedding,layers.0-2")
    assert done.returncode == 0, done.stderr
    where = ("--checkpoint", tmp_path / "more" / "checkpoint", "--out", tmp_path / "hf")
    assert_one_sentence(script("convert_hf.py", "export", *where, "--adapter"), "belong to the checkpoint")
    done = script("convert_hf.py", "export", *where)
    assert done.returncode == 0, done.stderr


def test_peft_loads_the_adapters_and_the_merged_model_is_the_same(trained: Path, base: Path, tmp_path: Path) -> None:
    where = ("--checkpoint", trained / "checkpoint")
    done = script("convert_hf.py", "export", *where, "--adapter", "--out", tmp_path / "adapter")
    assert done.returncode == 0 and "loads with PeftModel.from_pretrained" in done.stdout, done.stdout + done.stderr
    done = script("convert_hf.py", "export", *where, "--out", tmp_path / "merged")
    assert done.returncode == 0, done.stderr
    original = AutoModelForCausalLM.from_pretrained(base)
    before = logits(original)
    adapted = logits(PeftModel.from_pretrained(original, str(tmp_path / "adapter")))
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert (adapted - before).abs().max() > 1e-2, "the training has changed something"
    close = 1e-5 * adapted.abs().max().item()
    torch.testing.assert_close(merged, adapted, rtol=0, atol=close)
    exits = Exits(trained / "checkpoint")
    ids = torch.randint(512, (2, 24), generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(exits.lazy_logits(ids, 2).materialize(), adapted, rtol=0, atol=close)
    done = script("convert_hf.py", "export", *where, "--exit", "1", "--out", tmp_path / "half")
    assert done.returncode == 0, done.stderr
    done = script("evaluate_lm.py", *where, "--max-batches", "1")
    assert done.returncode == 0, done.stderr


def test_resumed_adapters_are_those_of_an_uninterrupted_training(data: Path, base: Path, tmp_path: Path) -> None:
    """In one process, with a frozen layer; the checkpoint is resumed in another shape too."""
    more = ("--lora", "rank=4,targets=all-linear", "--freeze", "1")
    whole, parts = tmp_path / "a" / "run", tmp_path / "b" / "run"
    for out in (whole, parts):
        out.parent.mkdir()
    assert train(data, base, whole, *more).returncode == 0
    assert train(data, base, parts, *more, "--steps", "2").returncode == 0
    done = train(data, base, parts, *more, "--resume")
    assert done.returncode == 0 and "resumes from global_step2" in done.stdout, done.stderr
    for path in sorted((whole / "checkpoint" / "global_step3").glob("layer_*")):
        ours = read(parts / "checkpoint" / "global_step3" / path.name)
        assert all(torch.equal(value, ours[name]) for name, value in read(path).items())
    assert read(whole / "checkpoint" / "global_step3" / "layer_01-model_states.pt") == {}, "layer 0 is frozen"
    done = train(data, base, parts, *more, "--resume", "--steps", "4", "--stages", "3")
    assert done.returncode == 0, done.stderr
    adapter = ("--checkpoint", whole / "checkpoint", "--adapter", "--out", tmp_path / "adapter")
    assert script("convert_hf.py", "export", *adapter).returncode == 0
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["layers_to_transform"] == [1, 2, 3]


def test_gpt2_whose_linear_maps_are_transposed(data: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", data, "gpt2-tiny")
    done = train(data, base, tmp_path / "run", "--lora")
    assert done.returncode == 0 and "targets=('c_attn',)" in done.stdout, done.stdout + done.stderr
    where = ("--checkpoint", tmp_path / "run" / "checkpoint")
    done = script("convert_hf.py", "export", *where, "--adapter", "--out", tmp_path / "adapter")
    assert done.returncode == 0, done.stderr
    done = script("convert_hf.py", "export", *where, "--out", tmp_path / "merged")
    assert done.returncode == 0, done.stderr


def test_frozen_layers_stay_as_they_are(data: Path, base: Path, tmp_path: Path) -> None:
    """The whole first stage of two, in real processes: its layers don't change, the others do."""
    done = train(data, base, tmp_path / "run", "--freeze", "2", "--partition", "2,2", processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "stage 0 has nothing to train but a head" in done.stdout, done.stdout
    model = AutoModelForCausalLM.from_pretrained(base)
    exits = Exits(tmp_path / "run" / "checkpoint")
    for index, layer in enumerate(model.model.layers):
        ours = exits.checkpoint.layer_state(index + 1)
        same = [torch.equal(ours[f"layer.{name}"], value) for name, value in layer.state_dict().items()]
        assert all(same) if index < 2 else not any(same), index


def test_a_stage_with_nothing_at_all_to_train_saves_and_resumes(data: Path, base: Path, tmp_path: Path) -> None:
    """Backpropagation without heads, the first of two stages frozen, with ZeRO 1 and without; goes on in processes, in
    one, and with a stage more, as if it had never stopped."""
    settings = json.loads(config(tmp_path, 0.02).read_text())
    settings["interlocking"] = {"strategy": "global", "aux_head": None}
    settings["gradient_clipping"] = 0.0  # which is by stage
    (tmp_path / "plain.json").write_text(json.dumps(settings))
    settings["zero_optimization"] = {"stage": 1}
    (tmp_path / "zero.json").write_text(json.dumps(settings))

    def run(out: str, steps: int, *more: object, name: str = "plain.json", processes: int = 1) -> None:
        words = ["--deepspeed_config", tmp_path / name, "--freeze", "2", *more, "--steps", steps]
        if "--stages" not in more:
            words += ["--partition", "2,2"]
        done = train(data, base, tmp_path / out, *words, processes=processes)
        assert done.returncode == 0, done.stdout + done.stderr

    run("whole", 3)
    run("zero", 2, name="zero.json", processes=2)
    run("zero", 3, "--resume", name="zero.json", processes=2)
    run("parts", 2, processes=2)
    shutil.copytree(tmp_path / "parts", tmp_path / "deeper")
    run("parts", 3, "--resume")
    run("deeper", 3, "--resume", "--stages", "3")
    wanted = Exits(tmp_path / "whole" / "checkpoint").checkpoint
    for resumed in ("zero", "parts", "deeper"):
        found = Exits(tmp_path / resumed / "checkpoint").checkpoint
        for index in range(6):
            ours = found.layer_state(index)
            for key, value in wanted.layer_state(index).items():
                assert (ours[key] - value).norm() <= 1e-4 * value.norm(), (resumed, index, key)


def test_adapters_in_bf16_with_zero(data: Path, base: Path, tmp_path: Path) -> None:
    """Two processes; peft's folder and the merged model have the checkpoint's logits, as export checks."""
    settings = json.loads(config(tmp_path, 0.02).read_text())
    settings |= {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}
    (tmp_path / "bf16.json").write_text(json.dumps(settings))
    done = train(data, base, tmp_path / "run", "--deepspeed_config", tmp_path / "bf16.json", *LORA, processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    for more in (("--adapter",), ()):
        where = ("--checkpoint", tmp_path / "run" / "checkpoint", "--out", tmp_path / f"out{len(more)}")
        done = script("convert_hf.py", "export", *where, *more)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_loss_of_routers_from_the_command_line(data: Path, tmp_path: Path) -> None:
    """Reported by each stage, and a part of what a checkpoint is resumed with."""
    values = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    values |= {"num_hidden_layers": 2, "num_local_experts": 4, "max_position_embeddings": 64}
    (tmp_path / "moe.json").write_text(json.dumps({"model_type": "mixtral", **values}))
    where = ["--deepspeed_config", config(tmp_path, 0.01), "--output", tmp_path / "run", "--data", data]
    words = ["--one-process", "--stages", "2", *where, "--model", tmp_path / "moe.json", *SHORT]
    switch = ("--set", "output_router_logits=true", "router_aux_loss_coef=0.05")
    done = script("train_lm.py", *words, *switch, "--steps", "10")
    assert done.returncode == 0, done.stderr
    assert "each stage adds the loss of its own routers, with the coefficient 0.05" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    (stages,) = [row["stages"] for row in rows if "stages" in row]
    assert all(2.0 <= stage["router loss"] < 4.0 for stage in stages), "two experts a token"
    again = script("train_lm.py", *words, *switch[:1], switch[2], "--steps", "12", "--resume")
    assert_one_sentence(again, "was trained with model's output_router_logits True, not False")


def test_what_does_not_fit_is_one_sentence(trained: Path, data: Path, base: Path, tmp_path: Path) -> None:
    def refused(sentence: str, *more: object, start: Path = base) -> None:
        assert_one_sentence(train(data, start, tmp_path / "out", *more), sentence)

    refused("--freeze names 'layers.9'", "--freeze", "layers.9")
    refused("--lora rnk=3: 'rnk=3' is none of rank=8", "--lora", "rnk=3")
    refused("model type 'llama' has no linear map w_proj, but q_proj", "--lora", "targets=w_proj")
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    again = ("--output", copy, "--resume", "--steps", "4", "--stages", "2")
    refused("was trained with LoRA of rank=4 alpha=8", *again)
    other = save_base(tmp_path / "other", data, seed=2)
    refused("holds adapters of a model with digest", *again, *LORA, start=other)
    about = copy / "checkpoint" / "global_step3" / "interlocked_model.json"
    for place, sentence in (
        (other, "has other weights than before"),
        (tmp_path / "gone", "is no folder, and can't be"),
    ):
        text = about.read_text().replace(str(base), str(place))
        changed = tmp_path / f"changed {place.name}"
        shutil.copytree(copy / "checkpoint" / "global_step3", changed)
        (changed / about.name).write_text(text)
        done = script("evaluate_lm.py", "--checkpoint", changed, "--max-batches", "1")
        assert_one_sentence(done, sentence)
        assert "holds adapters alone" in done.stderr
    damaged = tmp_path / "damaged"
    shutil.copytree(copy / "checkpoint" / "global_step3", damaged)
    (damaged / about.name).write_text(about.read_text().replace('"rank": 4', '"rank": 5'))
    done = script("evaluate_lm.py", "--checkpoint", damaged, "--max-batches", "1")
    assert_one_sentence(done, "the adapters of layer 1 can't be used: size mismatch")
