"""Running statistics of batch norms: not moved by a second run, and precise beside 16-bit weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from ibp_deepspeed.running_statistics import RunningStatistics
from ibp_deepspeed.stage.micro_batch import MicroBatchInFlight


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4, momentum=None))


@pytest.mark.parametrize("counted", [False, True])
def test_a_second_run_gives_the_same_and_moves_nothing(counted: bool) -> None:
    """Without the guard it would: so does the test see it. Also of a cumulative mean, which counts its batches."""
    trunk, images = layers(), torch.randn(5, 3, 6, 6)
    once = copy.deepcopy(trunk)
    want = once(images)
    guard: dict[str, Any] = {} if counted else {"again": RunningStatistics([trunk]).kept}
    micro = MicroBatchInFlight(trunk, recompute=True, **guard)
    micro.inputs = images.requires_grad_()
    first = micro.forward(input_gradient_follows=False)
    micro.drop_graph()
    micro.output_gradients[0] = torch.ones_like(first)
    micro.backward_input(0)
    assert micro.recomputations == 1 and torch.equal(micro.outputs, want) and torch.equal(first, want)
    same = all(torch.equal(a, b) for a, b in zip(trunk.buffers(), once.buffers(), strict=True))
    assert same != counted
    trunk.eval()
    assert trunk[1].track_running_stats and not torch.equal(trunk(images), want)


def test_statistics_stay_in_fp32_beside_bf16_weights() -> None:
    """A tenth of a small difference is below bf16's step: its running mean would stand still."""
    norm = nn.BatchNorm1d(1).to(torch.bfloat16)
    rounded = copy.deepcopy(norm)
    RunningStatistics([nn.Sequential(norm)])
    norm.running_mean, rounded.running_mean = torch.ones(1), torch.ones(1, dtype=torch.bfloat16)
    for _ in range(40):
        row = torch.full((4, 1), 1.0078125, dtype=torch.bfloat16, requires_grad=True)
        output = norm(row)
        rounded(row)
    assert output.dtype == torch.bfloat16 and float(norm.running_mean) == pytest.approx(1.0077, abs=1e-4)
    assert float(rounded.running_mean) == 1.0, "what would happen otherwise"
    output.sum().backward()
    assert norm.bias.grad is not None and norm.bias.grad.dtype == torch.bfloat16 and float(norm.bias.grad) == 4.0
    assert norm.weight.dtype == torch.bfloat16 and norm.state_dict()["running_mean"].dtype == torch.float32
