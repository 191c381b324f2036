"""The cut of any architecture is proved with a small model of its config, once; what differs is refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from ibp_deepspeed.errors import OutputError
from ibp_deepspeed.models import CausalLM, ModelError, load_config
from ibp_deepspeed.models.proofs import checks, first_use
from ibp_deepspeed.models.proofs.first_use import TABLE, in_table, proving, require_proof
from ibp_deepspeed.models.proofs.kind import kind_of
from ibp_deepspeed.models.proofs.proof import LIMITS, Proof, prove
from ibp_deepspeed.models.proofs.small import small_config
from ibp_deepspeed.models.proofs.table import configs, default_config
from ibp_deepspeed.models.recorder import Recorder
from ibp_deepspeed.models.shell import Shell
from tests.checkpoint.test_store import full_device
from tests.commands import assert_one_sentence, script
from tests.forks import ROOT

TYPES: list[str] = sorted(json.loads(TABLE.read_text(encoding="utf-8"))["types"])
HANDFUL = ["bloom", "deepseek_v3", "falcon", "gpt_neo", "llama4_text", "mpt"]
ALL_CHECKS = set(LIMITS)


def proof_of(config: PretrainedConfig) -> Proof:
    with proving():
        return prove(config)


@pytest.mark.parametrize("part", range(6))
def test_models_of_every_type_are_cut_as_they_are_uncut(part: int, full: bool) -> None:
    for model_type in (TYPES if full else HANDFUL)[part::6]:
        config = next(iter(configs(model_type)))
        proof = proof_of(config)
        assert proof.refusal is None, proof.refusal
        assert proof.differences.keys() | proof.lacks.keys() == ALL_CHECKS
        assert in_table(model_type, kind_of(config)), "run python -m ibp_deepspeed.models.proofs.table"


def test_the_table_has_what_people_have() -> None:
    old = "cohere gemma3_text gpt2 gpt_neox gpt_oss llama mixtral olmo3 opt phi3 qwen3_moe smollm3 stablelm starcoder2"
    new = "bloom deepseek_v3 falcon glm4_moe gpt_neo gptj granitemoe jamba lfm2 llama4_text mpt olmo qwen3_next"
    assert len(TYPES) >= 80 and {*old.split(), *new.split()} <= set(TYPES) and "nanochat" not in TYPES
    llama3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 8192}  # fmt: skip
    real = [
        AutoConfig.for_model("llama", hidden_size=4096, num_hidden_layers=32, num_key_value_heads=8, vocab_size=128_256,
                             max_position_embeddings=131_072, rope_parameters=llama3, tie_word_embeddings=False),
        AutoConfig.for_model("gpt2", n_embd=1600, n_layer=48, n_head=25),
        load_config("llama-tiny", vocab_size=4096, num_hidden_layers=8),
    ]  # fmt: skip
    for config in real:
        assert in_table(config.model_type, kind_of(config))


def test_what_the_table_has_costs_nothing() -> None:
    code = (
        "import sys, time\nfrom ibp_deepspeed.models import CausalLM, load_config\nconfig = load_config('llama-tiny')\n"
        "from ibp_deepspeed.models.proofs.first_use import require_proof\nbegin = time.perf_counter()\n"
        "require_proof(config)\nassert time.perf_counter() - begin < 0.2\nCausalLM(config)\n"
        "sys.exit('ibp_deepspeed.models.proofs.proof' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    ("model_type", "values", "layers"),
    [
        ("llama", {}, 2),
        ("gemma3_text", {}, 2),  # five sliding layers, then a full one
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4096}, 2),  # full ones, and sliding ones from 28 on
        ("deepseek_v3", {}, 4),  # three dense ones before those with experts
        ("jamba", {}, 5),  # attention in every eighth, experts in every second
        ("llama", {"num_hidden_layers": 1}, 1),
    ],
)
def test_the_small_model_has_all_kinds_of_layers(model_type: str, values: dict[str, Any], layers: int) -> None:
    config = AutoConfig.for_model(model_type, **values)
    small = small_config(config)
    assert small.num_hidden_layers == layers
    assert sum(parameter.numel() for parameter in Shell(small).model.parameters()) < 200_000
    if hasattr(config, "layer_types"):
        assert set(small.layer_types) == set(config.layer_types)


@pytest.mark.parametrize(("heads", "keys"), [(1, 1), (2, 1), (3, 3), (3, 1), (5, 5), (6, 2)])
def test_any_number_of_heads_has_a_small_model(heads: int, keys: int) -> None:
    sizes = {"hidden_size": 32 * heads, "num_attention_heads": heads, "num_key_value_heads": keys}
    config = AutoConfig.for_model("llama", head_dim=32, **sizes)
    small = small_config(config)
    assert small.head_dim * small.num_attention_heads == small.hidden_size
    assert (small.num_key_value_heads < small.num_attention_heads) == (keys < heads)
    with proving():
        assert prove(config).refusal is None


def test_sizes_are_no_kind_and_switches_are() -> None:
    def kind(**values: Any) -> str:
        return kind_of(AutoConfig.for_model("llama", **values))

    wide = {"hidden_size": 8192, "intermediate_size": 28_672, "num_attention_heads": 64, "num_hidden_layers": 80}
    assert kind() == kind(**wide) == kind(vocab_size=128_256, max_position_embeddings=131_072, rms_norm_eps=1e-5)
    others = [
        kind(attention_bias=True), kind(tie_word_embeddings=True), kind(num_key_value_heads=8), kind(hidden_act="gelu"),
        kind(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
    ]  # fmt: skip
    assert len({kind(), *others}) == 6


def without_mask(recorder: Recorder, index: int, hidden: Tensor) -> dict[str, Any]:
    inputs = _inputs_for(recorder, index, hidden)
    everything = torch.ones(1, 1, hidden.shape[1], hidden.shape[1], dtype=torch.bool)
    return {**inputs, "attention_mask": everything}


_inputs_for = Recorder.inputs_for
_layer, _key = checks.CausalLM.build_layer, checks.model_key


def frozen(model: CausalLM, index: int) -> torch.nn.Module:
    layer = _layer(model, index)
    for name, parameter in layer.named_parameters():
        if name.endswith("mlp.up_proj.weight"):
            parameter.requires_grad_(False)
    return layer


def unnormed(model: CausalLM, index: int) -> torch.nn.Module:
    layer = _layer(model, index)
    if hasattr(layer, "norm"):
        layer.norm = torch.nn.Identity()
    return layer


def shuffled(exits: Any, exit_: int) -> Any:
    model = _to_hugging_face(exits, exit_)
    model.model.norm.weight.data.neg_()
    return model


_to_hugging_face = checks.Exits.to_hugging_face


@pytest.mark.parametrize(
    ("place", "name", "mistake", "check"),
    [
        (checks.CausalLM, "build_layer", unnormed, r"logits: .* differ by [1-9].* \(at most 1e-05\)"),
        (Recorder, "inputs_for", without_mask, "logits: .* differ by"),
        (checks.CausalLM, "build_layer", frozen, r"gradients: .* differ by 1.0e\+00 \(at most 1e-04\)"),
        (checks.Exits, "to_hugging_face", shuffled, "export: .* logits differ by"),
    ],
)
def test_mistakes_are_seen(place: type, name: str, mistake: Callable[..., Any], check: str,
                           monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(place, name, mistake)
    refusal = proof_of(AutoConfig.for_model("llama")).refusal
    assert refusal is not None
    with pytest.raises(ModelError, match=f"^a model of type 'llama' with this config is not cut.* {check}"):
        raise ModelError(refusal)


def test_a_model_that_sees_later_tokens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut and uncut alike, so that logits are equal."""
    forward = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: forward(*a, **{**k, "is_causal": False})
    )
    refusal = proof_of(AutoConfig.for_model("llama")).refusal
    assert refusal is not None and "causality: logits of earlier tokens" in refusal


