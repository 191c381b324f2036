"""Configs from files, with overrides; and the presets of this repository."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import ibp_deepspeed.models
from ibp_deepspeed.models import CausalLM, ModelError, load_config
from ibp_deepspeed.objectives.cross_entropy import CausalLMLoss

PRESETS = Path(ibp_deepspeed.models.__file__).parent / "configs"
# parameters with an untied readout
SMALL_ONES = (8, 128, 4, 4096)
TINY = {"gpt2-tiny": SMALL_ONES, "llama-nano": (4, 32, 2, 512), "llama-tiny": SMALL_ONES, "qwen3-tiny": SMALL_ONES}
LARGE = {
    "gpt2-124m": (12, 163_037_184),
    "llama-1b": (22, 1_100_048_384),
    "llama2-7b": (32, 6_738_415_616),
    "llama3-1b": (16, 1_235_814_400 + 128_256 * 2048),
    "llama3-8b": (32, 8_030_261_248),
}


@pytest.mark.parametrize("name", TINY)
def test_tiny_presets_train(name: str) -> None:
    config = load_config(PRESETS / f"{name}.json")
    model = CausalLM(config)
    sizes = config.num_hidden_layers, model.hidden_size, config.num_attention_heads, model.vocab_size
    assert sizes == TINY[name] and 256 <= config.max_position_embeddings <= 512
    assert not model.was_tied
    hidden = torch.randint(0, model.vocab_size, (1, config.max_position_embeddings))
    for spec in model.layer_specs():
        hidden = spec.build()(hidden)
    labels = torch.randint(0, model.vocab_size, (1, config.max_position_embeddings))
    assert CausalLMLoss()(hidden, labels).item() == pytest.approx(math.log(model.vocab_size), abs=0.2)


@pytest.mark.parametrize("name", LARGE)
def test_large_presets_have_the_sizes_of_their_names(name: str) -> None:
    model = CausalLM(load_config(PRESETS / f"{name}.json"))
    assert (model.num_layers - 2, sum(model.parameter_counts())) == LARGE[name]
    assert not model.was_tied


def test_every_preset_is_tested() -> None:
    of_images = {path.stem for path in PRESETS.glob("*.json") if path.stem.startswith(("resnet", "vit"))}
    assert {path.stem for path in PRESETS.glob("*.json")} - of_images == {*TINY, *LARGE}


def test_overrides_use_common_names_and_derived_values_follow() -> None:
    gpt2 = load_config(PRESETS / "gpt2-tiny.json", num_hidden_layers=4, hidden_size=64, vocab_size=100)
    assert (gpt2.n_layer, gpt2.n_embd, gpt2.vocab_size) == (4, 64, 100)
    llama = load_config(str(PRESETS / "llama-tiny.json"), hidden_size=256)
    assert llama.head_dim == 64
    assert load_config(PRESETS / "gpt2-tiny.json", n_layer=3).num_hidden_layers == 3


def test_folders_are_read_and_lists_with_an_entry_per_layer_follow(tmp_path: Path) -> None:
    load_config(PRESETS / "qwen3-tiny.json").save_pretrained(tmp_path)
    assert len(json.loads((tmp_path / "config.json").read_text())["layer_types"]) == 8
    config = load_config(tmp_path, num_hidden_layers=3)
    assert (config.num_hidden_layers, len(config.layer_types)) == (3, 3)
    with pytest.raises(ModelError, match="layer_types lists 8 layers and num_hidden_layers asks for 9"):
        load_config(tmp_path, num_hidden_layers=9)


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model config in '.*nowhere.json'"):
        load_config(tmp_path / "nowhere.json")
    with pytest.raises(ModelError, match="'gpt2' has no 'n_layerz' to override"):
        load_config(PRESETS / "gpt2-tiny.json", n_layerz=2)
    with pytest.raises(ModelError, match="'num_attention_heads': 5.*do not fit"):
        load_config(PRESETS / "llama-tiny.json", num_attention_heads=5)
    (tmp_path / "untyped.json").write_text('{"n_layer": 2}')
    with pytest.raises(ModelError, match="untyped.json"):
        load_config(tmp_path / "untyped.json")
