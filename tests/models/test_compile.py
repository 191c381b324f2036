"""Of a language model its decoder layers are compiled, those of heads too, and the numbers stay."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import nn

from ibp_deepspeed.errors import ConfigError
from ibp_deepspeed.models.build import virtual_pipeline
from ibp_deepspeed.models.causal_lm import CausalLM
from ibp_deepspeed.models.layers import DecoderLayer
from ibp_deepspeed.single_process.virtual_pipeline import VirtualPipeline
from tests.models.test_causal_lm import shifted, tiny, tokens


def pipeline(compiled: bool) -> VirtualPipeline:
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "interlocking": {"strategy": "pairwise", "mode": "window", "compile": compiled, "aux_head": {"blocks": 1}},
    }
    return virtual_pipeline(CausalLM(tiny("llama", num_hidden_layers=2), seed=3), settings, num_stages=2)


def compiled_modules(run: VirtualPipeline) -> tuple[list[nn.Module], list[nn.Module]]:
    """Compiled ones, and the decoder layers of trunks and heads."""
    modules = [m for part in (*run.reference.stages, *run.reference.aux_heads.values()) for m in part.modules()]
    layers = [module.layer for module in modules if isinstance(module, DecoderLayer)]
    return [module for module in modules if module._compiled_call_impl is not None], layers


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on CPU needs g++")
def test_decoder_layers_are_compiled_and_train_as_eager_ones() -> None:
    eager, compiled = pipeline(False), pipeline(True)
    found, layers = compiled_modules(compiled)
    assert found == layers and layers and compiled_modules(eager)[0] == []
    inputs = tokens()
    for _ in range(3):
        expected, losses = (run.train_batch(iter([(inputs, shifted(inputs))])) for run in (eager, compiled))
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)
    names = [[name for stage in run.reference.stages for name in stage.state_dict()] for run in (eager, compiled)]
    assert names[0] == names[1]


def test_without_a_compiler_the_option_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match='"interlocking.compile" needs a C\\+\\+ compiler on CPU'):
        pipeline(True)
