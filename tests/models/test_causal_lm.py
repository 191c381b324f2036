"""Cut models are the uncut ones: same logits, same gradients, and no rank holds more than its part."""

from __future__ import annotations

import copy
import gc
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from deepspeed.pipe import LayerSpec
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ibp_deepspeed.errors import InterlockingError
from ibp_deepspeed.models import CausalLM, ModelError, assemble
from ibp_deepspeed.models.hf.assemble import model_key
from ibp_deepspeed.models.layers import DecoderLayer
from ibp_deepspeed.models.shell import Shell
from ibp_deepspeed.objectives.cross_entropy import CausalLMLoss, LazyLogits

transformers.logging.set_verbosity_error()

# Of the types that test_proofs.py has, those with which the proof's own checks are checked here, by other code.
FAMILIES = (
    "cohere", "cohere2", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "gpt_oss", "granite", "llama",
    "mistral", "mixtral", "olmo2", "olmo3", "olmoe", "opt", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe",
    "smollm3", "stablelm", "starcoder2",
)  # fmt: skip
VOCAB, WINDOW, SEQUENCE = 97, 4, 12
_SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 8,
    "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64, "sliding_window": WINDOW,
    "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "ffn_dim": 48, "word_embed_proj_dim": 16, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def tiny(model_type: str, **values: Any) -> PretrainedConfig:
    """A small config; windows are shorter than the sequences, and OPT has its projections."""
    base = AutoConfig.for_model(model_type)
    sizes = {base.attribute_map.get(k, k): v for k, v in _SIZES.items()}
    return AutoConfig.for_model(model_type, **{**{k: v for k, v in sizes.items() if hasattr(base, k)}, **values})


def tokens(batch: int = 2, length: int = SEQUENCE) -> Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(0))


def build(model: CausalLM) -> list[nn.Module]:
    return [spec.build().eval() for spec in model.layer_specs()]


def perturbed(layers: list[nn.Module]) -> list[nn.Module]:
    """Norms, biases and sinks away from ones and zeros, so that a mistaken one is seen."""
    generator = torch.Generator().manual_seed(7)
    for layer in layers:
        for parameter in layer.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return layers


def whole(config: PretrainedConfig, layers: list[nn.Module]) -> PreTrainedModel:
    return assemble(config, {index: layer.state_dict() for index, layer in enumerate(layers)})


def run(layers: list[nn.Module], input_ids: Tensor) -> LazyLogits:
    hidden = input_ids
    for layer in layers[:-1]:
        hidden = layer(hidden)
        assert isinstance(hidden, Tensor) and hidden.is_floating_point()
    return layers[-1](hidden)


def shifted(input_ids: Tensor) -> Tensor:
    labels = input_ids.roll(-1, dims=1)
    labels[:, -1] = -100
    return labels


@pytest.mark.parametrize("model_type", FAMILIES)
def test_cut_model_gives_the_logits_of_the_uncut_one_and_is_causal(model_type: str) -> None:
    config = tiny(model_type)
    model = CausalLM(config)
    layers = perturbed(build(model))
    input_ids = tokens()
    changed = input_ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % VOCAB
    with torch.no_grad():
        logits = run(layers, input_ids).materialize()
        want = whole(config, layers)(input_ids=input_ids, use_cache=False).logits
        other = run(layers, changed).materialize()
    assert logits.shape == (2, SEQUENCE, VOCAB) and want.std() > 1e-3
    assert (logits - want).abs().max() <= 1e-6
    assert (logits[:, :-1] - other[:, :-1]).abs().max() <= 1e-6
    assert (logits[:, -1] - other[:, -1]).abs().max() > 1e-3
    assert model.parameter_counts() == [sum(p.numel() for p in layer.parameters()) for layer in layers]
    assert all(p.dim() > 0 and p.device.type == "cpu" for layer in layers for p in layer.parameters())


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "qwen3", "gemma2", "mixtral", "opt"])
def test_training_gives_the_gradients_of_the_uncut_model(model_type: str) -> None:
    config = tiny(model_type)
    layers = build(CausalLM(config))
    full, input_ids = whole(config, layers), tokens()
    for module in (full, *layers):
        module.train()
    torch.manual_seed(0)
    loss = CausalLMLoss(chunk_tokens=5)(run(layers, input_ids), shifted(input_ids))
    loss.backward()
    torch.manual_seed(0)  # for dropout, which gpt2 and opt have
    want = full(input_ids=input_ids, labels=input_ids, use_cache=False).loss
    want.backward()
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)
    shell, gradients = Shell(config), {name: p.grad for name, p in full.named_parameters()}
    for index, layer in enumerate(layers):
        for name, parameter in layer.named_parameters():
            expected = gradients.pop(model_key(shell, index, name))
            assert (parameter.grad - expected).norm() <= 1e-5 * expected.norm() + 1e-9, (index, name)
    assert not gradients


