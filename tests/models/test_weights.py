"""Hugging Face folders become cut models: same logits, each layer from its own tensors, damage named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ibp_deepspeed.config.interlocking import AuxHeadConfig
from ibp_deepspeed.models import CausalLM, ModelError
from ibp_deepspeed.models.config import load_config
from ibp_deepspeed.models.hf.weights import PretrainedWeights, local_folder
from ibp_deepspeed.models.layers import AuxiliaryHead, HeadLayer
from ibp_deepspeed.models.runs.checkpoint import tokenizer_texts
from tests.forks import ROOT
from tests.models.test_causal_lm import FAMILIES, perturbed, run, tiny, tokens

CASES: list[tuple[str, dict[str, Any]]] = [(kind, {"tie_word_embeddings": False}) for kind in FAMILIES]
CASES += [(kind, {"tie_word_embeddings": True}) for kind in ("gpt2", "llama", "qwen3", "gemma2", "opt")]
CASES += [("mistral", {"sliding_window": None, "tie_word_embeddings": False})]


def saved(folder: Path, model_type: str, shard: str = "100KB", **values: Any) -> PreTrainedModel:
    """A model with weights away from ones and zeros, written in shards."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(tiny(model_type, **values)).eval()
    perturbed([model])
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def pretrained(folder: Path, **options: Any) -> CausalLM:
    config = load_config(folder)
    return CausalLM(config, weights=PretrainedWeights(folder, config), **options)


@pytest.mark.parametrize(("model_type", "values"), CASES)
def test_an_imported_model_has_the_logits_of_its_folder(
    model_type: str, values: dict[str, Any], tmp_path: Path
) -> None:
    want = saved(tmp_path, model_type, **values)
    model = pretrained(tmp_path)
    model._weights.check()  # type: ignore[union-attr]
    layers = [spec.build().eval() for spec in model.layer_specs()]
    changed = tokens()
    changed[:, -1] = (changed[:, -1] + 1) % 97
    with torch.no_grad():
        logits, other = run(layers, tokens()).materialize(), run(layers, changed).materialize()
        expected = want(input_ids=tokens(), use_cache=False).logits
    assert (logits - expected).abs().max() <= 1e-6 and expected.std() > 1e-3
    assert (logits[:, :-1] - other[:, :-1]).abs().max() <= 1e-6


