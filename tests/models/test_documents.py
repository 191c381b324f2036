"""Documents in one row don't see each other: everything is as if each were alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ibp_deepspeed.config.interlocking import AuxHeadConfig
from ibp_deepspeed.documents import Documents, at_hand, reading
from ibp_deepspeed.models import CausalLM, ModelError
from ibp_deepspeed.models.layers import AuxiliaryHead
from tests.models.test_causal_lm import FAMILIES, SEQUENCE, VOCAB, build, perturbed, run, tiny, tokens, whole

CPU = torch.device("cpu")
ROWS = [[5, 6, 1], [12]]
"""Lengths of the documents of two rows; some are longer than the models' sliding windows."""


def packed() -> tuple[Tensor, Documents]:
    """Tokens and documents of the rows."""
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in ROWS])
    documents = Documents.of(positions, CPU)
    assert documents is not None
    return tokens(), documents


def alone(input_ids: Tensor, run: Any) -> Tensor:
    """What ``run`` gives for each document by itself, put together again. [B, S, …]"""
    rows = []
    for row, lengths in zip(input_ids, ROWS, strict=True):
        rows.append(torch.cat([run(part[None])[0] for part in row.split(lengths)]))
    return torch.stack(rows)


@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_logits_are_those_of_each_document_alone(model_type: str) -> None:
    config = tiny(model_type)
    layers = perturbed(build(CausalLM(config)))
    input_ids, documents = packed()
    with reading(documents):
        logits = run(layers, input_ids).materialize()
    full = whole(config, layers)
    want = alone(input_ids, lambda ids: full(input_ids=ids, use_cache=False).logits)
    assert logits.shape == (2, SEQUENCE, VOCAB) and want.std() > 1e-3
    assert (logits - want).abs().max() <= 2e-6 * want.abs().max()
    crossing = run(layers, input_ids).materialize()
    assert (logits[0, 5:] - crossing[0, 5:]).abs().max() > 1e-3, "it would make a difference"


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3_text", "gpt_oss", "mixtral"])
@torch.no_grad()
def test_blocks_of_a_head_see_the_same_documents(model_type: str) -> None:
    model = CausalLM(tiny(model_type))
    head: AuxiliaryHead = model.aux_head(0, AuxHeadConfig(blocks=2), after=1).eval()
    hidden = torch.randn(2, SEQUENCE, 32, generator=torch.Generator().manual_seed(0))
    _, documents = packed()
    with reading(documents):
        logits = head(hidden).materialize()
    want = alone(hidden, lambda part: head(part).materialize())
    assert (logits - want).abs().max() <= 2e-6
    assert (head(hidden).materialize() - want).abs().max() > 1e-3


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2"])
def test_gradients_are_the_sum_over_documents(model_type: str) -> None:
    layers = build(CausalLM(tiny(model_type)))
    input_ids, documents = packed()
    parameters = [p for layer in layers for p in layer.parameters()]
    with reading(documents):
        got = torch.autograd.grad(run(layers, input_ids).materialize().square().sum(), parameters)
    total = alone(input_ids, lambda ids: run(layers, ids).materialize()).square().sum()
    for one, other in zip(got, torch.autograd.grad(total, parameters), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


def test_bf16_rotary_tables_of_documents_stay_exact() -> None:
    layers = [layer.bfloat16() for layer in build(CausalLM(tiny("llama", max_position_embeddings=4096)))]
    positions = torch.cat([torch.arange(7), torch.arange(2050)])[None]
    documents = Documents.of(positions, CPU)
    assert documents is not None
    with reading(documents), torch.no_grad():
        layers[1](torch.zeros(1, 2057, 32, dtype=torch.bfloat16))
    ((inputs, *_),) = documents.made.values()
    cos = inputs["position_embeddings"][0].float()
    angle = torch.arange(2050)[:, None] * 10_000 ** (-torch.arange(0, 8, 2) / 8)
    assert (cos[0, 7:, :4] - angle.cos()).abs().max() < 0.005


def test_masks_are_made_once_for_a_micro_batch_and_go_with_it() -> None:
    layers = build(CausalLM(tiny("gemma3_text")))
    input_ids, documents = packed()
    with reading(documents):
        run(layers, input_ids)
        run(layers, input_ids)
    (recorded,) = documents.made.values()
    masks = {id(inputs["attention_mask"]) for inputs in recorded}
    assert len(masks) <= 2, "one of each kind of layer"
    assert at_hand() is None


def test_a_row_that_is_one_document_needs_no_mask() -> None:
    assert Documents.of(None, CPU) is None
    assert Documents.of(torch.arange(6).repeat(3, 1), CPU) is None
    assert Documents.of(torch.tensor([[0, 1, 2, 0]]), CPU) is not None


def test_attention_without_such_masks_is_refused() -> None:
    CausalLM(tiny("llama")).check_document_masks()
    config = tiny("llama")
    config._attn_implementation = "flex_attention"
    with pytest.raises(ModelError, match="attention 'flex_attention' .* use sdpa or eager, or train with --no-doc"):
        CausalLM(config).check_document_masks()