def test_dropout_of_the_config_is_at_work_in_training_alone() -> None:
    layers = build(CausalLM(tiny("gpt2", embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.5)))
    hidden = layers[0](tokens())
    assert torch.equal(layers[1](hidden), layers[1](hidden))
    layers[1].train()
    assert not torch.equal(layers[1](hidden), layers[1](hidden))


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "qwen3", "gemma3_text"])
def test_several_products_over_one_graph_then_backward(model_type: str) -> None:
    layer = build(CausalLM(tiny(model_type)))[2]
    hidden = torch.randn(2, SEQUENCE, 32, requires_grad=True)
    output = layer(hidden)
    cotangents = [torch.randn_like(output) for _ in range(3)]
    products = [torch.autograd.grad(output, hidden, c, retain_graph=True)[0] for c in cotangents[:2]]
    output.backward(cotangents[2])
    for cotangent, product in zip(cotangents, [*products, hidden.grad], strict=True):
        fresh = hidden.detach().requires_grad_()
        torch.testing.assert_close(product, torch.autograd.grad(layer(fresh), fresh, cotangent)[0])
    assert all(p.grad is not None for p in layer.parameters())


def test_casting_to_bf16_leaves_rotary_tables_accurate() -> None:
    layer = build(CausalLM(tiny("llama", max_position_embeddings=2048)))[1].bfloat16()
    hidden = torch.randn(1, 2048, 32).bfloat16()
    assert layer(hidden).dtype == torch.bfloat16
    assert isinstance(layer, DecoderLayer)
    cos, sin = layer._recorder.inputs_for(0, hidden)["position_embeddings"]
    frequencies = 10000.0 ** -(torch.arange(0, 8, 2).double() / 8)
    angles = torch.outer(torch.arange(2048).double(), frequencies).repeat(1, 2)
    assert cos.dtype == torch.bfloat16
    assert (cos[0].double() - angles.cos()).abs().max() < 4e-3  # half a unit of bf16 in the last place
    assert (sin[0].double() - angles.sin()).abs().max() < 4e-3


def test_shapes_and_modes_may_change_between_calls() -> None:
    config = tiny("gemma3_text")
    layers = build(CausalLM(config))
    full = whole(config, layers)
    with torch.inference_mode():
        run(layers, tokens())
    run(layers, tokens()).materialize().sum().backward()
    for length in range(2, 2 * SEQUENCE, 3):
        with torch.no_grad():
            want = full(input_ids=tokens(1, length), use_cache=False).logits
            assert (run(layers, tokens(1, length)).materialize() - want).abs().max() <= 1e-6
    assert isinstance(layers[1], DecoderLayer)
    assert len(layers[1]._recorder._cache) <= 4  # shapes of old are not kept for ever


def test_a_copied_layer_is_the_same_layer() -> None:
    layers = build(CausalLM(tiny("llama")))
    twins = copy.deepcopy(layers)
    assert torch.equal(run(twins, tokens()).materialize(), run(layers, tokens()).materialize())
    assert all(a is not b for x, y in zip(layers, twins, strict=True)
               for a, b in zip(x.parameters(), y.parameters(), strict=True))  # fmt: skip


def real_elements() -> int:
    gc.collect()
    found = [o for o in gc.get_objects() if isinstance(o, nn.Parameter) and o.device.type != "meta"]
    return sum(parameter.numel() for parameter in found)