def test_nanochat_is_refused_with_the_difference() -> None:
    """It norms its embeddings with what is also its final norm."""
    for _ in range(2):  # proved, and from the cache
        with pytest.raises(ModelError, match=r"'nanochat' .* fails in its logits: .* differ by \d\.\de[+-]\d+"):
            CausalLM(AutoConfig.for_model("nanochat"))


def test_what_a_model_lacks_is_no_refusal() -> None:
    """Its layers depend on how many there are: an exit is no smaller model of it, which the export refuses."""
    proof = proof_of(AutoConfig.for_model("minicpm3"))
    assert proof.refusal is None and "no place for its head" in proof.lacks["exits"]
    assert "exits" not in proof.differences and proof.differences["export"] <= 1e-5


def test_documents_that_a_model_cannot_keep_apart_are_refused_where_they_are_asked_for() -> None:
    """A recurrent state goes on from one to the next."""
    CausalLM(default_config("llama")).check_document_masks()
    with pytest.raises(ModelError, match="'mamba' with this config can't keep documents in one row apart"):
        CausalLM(default_config("mamba")).check_document_masks()


def test_kernels_that_the_cpu_lacks_are_no_refusal() -> None:
    config = AutoConfig.for_model("llama")
    for attention in ("flex_attention", "flash_attention_2"):
        config._attn_implementation = attention
        assert proof_of(config).refusal is None and in_table("llama", kind_of(config))
    config._attn_implementation = "eager"
    assert proof_of(config).refusal is None and not in_table("llama", kind_of(config))


