"""Every exit of a checkpoint is a Hugging Face model of its own: same keys, same logits, nothing half written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from ibp_deepspeed.checkpoint import layout
from ibp_deepspeed.config.interlocking import AuxHeadConfig
from ibp_deepspeed.config.objectives import OBJECTIVES
from ibp_deepspeed.data.tokenizer import train_tokenizer
from ibp_deepspeed.errors import CheckpointError, OutputError
from ibp_deepspeed.models import CausalLM, ModelError
from ibp_deepspeed.models.exits.exits import Exits
from ibp_deepspeed.models.hf.importing import import_model
from ibp_deepspeed.models.hf.save import write
from ibp_deepspeed.models.layers import AuxiliaryHead
from ibp_deepspeed.models.runs.description import Description
from tests.checkpoint.test_store import full_device
from tests.models.test_causal_lm import FAMILIES, perturbed, run, tiny, tokens
from tests.models.test_weights import saved
from tests.prepared_data import DOCUMENTS


def checkpoint(
    folder: Path, model_type: str, dtype: torch.dtype = torch.float32, values: Any = None, **head: Any
) -> tuple[list[nn.Module], AuxiliaryHead]:
    """Two stages of 2 and 1 decoder layers as the engine writes them, and what they were written from."""
    config = tiny(model_type, **(values or {}))
    model, options = CausalLM(config, dtype=dtype), AuxHeadConfig(**head)
    layers = perturbed([model.build_layer(index).eval() for index in range(5)])
    own = perturbed([model.aux_head(0, options, after=2).eval()])[0]
    assert isinstance(own, AuxiliaryHead)
    folder.mkdir()
    for index, layer in enumerate(layers):
        torch.save(layer.state_dict(), folder / layout.layer(index))
    torch.save(own.state_dict(), folder / layout.aux_head(3))
    interlocking = {"strategy": "local", "aux_head": options.model_dump(exclude_unset=True)}
    description = Description(
        model=config.to_dict(), bounds=[0, 3, 5], interlocking=interlocking, sequence_length=12, data="nowhere"
    )
    for name, text in description.files().items():
        (folder / name).write_text(text)
    return layers, own


def logits(folder: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=dtype)
    assert not any(info.values()), info
    with torch.no_grad():
        return model.eval()(tokens()).logits


def read_out(layers: list[nn.Module], head: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return run([*layers[:3], head], tokens()).materialize()


def test_weights_that_are_not_finite_are_named_as_such(tmp_path: Path) -> None:
    """And not the architecture."""
    layers, _ = checkpoint(tmp_path / "run", "llama")
    with torch.no_grad():
        next(layers[2].parameters()).view(-1)[0] = torch.nan
    torch.save(layers[2].state_dict(), tmp_path / "run" / layout.layer(2))
    with pytest.raises(ModelError, match=r"has weights that are not finite, model\.layers\.1\.\S+ is the first of 1"):
        write(Exits(tmp_path / "run"), tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_both_exits_of_every_architecture(model_type: str, tmp_path: Path) -> None:
    """A private head is the model's norm and readout at another depth: nothing is lost."""
    layers, head = checkpoint(tmp_path / "run", model_type)
    exits = Exits(tmp_path / "run")
    write(exits, tmp_path / "whole", shard_size="30KB")
    write(exits, tmp_path / "first", 1)
    assert len(list((tmp_path / "whole").glob("*.safetensors"))) > 1
    with torch.no_grad():
        assert (logits(tmp_path / "whole") - run(layers, tokens()).materialize()).abs().max() <= 1e-6
    assert (logits(tmp_path / "first") - read_out(layers, head)).abs().max() <= 1e-6
    config = json.loads((tmp_path / "first" / "config.json").read_text())
    assert 2 in (config.get("num_hidden_layers"), config.get("n_layer"))
    assert config.get("tie_word_embeddings", False) is False


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2", "gemma3_text", "cohere", "phi", "opt", "mixtral"])
@pytest.mark.parametrize(
    "head",
    [{"readout": "shared"}, {"rank": 4}, {"blocks": 1}, {"readout": "shared", "blocks": 2}],
    ids=["shared", "rank", "block", "shared-blocks"],
)
def test_temperatures_factors_and_blocks_have_a_place(model_type: str, head: dict[str, Any], tmp_path: Path) -> None:
    """Folded into the readout, multiplied out, and made decoder layers."""
    layers, own = checkpoint(tmp_path / "run", model_type, **head)
    write(Exits(tmp_path / "run"), tmp_path / "first", 1)
    want = read_out(layers, own)
    assert (logits(tmp_path / "first") - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("name", sorted(OBJECTIVES.keys() - {"stochastic_layerwise", "momentum"}))
def test_whatever_trained_an_exit_it_is_exported(name: str, tmp_path: Path) -> None:
    """The head is read as what it is, and what its objective has beside it is left out."""
    layers, own = checkpoint(tmp_path / "run", "llama", objective=name)
    exits = Exits(tmp_path / "run")
    with torch.no_grad():
        want = read_out(layers, own)
        assert (exits.lazy_logits(tokens(), 1).materialize() - want).abs().max() <= 1e-6
        assert (exits.to_hugging_face(1).eval()(tokens()).logits - want).abs().max() <= 1e-6


def test_weights_of_16_bits_stay_so(tmp_path: Path) -> None:
    checkpoint(tmp_path / "run", "llama", torch.bfloat16, readout="shared")
    for exit_ in (1, 2):
        out = tmp_path / str(exit_)
        write(Exits(tmp_path / "run"), out, exit_)
        model = AutoModelForCausalLM.from_pretrained(out)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_head_that_the_architecture_has_no_place_for_is_refused(tmp_path: Path) -> None:
    """GPT-2's attention divided by the number of its layer: a block of layer 2's kind would become layer 3."""
    values = {"scale_attn_by_inverse_layer_idx": True}
    checkpoint(tmp_path / "run", "gpt2", values=values, blocks=2)
    with pytest.raises(ModelError, match="exit 1 can't be written as a gpt2 model: the architecture has no place for"):
        write(Exits(tmp_path / "run"), tmp_path / "first", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_tokenizer_generation_config_and_card_are_there(tmp_path: Path) -> None:
    checkpoint(tmp_path / "run", "llama", values={"vocab_size": 300})
    train_tokenizer(DOCUMENTS, 300).save(tmp_path / "run" / "tokenizer")
    write(Exits(tmp_path / "run"), tmp_path / "first", 1, results={"held-out perplexity": "12.5"})
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "first")
    assert tokenizer.decode(tokenizer("the square").input_ids) == "the square"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.use_cache and model.config.use_cache
    card = (tmp_path / "first" / "README.md").read_text()
    for text in (
        "library_name: transformers",
        "exit 1 of 2",
        "first 2 decoder layers",
        "| held-out perplexity | 12.5 |",
    ):
        assert text in card, text
    (tmp_path / "run" / "generation_config.json").write_text('{"temperature": 0.3, "do_sample": true}')
    write(Exits(tmp_path / "run"), tmp_path / "warm", 1)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "warm").generation_config.temperature == 0.3