def test_only_what_is_built_has_memory() -> None:
    before = real_elements()
    model = CausalLM(tiny("llama"))
    specs, counts = model.layer_specs(), model.parameter_counts()
    model.aux_head_parameters()
    assert real_elements() == before
    own = [specs[2].build(), specs[3].build()]
    own[1](own[0](torch.randn(1, 4, 32)))
    assert real_elements() == before + counts[2] + counts[3]


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "qwen3"])
def test_initial_weights_depend_on_seed_and_index_alone(model_type: str) -> None:
    everything = build(CausalLM(tiny(model_type), seed=3))
    torch.manual_seed(11)
    state = torch.get_rng_state()
    for index in (2, 0, 4):
        alone = CausalLM(tiny(model_type), seed=3).layer_specs()[index].build()
        for name, value in alone.state_dict().items():
            assert torch.equal(value, everything[index].state_dict()[name]), name
    assert torch.equal(torch.get_rng_state(), state)

    def matrix(layer: nn.Module) -> Tensor:
        return next(p for p in layer.parameters() if p.dim() == 2)

    assert not torch.equal(matrix(everything[1]), matrix(everything[2]))
    assert not torch.equal(matrix(everything[1]), matrix(CausalLM(tiny(model_type), seed=4).build_layer(1)))
    low = CausalLM(tiny(model_type), seed=3, dtype=torch.bfloat16).build_layer(1)
    assert torch.equal(matrix(low), matrix(everything[1]).bfloat16())


def test_a_weight_that_the_models_rules_forget_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = CausalLM(tiny("llama"))
    monkeypatch.setattr(transformers.LlamaPreTrainedModel, "_init_weights", lambda self, module: None)
    with pytest.raises(ModelError, match="'llama' leaves Linear.weight of layer 1 without"):
        model.build_layer(1)


def test_gpt2_initial_weights_are_those_of_the_paper() -> None:
    layers = build(CausalLM(tiny("gpt2", n_embd=128, n_inner=512)))
    weights = {name.removeprefix("layer."): p for name, p in layers[1].named_parameters()}
    residual = 0.02 / math.sqrt(2 * 3)
    for name, std in {"attn.c_attn": 0.02, "attn.c_proj": residual, "mlp.c_fc": 0.02, "mlp.c_proj": residual}.items():
        assert weights[f"{name}.weight"].std().item() == pytest.approx(std, rel=0.05)
        assert not weights[f"{name}.bias"].any()
    assert (weights["ln_1.weight"] == 1).all()
    assert layers[-1].get_parameter("readout.lm_head.weight").std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "opt"])
def test_auxiliary_head(model_type: str) -> None:
    model = CausalLM(tiny(model_type))
    head, again, other = model.aux_head(0), model.aux_head(0), model.aux_head(1)
    hidden = torch.randn(2, SEQUENCE, 32)
    logits = head(hidden)
    assert logits.materialize().shape == (2, SEQUENCE, VOCAB)
    assert [p.shape for p in logits.parameters] == [(VOCAB, 16 if model_type == "opt" else 32)]
    assert torch.equal(logits.materialize(), again(hidden).materialize())
    assert not torch.equal(logits.materialize(), other(hidden).materialize())
    assert sum(p.numel() for p in head.parameters()) == model.aux_head_parameters()
    assert type(head.norm) is type(model.build_layer(4).norm)
    CausalLMLoss()(logits, shifted(tokens())).backward()
    assert all(p.grad is not None and p.grad.any() for p in head.parameters())


def test_layer_specs_are_deepspeeds() -> None:
    specs = CausalLM(tiny("gpt2")).layer_specs()
    assert all(isinstance(spec, LayerSpec) for spec in specs)
    names = [spec.typename.__name__ for spec in specs]
    assert names == ["EmbeddingLayer", "DecoderLayer", "DecoderLayer", "DecoderLayer", "HeadLayer"]
    assert all(type(spec.build()) is spec.typename for spec in specs)