def test_the_callers_state_is_as_before() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    with torch.inference_mode():
        assert proof_of(default_config("llama")).refusal is None
    assert torch.equal(state, torch.get_rng_state())


@pytest.fixture
def unusual(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PretrainedConfig:
    """A config that the table lacks, for a user without proofs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(first_use, "_known", {})
    return AutoConfig.for_model("llama", hidden_act="tanh", mlp_bias=True)


def counted(monkeypatch: pytest.MonkeyPatch, refusal: str | None = None) -> list[str]:
    """The types that are proved from now on, which takes a while and ends so."""
    done: list[str] = []

    def proved(config: PretrainedConfig) -> Mapping[str, Any]:
        done.append(config.model_type)
        time.sleep(0.3)
        return Proof(config.model_type, refusal=refusal).to_dict()

    monkeypatch.setattr(first_use, "_proved", proved)
    return done


def test_an_unusual_config_is_proved_at_its_first_use(unusual: PretrainedConfig) -> None:
    assert not in_table("llama", kind_of(unusual))
    CausalLM(unusual)
    files = list(first_use.cache_folder().glob("*.json"))
    assert len(files) == 1 and files[0].name.startswith("llama-")
    found = json.loads(files[0].read_text())
    assert found["differences"].keys() == ALL_CHECKS and found["refusal"] is None


def test_processes_of_a_host_prove_once(unusual: PretrainedConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    done = counted(monkeypatch)
    key = (unusual.model_type, kind_of(unusual))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: first_use._first_use(unusual, key), range(4)))
    assert done == ["llama"]
    require_proof(unusual)
    assert done == ["llama"]
    monkeypatch.setattr(first_use, "_known", {})
    monkeypatch.setattr(first_use, "code_digest", lambda: "other code")
    require_proof(unusual)
    assert done == ["llama"] * 2


def test_a_damaged_cache_or_none_is_no_error(
    unusual: PretrainedConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = counted(monkeypatch, refusal="it differs")
    for text in (None, "{", "[]", '{"refusal": 3}', '{"differences": {}}'):
        for path in first_use.cache_folder().glob("*.json"):
            path.write_text(text or "")
        before = len(done)
        with pytest.raises(ModelError, match="it differs"):
            require_proof(unusual)
        assert len(done) == before + 1, text
    with pytest.raises(ModelError, match="it differs"):
        require_proof(unusual)  # a refusal is kept too
    assert len(done) == 5
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="it differs"):
        require_proof(unusual)
    assert len(done) == 6


def test_another_transformers_proves_again(unusual: PretrainedConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    done = counted(monkeypatch)
    require_proof(AutoConfig.for_model("llama"))
    assert not done
    monkeypatch.setattr(first_use, "_known", {})
    monkeypatch.setattr(first_use.transformers, "__version__", "5.22.2")
    require_proof(AutoConfig.for_model("llama"))
    assert done == ["llama"]


def test_the_command_shows_the_figures_and_the_refusal(tmp_path: Path) -> None:
    done = script("convert_hf.py", "check", "--model", "llama-tiny")
    assert done.returncode == 0, done.stderr
    for name, limit in LIMITS.items():
        assert f"  {name}: " in done.stdout and f"at most {limit:.0e}" in done.stdout
    assert "can be cut" in done.stdout.splitlines()[-1]
    (tmp_path / "config.json").write_text('{"model_type": "nanochat"}')
    done = script("convert_hf.py", "check", "--model", tmp_path)
    assert_one_sentence(done, "'nanochat' with this config is not cut, because a small one like it fails in its logits")


def test_a_full_device_is_no_refusal(unusual: PretrainedConfig) -> None:
    """It is said, and the next use proves again."""
    with full_device(), pytest.raises(OutputError, match="to prove the cut with can't be written"):
        require_proof(unusual)
    assert not list(first_use.cache_folder().glob("*.json"))
    require_proof(unusual)
