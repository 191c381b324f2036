"""Reconstruction of the input beside the label. In processes: tests/engine/test_named_objectives.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ibp_deepspeed.config.interlocking import AuxHeadConfig
from ibp_deepspeed.errors import InterlockingError
from ibp_deepspeed.models import CausalLM
from ibp_deepspeed.models.beside import InputDecoder
from ibp_deepspeed.objectives.cross_entropy import CausalLMLoss
from ibp_deepspeed.objectives.reconstruction import Reconstruction, inputs_of
from tests.models.test_causal_lm import shifted, tiny, tokens

WHERE = {"batch": 2, "micro_batch": 1, "index": 0}


def objective(after: int = 1, weight: float = 0.6, **options: Any) -> Reconstruction:
    given = AuxHeadConfig.model_validate({"objective": {"name": "reconstruction", "weight": weight}, **options})
    made = CausalLM(tiny("llama")).objective(0, given, after)
    assert isinstance(made, Reconstruction)
    return made.configured(given, CausalLMLoss())


def test_inputs_are_the_labels_of_the_position_before() -> None:
    inputs = tokens()
    found, labels = inputs_of(shifted(inputs)), shifted(inputs)
    assert (found[:, 0] == -100).all() and torch.equal(found[:, 1:], inputs[:, 1:])
    labels[0, 3] = -100
    assert inputs_of(labels)[0, 4] == -100 and inputs_of(labels)[0, 3] == inputs[0, 3]


def test_equals_plain_autograd_on_full_logits() -> None:
    """Value and gradients of hidden states and head, 1e-6; evaluations are the prediction."""
    made, inputs = objective(chunk_tokens=5), tokens()
    labels = shifted(inputs)
    hidden = torch.randn(*inputs.shape, 32, requires_grad=True)
    head, outputs = made.module, made.outputs(hidden)
    decoder = head.beside
    assert isinstance(decoder, InputDecoder)
    decoded = decoder.outer(decoder.inner(decoder.norm(hidden)))[:, 1:]
    prediction = F.cross_entropy(outputs.materialize().flatten(0, 1), labels.flatten())
    want = prediction + 0.6 * (1 - 1 / 3) * F.cross_entropy(decoded.flatten(0, 1), inputs[:, 1:].flatten())
    got = made.training_loss(outputs, labels, **WHERE)
    torch.testing.assert_close(got, want)
    trained = [hidden, *head.parameters()]
    for a, b in zip(*(torch.autograd.grad(loss, trained, retain_graph=True) for loss in (got, want)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(made.measure(outputs, labels), prediction)


def test_the_weight_falls_with_depth() -> None:
    assert [objective(after).factor for after in (0, 1, 2)] == pytest.approx([0.6, 0.4, 0.2])


def test_a_part_of_the_positions_is_the_same_for_both() -> None:
    made, inputs = objective(aux_tokens=0.4), tokens()
    labels, outputs = shifted(inputs), made.outputs(torch.randn(*inputs.shape, 32))
    assert made.positions is not None
    chosen = made.positions.positions(2, 0, labels.numel())
    rows, decoded = (logits.materialize().flatten(0, 1)[chosen] for logits in (outputs, outputs.beside(outputs.states)))
    want = F.cross_entropy(rows, labels.flatten()[chosen])
    want = want + made.factor * F.cross_entropy(decoded, inputs_of(labels).flatten()[chosen])
    torch.testing.assert_close(made.training_loss(outputs, labels, **WHERE), want)


def test_a_head_without_a_decoder_is_refused() -> None:
    given = AuxHeadConfig.model_validate({"objective": "reconstruction"})
    made = Reconstruction(nn.Linear(4, 5)).configured(given, CausalLMLoss())
    with pytest.raises(InterlockingError, match="reconstruction needs heads of a cut language model"):
        made.training_loss(made.outputs(torch.randn(1, 3, 4)), torch.zeros(1, 3, dtype=torch.int64), **WHERE)
