"""What is measured of a layer is what the engine does, with the gradients of plain autograd."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing import ProcessRaisedException
from transformers import AutoConfig

from ibp_deepspeed.config.interlocking import AuxHeadConfig
from ibp_deepspeed.models import CausalLM
from ibp_deepspeed.models.profiling import specimen
from ibp_deepspeed.models.profiling.measure import make_profile, measure, measure_message
from ibp_deepspeed.models.profiling.specimen import Specimen
from ibp_deepspeed.models.profiling.specimens import Specimens
from ibp_deepspeed.models.profiling.subject import config_values
from tests.models.test_costs import llama

CPU = torch.device("cpu")
HEADS: list[dict[str, Any]] = [
    {},
    {"blocks": 1},
    {"readout": "shared"},
    {"rank": 4},
    {"negatives": 8},
    {"objective": "predsim"},
    {"objective": "reconstruction"},
    {"objective": "momentum"},
    {"objective": "stochastic_layerwise"},
    {"objective": "distillation"},
    {"objective": "local_critic"},
]


def things(dtype: torch.dtype = torch.float32, kind: str = "llama", **options: Any) -> list[Specimen]:
    model = CausalLM(llama(kind=kind).hf_config, dtype=dtype)
    return Specimens(model, AuxHeadConfig(**options), samples=2, sequence_length=8).every()


def by_autograd(thing: Specimen) -> list[torch.Tensor | None]:
    """Gradients of one pass through the module itself, which no other code of ours goes through."""
    outputs = thing._run(thing._whole, thing._inputs)
    assert thing._gradient is not None
    found = torch.autograd.grad(outputs, [p for p in thing.parameters if p.requires_grad], thing._gradient)
    left = iter(found)
    return [next(left) if p.requires_grad else None for p in thing.parameters]


@pytest.mark.parametrize("options", HEADS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_ways_give_autograds_gradients(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Of embedding, decoder layer, last layer and head; sums of two micro-batches, in bf16 in fp32."""
    for thing in things(dtype, **options):
        for way in (thing.whole, thing.split):
            with thing.on(CPU):
                way()
                way()
                sums, expected = thing.gradients(), by_autograd(thing)
            for parameter, total, once in zip(thing.parameters, sums, expected, strict=True):
                assert (total is None) == (once is None) == (not parameter.requires_grad), thing.name
                if total is not None and once is not None:
                    assert total.dtype == torch.float32
                    torch.testing.assert_close(total, 2 * once.float())
        assert all(p.grad is None for p in thing.parameters), "they would stay on the device"


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_weight_gradients_of_linear_layers_come_after_the_input_gradient(kind: str) -> None:
    layer = next(thing for thing in things(kind=kind) if thing.name == "decoder layer 1")
    put_off: list[bool] = []
    update = layer._update_weights

    def before(live: Any) -> None:
        put_off.extend(p.grad is None for p in layer.parameters if p.dim() > 1)
        update(live)

    layer._update_weights = before  # type: ignore[method-assign]
    with layer.on(CPU):
        times = layer.split()
    assert put_off and all(put_off) and times.weight_gradient > 0 and times.input_gradient > 0


def test_compiled_layers_are_not_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """An input gradient alone takes what it takes; the compiler itself is not ours."""
    compiled: list[list[nn.Module]] = []
    monkeypatch.setattr(specimen, "compile_layers", lambda layers, heads, device: compiled.append(heads))
    make = Specimens(llama(), AuxHeadConfig(), samples=2, sequence_length=8, compiled=True)
    layer = make.layer(1)
    for _ in range(2):
        with layer.on(CPU):
            whole, split = layer.micro_batch()
    assert len(compiled) == 1 and compiled[0] == [layer._whole]
    assert whole.weight_gradient == split.weight_gradient == 0 < min(whole.input_gradient, split.input_gradient)


def test_rounds_are_interleaved_with_one_layer_at_a_time_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    here: list[str] = []
    on = Specimen.on

    @contextmanager
    def noted(self: Specimen, device: torch.device) -> Iterator[None]:
        assert not here
        here.append(self.name)
        seen.append(self.name)
        with on(self, device):
            yield
        here.clear()

    monkeypatch.setattr(Specimen, "on", noted)
    every = things()
    pieces = measure(every, CPU, repeats=2)
    names = ["embedding", "decoder layer 1", "last layer and loss", "auxiliary head"]
    assert seen == 2 * names == 2 * [piece.name for piece in pieces]
    assert [piece.layers for piece in pieces] == [[0], [1, 2, 3, 4], [5], []]


def test_layers_that_differ_are_measured_each() -> None:
    """By attention, by the kind of feed-forward layer; others stand for each other."""
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 4, "vocab_size": 64, "intermediate_size": 48}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    mixed: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    mixed |= {"mlp_only_layers": [0]}
    for kind, more, expected in (
        ("llama", {}, [0, 1, 1, 1, 1, 5]),
        ("gemma2", {}, [0, 1, 2, 1, 2, 5]),
        ("qwen3_moe", mixed, [0, 1, 2, 2, 2, 5]),
    ):
        model = CausalLM(AutoConfig.for_model(kind, **{**sizes, **more}))
        assert model.layer_kinds() == expected, kind
    profile = make_profile(
        model, "mixed", AuxHeadConfig(), dtype=torch.float32, samples=1, sequence_length=8, repeats=1, messages=False
    )
    assert [piece.layers for piece in profile.pieces] == [[0], [1], [2, 3, 4], [5]]
    assert profile.pieces[2].parameters > profile.pieces[1].parameters and profile.head.layers == []
    assert profile.message is None and profile.no_message and math.isfinite(profile.pieces[2].work().total)


def test_where_no_message_can_be_measured_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise ProcessRaisedException("Traceback (most recent call last):\n  …\nRuntimeError: no way", 0, 1)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert measure_message(100, 1) == "there is one GPU, and a copy on it is no message"
    monkeypatch.setattr("ibp_deepspeed.models.profiling.measure.message_seconds", fails)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert measure_message(100, 1) == "the two processes failed over nccl: RuntimeError: no way"


def test_what_no_time_depends_on_is_not_compared() -> None:
    one, other = llama(initializer_range=0.1, bos_token_id=3), llama(tie_word_embeddings=True)
    assert config_values(one) == config_values(other) != config_values(llama(vocab_size=97))
