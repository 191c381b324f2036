"""Hugging Face folders that somebody else may have made: no code, no pickles, no lengths that are not there."""

from __future__ import annotations

import builtins
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ibp_deepspeed.data.tokenizer import load_tokenizer as load_text_tokenizer
from ibp_deepspeed.errors import DataError, InterlockingError
from ibp_deepspeed.models.config import load_config
from ibp_deepspeed.models.errors import ModelError
from ibp_deepspeed.models.hf.weights import PretrainedWeights
from ibp_deepspeed.models.runs.description import Description
from ibp_deepspeed.models.tokenizer import load_tokenizer
from tests.bombs import Bomb, little_memory

SIZES = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 16}
LLAMA = {"model_type": "llama", **SIZES}


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with code of its own, and nobody who could be asked whether to run it."""
    folder = tmp_path / "given"
    folder.mkdir()
    (folder / "modeling_own.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    monkeypatch.setattr(builtins, "input", lambda *words: pytest.fail(f"asks: {words}"))
    return folder


def test_a_models_own_code_is_never_run_and_named(given: Path, tmp_path: Path) -> None:
    code = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.Own"}
    (given / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": code}))
    with pytest.raises(ModelError, match=r"needs Python code of its own .modeling_own\.OwnConfig; trust_remote_code"):
        load_config(given)
    (given / "config.json").write_text(json.dumps({**LLAMA, "auto_map": code}))
    assert type(load_config(given)).__name__ == "LlamaConfig", "transformers' own class, whatever the folder has"
    (given / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["modeling_own.T", None]}}))
    (given / "config.json").write_text(json.dumps({"model_type": "own"}))
    for read_it, kind in ((load_tokenizer, ModelError), (load_text_tokenizer, DataError)):
        with pytest.raises(kind, match="can't be read|cannot be read as a tokenizer") as caught:
            read_it(given)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def weights_of(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(LLAMA))
    config = load_config(folder)
    PretrainedWeights(folder, config).check()


def test_weights_in_a_pickle_run_no_code(given: Path, tmp_path: Path) -> None:
    torch.save({"model.norm.weight": torch.ones(8), "bomb": Bomb(tmp_path / "ran")}, given / "pytorch_model.bin")
    with pytest.raises(InterlockingError, match=r"pytorch_model\.bin holds posix\.mkdir, which could run any code"):
        weights_of(given)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("length", [10 * 2**30, 2**63, 90 * 2**20])
def test_a_header_that_is_not_there_takes_no_memory(length: int, given: Path) -> None:
    (given / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
    with little_memory(2**26), pytest.raises(ModelError, match=r"model\.safetensors can't be read"):
        weights_of(given)


def test_tensors_that_are_not_there_take_no_memory(given: Path) -> None:
    header = json.dumps({"model.norm.weight": {"dtype": "F32", "shape": [2**31], "data_offsets": [0, 2**33]}}).encode()
    (given / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 16)
    with little_memory(2**26), pytest.raises(ModelError, match=r"model\.safetensors can't be read"):
        weights_of(given)


@pytest.mark.parametrize(
    "index",
    [
        {"weight_map": {"model.norm.weight": "../secret.safetensors"}},
        {"weight_map": {"model.norm.weight": "/etc/passwd"}},
        {"weight_map": {"model.norm.weight": 5}},
        {"weight_map": ["model.norm.weight"]},
        {"weight_map": 5},
        [],
    ],
)
def test_an_index_names_files_of_its_folder(index: Any, given: Path) -> None:
    save_file({"model.norm.weight": torch.ones(8)}, given.parent / "secret.safetensors")
    (given / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json is damaged"):
        weights_of(given)


@pytest.mark.parametrize("model", [{}, {"model_type": "own"}, {"model_type": ["llama"]}, {**LLAMA, "hidden_size": "x"}])
def test_a_description_of_no_model_is_one_sentence(model: dict[str, Any]) -> None:
    found = Description(model=model, bounds=[0, 3], interlocking={}, sequence_length=8)
    with pytest.raises(ModelError, match=r"the config in interlocked_model\.json can't be used"):
        found.hf_config()


def test_a_model_of_endless_layers_is_refused_before_it_is_built(given: Path) -> None:
    config = {**LLAMA, "model_type": "qwen2", "num_hidden_layers": 10**9}
    (given / "config.json").write_text(json.dumps(config))
    for read_it in (
        lambda: load_config(given),
        lambda: Description(model=config, bounds=[0, 3], interlocking={}, sequence_length=8).hf_config(),
    ):
        with little_memory(2**26), pytest.raises(ModelError, match=r"asks for 1000000000 layers \(num_hidden_layers\)"):
            read_it()