def test_ties_are_reported_and_cut() -> None:
    config = tiny("gpt2", tie_word_embeddings=True)
    model = CausalLM(config)
    assert model.was_tied and config.tie_word_embeddings
    assert not CausalLM(tiny("gpt2", tie_word_embeddings=False)).was_tied
    layers = build(model)
    full = whole(config, layers)
    assert not full.config.tie_word_embeddings
    assert not torch.equal(full.get_input_embeddings().weight, full.get_output_embeddings().weight)


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "qwen3", "gpt_neox", "mixtral", "opt"])
def test_export_round_trip(model_type: str, tmp_path: Path) -> None:
    config = tiny(model_type, tie_word_embeddings=True)
    layers = perturbed(build(CausalLM(config)))
    full = whole(config, layers)
    full.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        logits = run(layers, tokens()).materialize()
        assert (loaded(input_ids=tokens()).logits - logits).abs().max() <= 1e-6
    generated = loaded.generate(tokens(1, 3), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert generated.shape == (1, 6) and generated[0, 3] == logits_after(layers, 3).argmax()


def logits_after(layers: list[nn.Module], length: int) -> Tensor:
    with torch.no_grad():
        return run(layers, tokens(1, length)).materialize()[0, -1]


def test_assembled_weights_are_copies_in_the_dtype_of_training() -> None:
    config = tiny("llama")
    layers = [layer.bfloat16() for layer in build(CausalLM(config))]
    full = whole(config, layers)
    before = logits_of(full)
    for layer in layers:
        for parameter in layer.parameters():
            parameter.data.zero_()
    assert full.dtype == full.config.dtype == torch.bfloat16
    assert torch.equal(logits_of(full), before)


def logits_of(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens()).logits


def test_assemble_names_what_does_not_fit() -> None:
    config = tiny("llama")
    state = {index: layer.state_dict() for index, layer in enumerate(build(CausalLM(config)))}
    norm = "layer.input_layernorm.weight"
    without = {**state, 2: {k: v for k, v in state[2].items() if k != norm}}
    for wrong, message in (
        ({k: v for k, v in state.items() if k != 3}, r"missing \[3\]"),
        ({**state, 5: {}}, r"unknown \[5\]"),
        (without, r"missing \['model.layers.1.input_layernorm.weight'\]"),
        ({**state, 1: {**state[1], "layer.extra": torch.ones(1)}}, r"unknown \['model.layers.0.extra'\]"),
        ({**state, 1: {**state[1], "norm.weight": torch.ones(1)}}, "layer 1 has a weight 'norm.weight'"),
        ({**state, 2: {**state[2], norm: torch.ones(5)}}, r"input_layernorm.weight \(5,\) instead of \(32,\)"),
    ):
        with pytest.raises(ModelError, match=message):
            assemble(config, wrong)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: tiny("bart"), "BartDecoder of model type 'bart' has no final norm"),
        (lambda: tiny("t5"), "model type 't5' has no causal language model in transformers"),
        (lambda: AutoConfig.for_model("gemma3"), r"'gemma3' is of more than text: .* \('gemma3_text'\)"),
        (lambda: tiny("opt", layerdrop=0.1), "layerdrop=0.1.*'opt'.*set it to 0.0"),
        (lambda: tiny("gpt2", add_cross_attention=True), "cross attention"),
        (lambda: tiny("llama", is_causal=False), "only causal models"),
        (lambda: tiny("opt", do_layer_norm_before=False), "OPTDecoder of model type 'opt' has no final norm"),
    ],
)
def test_models_that_cannot_be_cut_are_refused_by_name(config: Any, message: str) -> None:
    with pytest.raises(InterlockingError, match=message):
        CausalLM(config())


def test_eager_attention_is_causal_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny("llama")
    config._attn_implementation = "eager"
    layers = build(CausalLM(config))
    hidden = torch.randn(1, 6, 32)
    changed = torch.cat([hidden[:, :-1], torch.randn(1, 1, 32)], dim=1)
    assert torch.allclose(layers[1](hidden)[:, :-1], layers[1](changed)[:, :-1], atol=1e-6)
    monkeypatch.setattr(transformers.models.llama.modeling_llama, "create_causal_mask", lambda **_: None)
    with pytest.raises(ModelError, match="eager attention got no mask"):
        build(CausalLM(config))[1](hidden)