def test_what_stops_an_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(tmp_path / "run", "llama")
    exits = Exits(tmp_path / "run")
    with full_device(), pytest.raises(OutputError, match="can't write .*first: "):
        write(exits, tmp_path / "first", 1)
    with pytest.raises(ModelError, match=r"has no exit 3: its exits are 1, 2 \(the last one is the model\)"):
        write(exits, tmp_path / "first", 3)

    original = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM,
        "from_pretrained",
        lambda *a, **k: (original(*a, **k)[0], {"missing_keys": {"lm_head.weight"}}),
    )
    with pytest.raises(ModelError, match="does not load as it was saved: .*lm_head.weight"):
        write(exits, tmp_path / "first", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("model_type", ["gpt2", "gemma2", "mixtral"])
def test_there_and_back(model_type: str, tmp_path: Path) -> None:
    """A tied model, imported and exported: the same logits, its own readout."""
    want = saved(tmp_path / "hub", model_type, tie_word_embeddings=model_type != "mixtral")
    train_tokenizer(DOCUMENTS, 300).save(tmp_path / "hub")
    import_model(str(tmp_path / "hub"), tmp_path / "imported")
    shutil.rmtree(tmp_path / "hub")
    exits = Exits(tmp_path / "imported")
    assert len(exits) == 1 and exits.checkpoint.tokenizer == tmp_path / "imported" / "tokenizer"
    write(exits, tmp_path / "back")
    with torch.no_grad():
        assert (logits(tmp_path / "back") - want(tokens()).logits).abs().max() <= 1e-6
    with pytest.raises(OutputError, match="exists already"):
        import_model(str(tmp_path / "back"), tmp_path / "imported")


def test_damaged_checkpoints_are_named(tmp_path: Path) -> None:
    checkpoint(tmp_path / "run", "llama")
    whole = (tmp_path / "run" / layout.layer(2)).read_bytes()
    (tmp_path / "run" / layout.layer(2)).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"layer_02-model_states.pt can't be read"):
        write(Exits(tmp_path / "run"), tmp_path / "out")
    (tmp_path / "run" / layout.layer(2)).unlink()
    with pytest.raises(ModelError, match="has no weights of layer 2"):
        write(Exits(tmp_path / "run"), tmp_path / "out")
    torch.save({"layer.other": torch.ones(1)}, tmp_path / "run" / layout.layer(2))
    with pytest.raises(ModelError, match="the weights do not fit a model of type 'llama'"):
        write(Exits(tmp_path / "run"), tmp_path / "out")
    (tmp_path / "run" / "interlocked_model.json").write_text("{")
    with pytest.raises(ModelError, match="is damaged"):
        Exits(tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
