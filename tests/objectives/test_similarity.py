"""Similarity matching is the mean squared difference of two correlation matrices. In processes:
tests/engine/test_named_objectives.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ibp_deepspeed.checkpoint.manifest import head_structure
from ibp_deepspeed.config.interlocking import AuxHeadConfig
from ibp_deepspeed.errors import InterlockingError
from ibp_deepspeed.models import CausalLM
from ibp_deepspeed.models.costs import head_operations
from ibp_deepspeed.objectives.cross_entropy import CausalLMLoss
from ibp_deepspeed.objectives.similarity import PredSim, similarity_loss
from tests.models.test_causal_lm import SEQUENCE, VOCAB, shifted, tiny, tokens

WHERE = {"batch": 2, "micro_batch": 1, "index": 0}


def correlations(rows: Tensor) -> Tensor:
    return torch.corrcoef(rows)


def test_equals_correlation_matrices_of_torch() -> None:
    """The labels' as one-hot vectors; value and gradient in fp64, 1e-12."""
    torch.manual_seed(0)
    states, labels = torch.randn(9, 6, dtype=torch.float64, requires_grad=True), torch.randint(5, (9,))
    want = F.mse_loss(correlations(states), correlations(F.one_hot(labels, 5).double()))
    got = similarity_loss(states, labels, 5)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
    grads = [torch.autograd.grad(loss, states)[0] for loss in (got, want)]
    torch.testing.assert_close(*grads, atol=1e-12, rtol=1e-12)


def test_tokens_without_a_label_do_not_count() -> None:
    torch.manual_seed(0)
    states, labels = torch.randn(9, 6, requires_grad=True), torch.randint(5, (9,))
    labels[2] = labels[7] = -100
    kept = labels >= 0
    got = similarity_loss(states, labels, 5)
    torch.testing.assert_close(got, similarity_loss(states[kept], labels[kept], 5))
    assert not torch.autograd.grad(got, states)[0][~kept].any()
    nothing = similarity_loss(states, torch.full_like(labels, -100), 5)
    assert nothing == 0 and not torch.autograd.grad(nothing, states)[0].any()
    constant = torch.ones(3, 6, requires_grad=True)  # no direction: finite all the same
    assert torch.autograd.grad(similarity_loss(constant, labels[:3], 5), constant)[0].isfinite().all()


def objective(**options: Any) -> PredSim:
    given = AuxHeadConfig.model_validate({"objective": {"name": "predsim", **options}})
    made = CausalLM(tiny("llama")).objective(0, given, 1)
    assert isinstance(made, PredSim)
    return made.configured(given, CausalLMLoss())


def test_the_loss_is_the_mix_and_evaluations_the_prediction() -> None:
    made = objective(beta=0.9, tokens=20)
    inputs = tokens()
    labels, hidden = shifted(inputs), torch.randn(*inputs.shape, 32)
    outputs = made.outputs(hidden)
    drawn = made.drawn(labels.numel(), **WHERE)
    assert len(drawn.unique()) == len(drawn) == min(20, labels.numel())
    assert not torch.equal(drawn, made.drawn(labels.numel(), **{**WHERE, "micro_batch": 0}))
    beside = made.module.beside
    assert isinstance(beside, nn.Linear)
    prediction = CausalLMLoss()(outputs, labels)
    similarity = similarity_loss(beside(hidden.flatten(0, 1)[drawn]), labels.flatten()[drawn], VOCAB)
    torch.testing.assert_close(made.training_loss(outputs, labels, **WHERE), 0.1 * prediction + 0.9 * similarity)
    assert torch.equal(made.measure(outputs, labels), prediction)


def test_a_head_without_hidden_states_is_refused() -> None:
    given = AuxHeadConfig.model_validate({"objective": "predsim"})
    made = PredSim(nn.Linear(4, 5)).configured(given, CausalLMLoss())
    with pytest.raises(InterlockingError, match="predsim needs heads of a cut language model"):
        made.training_loss(made.outputs(torch.randn(1, 3, 4)), torch.zeros(1, 3, dtype=torch.int64), **WHERE)


def test_costs_are_those_of_one_sequence_a_micro_batch() -> None:
    model = CausalLM(tiny("llama"))
    plain, more = (
        head_operations(model, AuxHeadConfig.model_validate({"objective": given}), SEQUENCE)
        for given in ("cross_entropy", {"name": "predsim", "tokens": 4})
    )
    size, share = model.hidden_size, 4 / SEQUENCE
    assert more.forward - plain.forward == pytest.approx(share * (size**2 + 4 * size))
    assert more.weight_gradient - plain.weight_gradient == pytest.approx(share * size**2)


def test_checkpoints_tell_heads_with_a_map_apart_and_name_no_other_objective() -> None:
    plain, soft, more = (
        head_structure(AuxHeadConfig.model_validate({"objective": name}))
        for name in ("cross_entropy", "label_smoothing", "predsim")
    )
    assert plain is not None and plain == soft and more == {**plain, "objective": "predsim"}
