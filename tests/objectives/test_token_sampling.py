"""Auxiliary losses on a part of the positions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ibp_deepspeed import InterlockedReference, InterlockingConfig
from ibp_deepspeed.config.interlocking import AuxHeadConfig
from ibp_deepspeed.errors import ConfigError, InterlockingError
from ibp_deepspeed.models import CausalLM
from ibp_deepspeed.objectives.cross_entropy import CausalLMLoss, LazyLogits
from ibp_deepspeed.objectives.token_sampling import TokenSample
from tests.models.test_causal_lm import tiny


def test_draws_repeat_and_differ_by_seed_batch_and_loss() -> None:
    sample, other = TokenSample(0.3, seed=1), TokenSample(0.3, seed=2)
    first = sample.positions(batch=4, loss=2, tokens=101)
    assert len(first) == 31 and torch.equal(first, first.unique()) and first[0] >= 0 and first[-1] <= 100
    assert torch.equal(first, TokenSample(0.3, seed=1).positions(4, 2, 101))
    for draw in (sample.positions(5, 2, 101), sample.positions(4, 1, 101), other.positions(4, 2, 101)):
        assert not torch.equal(first, draw)
    drawn = torch.cat([sample.positions(batch, 0, 20) for batch in range(2000)]).bincount(minlength=20)
    assert drawn.min() > 0.9 * drawn.float().mean(), "every position has its turn"


class Head(nn.Module):
    """A readout as lazy logits."""

    def __init__(self) -> None:
        super().__init__()
        self.readout = nn.Linear(4, 7)

    def forward(self, hidden: Tensor) -> LazyLogits:
        return LazyLogits(hidden, self.readout, tuple(self.readout.parameters()))


def test_the_loss_and_its_gradient_are_those_of_the_positions() -> None:
    torch.manual_seed(0)
    head, hidden, labels = Head(), torch.randn(2, 10, 4, requires_grad=True), torch.randint(7, (2, 10))
    outputs, chosen = TokenSample(0.25, 0).select(head(hidden), labels, batch=3, loss=1)
    CausalLMLoss()(outputs, chosen).backward()
    got, at = hidden.grad, TokenSample(0.25, 0).positions(3, 1, 20)
    assert got is not None and torch.equal(got.flatten(0, 1).abs().sum(1).nonzero().squeeze(1), at)
    hidden.grad = None
    logits = head.readout(hidden).flatten(0, 1)[at]
    nn.functional.cross_entropy(logits, labels.flatten()[at]).backward()
    torch.testing.assert_close(got, hidden.grad)


def test_evaluation_and_the_last_stage_use_all_positions() -> None:
    torch.manual_seed(0)
    stages, heads = [nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), Head())], [Head()]
    inputs, labels = torch.randn(2, 10, 4), torch.randint(7, (2, 10))
    everything = InterlockedReference(stages, heads, CausalLMLoss(), {"strategy": "local"})
    part = InterlockedReference(stages, heads, CausalLMLoss(), {"strategy": "local", "aux_head": {"aux_tokens": 0.2}})
    assert torch.equal(part.evaluate([(inputs, labels)]), everything.evaluate([(inputs, labels)]))
    got, want = part.accumulate([(inputs, labels)]), everything.accumulate([(inputs, labels)])
    assert got[1] == want[1] and got[0] != want[0]


def test_full_logits_are_refused() -> None:
    with pytest.raises(InterlockingError, match="needs heads that return LazyLogits, not a Tensor"):
        TokenSample(0.5, 0).select(torch.zeros(2, 3, 7), torch.zeros(2, 3), 0, 0)


def test_low_rank_readouts_have_two_factors() -> None:
    model = CausalLM(tiny("llama"))
    head = model.aux_head(0, AuxHeadConfig(rank=3))
    hidden, vocabulary = model.hidden_size, model.vocab_size
    assert head(torch.zeros(1, 2, hidden)).materialize().shape == (1, 2, vocabulary)
    full, low = (model.aux_head_parameters(options) for options in (AuxHeadConfig(), AuxHeadConfig(rank=3)))
    assert full - low == hidden * vocabulary - 3 * (hidden + vocabulary)


def test_wrong_options_are_refused() -> None:
    for options, message in (
        ({"aux_tokens": 0}, "aux_tokens.*greater than 0"),
        ({"aux_tokens": 1.5}, "aux_tokens.*less than or equal to 1"),
        ({"rank": 8, "readout": "shared"}, 'rank is for readout "private", the readout is "shared"'),
    ):
        with pytest.raises(ConfigError, match=message):
            InterlockingConfig.parse({"aux_head": options})
