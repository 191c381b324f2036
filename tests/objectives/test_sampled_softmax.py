"""Auxiliary losses over the label and drawn tokens. In processes: tests/engine/test_shared_readout.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ibp_deepspeed import InterlockedReference, InterlockingConfig
from ibp_deepspeed.config.interlocking import AuxHeadConfig
from ibp_deepspeed.errors import ConfigError, InterlockingError
from ibp_deepspeed.objectives import sampled_softmax
from ibp_deepspeed.objectives.cross_entropy import CausalLMLoss, LazyLogits
from ibp_deepspeed.objectives.sampled_softmax import NegativeSample, inclusion_probabilities, sampled_cross_entropy
from tests.objectives.test_token_sampling import Head

V, H = 23, 4
WHERE = {"batch": 2, "micro_batch": 1, "loss": 0}


def example(seed: int = 0, bias: bool = True) -> tuple[LazyLogits, Tensor]:
    torch.manual_seed(seed)
    readout, hidden = nn.Linear(H, V, bias=bias), torch.randn(3, 5, H, requires_grad=True)
    labels = torch.randint(V, (3, 5))
    labels[0, 1] = labels[2, 4] = -100
    return LazyLogits(hidden, readout, tuple(readout.parameters())), labels


def gradients(loss: Tensor, logits: LazyLogits) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [logits.hidden, *logits.parameters]))


@pytest.mark.parametrize("bias", [True, False])
def test_a_sample_of_everything_is_exact(bias: bool) -> None:
    logits, labels = example(bias=bias)
    drawn = NegativeSample(V, seed=3).draw(V, **WHERE)
    assert sorted(drawn[0].tolist()) == list(range(V)) and not drawn[1].any()
    got, want = sampled_cross_entropy(logits, labels, *drawn), CausalLMLoss()(logits, labels)
    torch.testing.assert_close(got, want)
    for a, b in zip(gradients(got, logits), gradients(want, logits), strict=True):
        torch.testing.assert_close(a, b)


@given(st.lists(st.floats(0.01, 1e6), min_size=1, max_size=40), st.data())
@settings(deadline=None)
def test_probabilities_sum_to_the_size_in_proportion_to_the_weights(weights: list[float], data: st.DataObject) -> None:
    size = data.draw(st.integers(1, len(weights)))
    given = torch.tensor(weights, dtype=torch.float64)
    found = inclusion_probabilities(given, size)
    assert found.sum().item() == pytest.approx(size) and found.min() > 0 and found.max() <= 1
    below = found < 1
    if below.any():
        ratio = (found / given)[below]
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
        assert bool((given[~below] >= given[below].max() * (1 - 1e-9)).all())


COUNTS = torch.tensor([1000, 0, 3, 7, 50, 9, 2, 20])


@pytest.mark.parametrize("counts", [None, COUNTS])
def test_tokens_are_drawn_as_often_as_is_said(counts: Tensor | None) -> None:
    sample = NegativeSample(3, 0, counts, by_frequency=counts is not None)
    draws = [sample.draw(8, batch=batch, micro_batch=0, loss=0) for batch in range(4000)]
    assert all(len(set(tokens.tolist())) == 3 for tokens, _ in draws)
    often = torch.cat([tokens for tokens, _ in draws]).bincount(minlength=8) / len(draws)
    said = torch.zeros(8)
    for tokens, log_inclusion in draws:
        said[tokens] = log_inclusion.exp()
    assert said.sum() == pytest.approx(3, abs=1e-4) and (counts is None or said[0] == often[0] == 1)
    torch.testing.assert_close(often, said, atol=0.03, rtol=0.1)


@pytest.mark.parametrize("counts", [None, torch.arange(V)])
def test_the_partition_function_is_right_on_average(counts: Tensor | None) -> None:
    logits, labels = example()
    rows, flat = logits.materialize().detach().flatten(0, 1), labels.flatten()
    counted = flat >= 0
    own = rows[counted].gather(1, flat[counted].unsqueeze(1)).squeeze(1)
    exact = (rows[counted].logsumexp(1) - own).exp()  # Z / exp(o_y)
    sample, total = NegativeSample(6, 1, counts, by_frequency=counts is not None), torch.zeros(len(exact))
    draws = 3000
    for batch in range(draws):
        tokens, log_inclusion = sample.draw(V, batch=batch, micro_batch=0, loss=0)
        readout = logits.readout
        assert isinstance(readout, nn.Linear)
        inputs = logits.hidden.flatten(0, 1)[counted], flat[counted], readout.weight[flat[counted]]
        biases = readout.bias[flat[counted]], readout.weight[tokens], readout.bias[tokens]
        losses = sampled_softmax._losses(*inputs, *biases, tokens, log_inclusion)
        total += losses.detach().exp()
    torch.testing.assert_close(total / draws, exact, rtol=0.05, atol=0)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = example()
    drawn = NegativeSample(6, 0).draw(V, **WHERE)
    whole = sampled_cross_entropy(logits, labels, *drawn)
    expected = gradients(whole, logits)
    monkeypatch.setattr(sampled_softmax, "CHUNK_LOGITS", 24)  # four rows
    parts = sampled_cross_entropy(logits, labels, *drawn)
    torch.testing.assert_close(parts, whole)
    for a, b in zip(gradients(parts, logits), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_rows_that_nobody_drew_get_no_gradient_and_labels_that_do_not_count_none_either() -> None:
    logits, labels = example()
    tokens, log_inclusion = NegativeSample(4, 0).draw(V, **WHERE)
    hidden, weight, bias = gradients(sampled_cross_entropy(logits, labels, tokens, log_inclusion), logits)
    reached = {*tokens.tolist(), *labels[labels >= 0].tolist()}
    assert {i for i in range(V) if weight[i].any()} == reached == {i for i in range(V) if bias[i]}
    assert not hidden[labels < 0].any() and hidden[labels >= 0].any(-1).all()
    nothing = sampled_cross_entropy(logits, torch.full_like(labels, -100), tokens, log_inclusion)
    assert nothing == 0 and not any(g.any() for g in gradients(nothing, logits))


def test_draws_repeat_and_differ_by_seed_batch_micro_batch_and_loss() -> None:
    sample = NegativeSample(6, 1)
    first = sample.draw(V, **WHERE)[0]
    assert torch.equal(first, NegativeSample(6, 1).draw(V, **WHERE)[0])
    for other in ({"batch": 3}, {"micro_batch": 0}, {"loss": 1}):
        assert not torch.equal(first, sample.draw(V, **{**WHERE, **other})[0])
    assert not torch.equal(first, NegativeSample(6, 2).draw(V, **WHERE)[0])


def test_evaluation_and_the_last_stage_are_exact() -> None:
    torch.manual_seed(0)
    stages, heads = [nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), Head())], [Head()]
    batch = [(torch.randn(2, 10, 4), torch.randint(7, (2, 10)))]
    options = {"negatives": 2, "negatives_by": "uniform"}
    everything = InterlockedReference(stages, heads, CausalLMLoss(), {"strategy": "local"})
    part = InterlockedReference(stages, heads, CausalLMLoss(), {"strategy": "local", "aux_head": options})
    assert torch.equal(part.evaluate(batch), everything.evaluate(batch))
    got, want = part.accumulate(batch), everything.accumulate(batch)
    assert got[1] == want[1] and got[0] != want[0]


def test_heads_and_samples_that_do_not_fit_are_refused() -> None:
    logits, labels = example()
    capped = LazyLogits(logits.hidden, lambda rows: rows.tanh(), ())
    where: dict[str, Any] = WHERE
    for outputs, sample, message in (
        (torch.zeros(2, 3, V), NegativeSample(2, 0), "this head returns a Tensor"),
        (capped, NegativeSample(2, 0), "this head caps or scales its logits"),
        (logits, NegativeSample(V + 1, 0), f'"aux_head.negatives" is {V + 1}, the vocabulary has {V} tokens'),
        (logits, NegativeSample(2, 0, by_frequency=True), 'give the heads "token_counts"'),
        (logits, NegativeSample(2, 0, COUNTS, by_frequency=True), f"is of 8 tokens, the vocabulary has {V}"),
    ):
        with pytest.raises(InterlockingError, match=message):
            sample.cross_entropy(outputs, labels, **where)


def test_wrong_options_are_refused() -> None:
    for options, message in (
        ({"negatives": 0}, "negatives.*greater than or equal to 1"),
        ({"negatives": 5, "rank": 4}, "rank and negatives don't go together"),
        ({"negatives_by": "uniform"}, "negatives_by is for negatives"),
    ):
        with pytest.raises(ConfigError, match=message):
            InterlockingConfig.parse({"aux_head": options})
    assert NegativeSample.from_options(AuxHeadConfig(), None) is None
