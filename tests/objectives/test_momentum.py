"""Heads with slow copies of the layers behind them, by hand. In processes: tests/engine/test_slow_layers.py."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import nn

from ibp_deepspeed import InterlockedReference
from ibp_deepspeed.config.interlocking import InterlockingConfig
from ibp_deepspeed.errors import ConfigError
from ibp_deepspeed.objectives.momentum import Momentum
from ibp_deepspeed.objectives.slow_layers import SlowLayers, completed

WIDTH = 4


class Head(nn.Module):
    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.slow, self.readout = SlowLayers(layers, WIDTH, torch.float64), nn.Linear(WIDTH, 3, dtype=torch.float64)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.readout(self.slow(hidden))
        return outputs


def layer() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH, dtype=torch.float64), nn.Tanh())


def reference(**options: Any) -> InterlockedReference:
    """Two stages; the head of the first has a copy of the second's first layer, other values at first."""
    torch.manual_seed(0)
    stages = [nn.Sequential(layer()), nn.Sequential(layer(), nn.Linear(WIDTH, 3, dtype=torch.float64))]
    block = {"strategy": "local", "aux_head": {"objective": {"name": "momentum", **options}}}
    return InterlockedReference(stages, [Momentum(Head([layer()]))], nn.functional.mse_loss, block)


def sample() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(5, WIDTH, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)


def test_values_and_gradients() -> None:
    """readout(f̄(h) + B h), with B = 0 as at first and with another; gradients go through f̄ and to all but f̄."""
    made = reference()
    head, stages = cast(Any, made.aux_heads[0]), cast(Any, made.stages)
    copied, followed, b = head.slow.layers[0][0], stages[1][0][0], head.slow.correction.weight
    assert torch.equal(copied.weight, followed.weight) and torch.equal(copied.bias, followed.bias)
    assert not b.any()
    trained = [*stages[0].parameters(), *head.readout.parameters(), b]
    for value in (torch.zeros(WIDTH, WIDTH), torch.randn(WIDTH, WIDTH)):
        with torch.no_grad():
            b.copy_(value)
        inputs, labels = sample()
        hidden = stages[0](inputs)
        looked = torch.tanh(hidden @ followed.weight.detach().T + followed.bias.detach()) + hidden @ b.T
        by_hand = nn.functional.mse_loss(looked @ head.readout.weight.T + head.readout.bias, labels)
        want = torch.autograd.grad(by_hand, trained)
        assert made.accumulate([(inputs, labels)])[0].item() == pytest.approx(by_hand.item())
        for parameter, gradient in zip(trained, want, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)
            parameter.grad = None
        assert want[-1].any() and copied.weight.grad is None


def test_the_rule() -> None:
    """A head's copy in each batch, from the history of the layer alone."""
    made = reference(interval=3, delay=4, average=0.25)
    optimizer = torch.optim.SGD([p for k in range(2) for p in made.parameters(k)], lr=0.1)
    copied, followed = cast(Any, made.aux_heads[0]).slow.layers[0][0], cast(Any, made.stages[1])[0][0]
    history: list[torch.Tensor] = []
    for batch in range(14):
        history.append(followed.weight.detach().clone())
        made.accumulate([sample()])
        want = history[0]
        for taken in range(3, batch - 4 + 1, 3):
            want = 0.25 * want + 0.75 * history[taken]
        torch.testing.assert_close(copied.weight, want)
        optimizer.step()
        optimizer.zero_grad()


def test_what_a_checkpoint_lacks() -> None:
    """Another shape is no average of these; of what is due the newest before takes its place, or the average."""
    now = [torch.zeros(2)]
    state = {"taken": {2: [torch.ones(2)], 9: [torch.ones(2)]}, "average": [torch.full((2,), 5.0)]}
    found = completed(state, [1, 2, 3], now, strict=False, path="file")
    assert found is not None and sorted(found["taken"]) == [1, 2, 3]
    assert [found["taken"][batch][0][0].item() for batch in (1, 2, 3)] == [5, 1, 1]
    assert completed(None, [], now, strict=False, path="file") is None
    assert completed(state, [], [torch.zeros(3)], strict=False, path="file") is None
    with pytest.raises(Exception, match="when batch 4 began, but file holds those of batches"):
        completed(state, [2, 4], now, strict=True, path="file")
    with pytest.raises(Exception, match="copies of layers in other shapes, but file holds"):
        completed(state, [2], [torch.zeros(3)], strict=True, path="file")


@pytest.mark.parametrize(
    ("head", "sentence"),
    [
        ({"blocks": 1}, "blocks = 1 and objective momentum don't go together: copied layers are the head's blocks"),
        (
            {"borrow": 2},
            "borrow = 2 and objective momentum don't go together: a head is behind the next stage's",
        ),
        ({"objective": {"name": "momentum", "average": 1.0}}, "average of momentum: input should be less than 1"),
        ({"objective": {"name": "momentum", "interval": 0}}, "interval of momentum: input should be greater"),
        (
            {"objective": {"name": "momentum", "blocks": 1}},
            "no option of momentum, which has layers, average",
        ),
    ],
)
def test_options_that_do_not_go_together(head: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        InterlockingConfig.parse({"aux_head": {"objective": "momentum", **head}})