def test_a_start_at_random_needs_no_internals_of_hugging_faces() -> None:
    """So that a version that has moved them can still train, evaluate and export."""
    code = "import sys, ibp_deepspeed.models.runs.start; sys.exit('ibp_deepspeed.models.hf.weights' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_only_the_files_of_a_layer_are_read(tmp_path: Path) -> None:
    """Three layers in one file each or more: the others may be damaged."""
    want = saved(tmp_path, "llama", shard="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    own = {file for key, file in index.items() if key.startswith("model.layers.1.")}
    others = set(index.values()) - own
    assert len(others) >= 2
    model = pretrained(tmp_path)
    for name in others:
        os.truncate(tmp_path / name, 5)
    layer = model.build_layer(2)
    hidden = torch.randn(1, 4, 32)
    with torch.no_grad():
        positions = want.model.rotary_emb(hidden, torch.arange(4)[None])
        expected = want.model.layers[1](hidden, position_embeddings=positions)
        assert torch.equal(layer(hidden), expected if isinstance(expected, torch.Tensor) else expected[0])
    with pytest.raises(ModelError, match="can't be read"):
        model.build_layer(1)


def test_files_of_torch_are_read_too(tmp_path: Path) -> None:
    """Without the prefix, as GPT-2's own first checkpoints."""
    want = saved(tmp_path, "gpt2", shard="1GB", tie_word_embeddings=True)
    state = {key.removeprefix("transformer."): value for key, value in want.state_dict().items()}
    torch.save({key: value for key, value in state.items() if key != "lm_head.weight"}, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    layers = [spec.build().eval() for spec in pretrained(tmp_path).layer_specs()]
    with torch.no_grad():
        assert (run(layers, tokens()).materialize() - want(input_ids=tokens()).logits).abs().max() <= 1e-6


@pytest.mark.parametrize("model_type", ["gpt2", "gemma2", "cohere", "opt"])  # plain, soft cap, logit scale, projection
@pytest.mark.parametrize("options", [{}, {"readout": "shared"}, {"blocks": 1}], ids=["private", "shared", "block"])
def test_heads_start_as_the_logit_lens(model_type: str, options: dict[str, Any], tmp_path: Path) -> None:
    """The model's own last layer read at a boundary, behind its next decoder layer if the head has a block."""
    saved(tmp_path, model_type)
    model = pretrained(tmp_path)
    head, last, following = model.aux_head(0, AuxHeadConfig(**options), after=1), model.build_layer(4), None
    assert isinstance(head, AuxiliaryHead) and isinstance(last, HeadLayer)
    following = model.build_layer(2)
    hidden = torch.randn(2, 6, 32)
    with torch.no_grad():
        before = following.eval()(hidden) if options.get("blocks") else hidden
        assert torch.equal(head.eval()(hidden).materialize(), last.eval()(before).materialize())
    fresh = pretrained(tmp_path, fresh_heads=True).aux_head(0, AuxHeadConfig(**options), after=1)
    drawn = CausalLM(load_config(tmp_path)).aux_head(0, AuxHeadConfig(**options), after=1)
    assert isinstance(fresh, AuxiliaryHead) and isinstance(drawn, AuxiliaryHead)
    for name, value in fresh.state_dict().items():
        own = drawn if not options.get("readout") or not name.startswith("readout.") else head
        assert torch.equal(value, own.state_dict()[name]), name


def test_low_rank_readouts_are_drawn(tmp_path: Path) -> None:
    saved(tmp_path, "llama")
    head = pretrained(tmp_path).aux_head(0, AuxHeadConfig(rank=4))
    assert head(torch.randn(1, 3, 32)).materialize().shape == (1, 3, 97)


def test_a_width_of_16_bits_is_kept_where_it_is_asked_for(tmp_path: Path) -> None:
    want = saved(tmp_path, "llama")
    want.bfloat16().save_pretrained(tmp_path)
    layer = pretrained(tmp_path).build_layer(1)
    low = pretrained(tmp_path, dtype=torch.bfloat16).build_layer(1)
    for name, value in layer.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(low.state_dict()[name], value.bfloat16())


def test_what_is_wrong_with_a_folder_is_named(tmp_path: Path) -> None:
    saved(tmp_path / "model", "llama", shard="20KB")
    folder = tmp_path / "model"
    config = load_config(folder)

    def said(match: str, **changes: Any) -> None:
        with pytest.raises(ModelError, match=match) as caught:
            PretrainedWeights(folder, config).check()
            CausalLM(load_config(folder, **changes), weights=PretrainedWeights(folder, config)).build_layer(1)
        assert "\n" not in str(caught.value)

    said(r"weight .* of \(48, 32\), the model's is \(64, 32\)", intermediate_size=64)
    index = folder / "model.safetensors.index.json"
    mapping = json.loads(index.read_text())
    kept = dict(mapping["weight_map"])
    shard = kept["model.layers.0.mlp.up_proj.weight"]
    whole = (folder / shard).read_bytes()
    (folder / shard).write_bytes(whole[:-100])
    said(f"{shard} can't be read")
    (folder / shard).unlink()
    said(f"lacks {shard}, which model.safetensors.index.json names")
    (folder / shard).write_bytes(whole)
    del mapping["weight_map"]["model.layers.0.mlp.up_proj.weight"]
    index.write_text(json.dumps(mapping))
    said("has no weight model.layers.0.mlp.up_proj.weight")
    index.write_text("{")
    said("index.json is damaged")
    index.unlink()
    said("has no weights")
    with pytest.raises(ModelError, match="'nobody/nothing' is no folder, and can't be had from the hub"):
        local_folder("nobody/nothing")


def test_a_tokenizers_binary_files_stay_out_of_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer.model").write_bytes(b"\xec\x00")
    assert tokenizer_texts(tmp_path) == {"tokenizer/tokenizer.json": "{}"}
