"""The chunked loss equals ordinary cross entropy on full logits, and never makes full logits."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from ibp_deepspeed.errors import InterlockingError
from ibp_deepspeed.objectives.cross_entropy import CausalLMLoss, LazyLogits, chunked_cross_entropy

TOKENS, HIDDEN, VOCAB = (3, 7), 8, 31


class Head(nn.Module):
    """A readout with every ornament that models have: bias, scale, soft cap."""

    def __init__(self, dtype: torch.dtype = torch.float64, vocab: int = VOCAB, hidden: int = HIDDEN) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(vocab, hidden, generator=generator).to(dtype))
        self.bias = nn.Parameter(torch.randn(vocab, generator=generator).to(dtype))
        self.scale = nn.Parameter(torch.full((1,), 0.7, dtype=dtype))

    def readout(self, rows: Tensor) -> Tensor:
        return 5.0 * torch.tanh(F.linear(rows, self.weight, self.bias) * self.scale / 5.0)

    def forward(self, hidden: Tensor) -> LazyLogits:
        trained = tuple(p for p in self.parameters() if p.requires_grad)
        return LazyLogits(hidden, self.readout, trained)


def states(dtype: torch.dtype = torch.float64) -> Tensor:
    hidden = torch.randn(*TOKENS, HIDDEN, generator=torch.Generator().manual_seed(2))
    return hidden.to(dtype).requires_grad_()


def some_labels(ignored: tuple[int, ...] = (0, 5, 6, 20)) -> Tensor:
    labels = torch.randint(0, VOCAB, TOKENS, generator=torch.Generator().manual_seed(3))
    labels.view(-1)[list(ignored)] = -100
    return labels


def gradients(loss: Tensor, hidden: Tensor, head: Head) -> list[Tensor]:
    inputs = [t for t in (hidden, *head.parameters()) if t.requires_grad]
    return list(torch.autograd.grad(loss, inputs))


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("chunk_tokens", [1, 4, 7, 21, 1000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_equals_cross_entropy_on_full_logits(dtype: torch.dtype, tolerance: float, chunk_tokens: int) -> None:
    hidden, head, labels = states(dtype), Head(dtype), some_labels()
    full = F.cross_entropy(head(hidden).materialize().flatten(0, 1), labels.flatten())
    loss = chunked_cross_entropy(head(hidden), labels, chunk_tokens=chunk_tokens)
    assert loss.dtype == dtype and loss.shape == ()
    assert relative(loss.detach(), full.detach()) <= tolerance
    for got, want in zip(gradients(loss, hidden, head), gradients(full, hidden, head), strict=True):
        assert got.dtype == dtype and relative(got, want) <= tolerance


def test_bf16_sums_parameter_gradients_in_fp32() -> None:
    """One token a chunk: summed in bf16, 512 addends would be off by 2%; here only rounding is left."""
    torch.manual_seed(4)
    hidden = torch.randn(512, HIDDEN).bfloat16().requires_grad_()
    labels = torch.randint(0, VOCAB, (512,))
    exact_hidden, exact_head = hidden.detach().double().requires_grad_(), Head(torch.bfloat16).double()
    exact = chunked_cross_entropy(exact_head(exact_hidden), labels, chunk_tokens=512)
    head = Head(torch.bfloat16)
    loss = chunked_cross_entropy(head(hidden), labels, chunk_tokens=1)
    assert loss.dtype == torch.float32
    assert relative(loss.detach(), exact.detach()) <= 1e-3
    pairs = zip(gradients(loss, hidden, head), gradients(exact, exact_hidden, exact_head), strict=True)
    for got, want in pairs:
        assert got.dtype == torch.bfloat16 and relative(got, want) <= 8e-3


@pytest.mark.parametrize("trained", ["hidden", "parameters", "weight", "nothing"])
def test_any_subset_of_inputs_may_need_gradients(trained: str) -> None:
    hidden, head, labels = states(), Head(), some_labels()
    hidden.requires_grad_(trained == "hidden")
    for name, parameter in head.named_parameters():
        parameter.requires_grad_(trained in ("parameters", name))
    full = F.cross_entropy(head(hidden).materialize().flatten(0, 1), labels.flatten())
    loss = chunked_cross_entropy(head(hidden), labels, chunk_tokens=4)
    assert loss.requires_grad == (trained != "nothing")
    torch.testing.assert_close(loss, full, rtol=1e-12, atol=0)
    if loss.requires_grad:
        for got, want in zip(gradients(loss, hidden, head), gradients(full, hidden, head), strict=True):
            assert relative(got, want) <= 1e-12


def test_a_parameter_that_is_not_used_gets_a_zero_gradient() -> None:
    idle = nn.Parameter(torch.ones(2, dtype=torch.float64))
    hidden, head = states(), Head()
    logits = LazyLogits(hidden, head.readout, (head.weight, idle))
    chunked_cross_entropy(logits, some_labels(), chunk_tokens=4).backward()
    assert idle.grad is not None and not idle.grad.any()
    assert head.weight.grad is not None and head.weight.grad.any()


def test_no_label_that_counts_means_loss_zero_and_gradient_zero() -> None:
    hidden, head = states(), Head()
    labels = torch.full(TOKENS, -100)
    loss = chunked_cross_entropy(head(hidden), labels, chunk_tokens=4)
    assert loss.item() == 0.0
    assert all(not gradient.any() for gradient in gradients(loss, hidden, head))
    assert CausalLMLoss()(head(hidden).materialize(), labels).item() == 0.0


def test_another_ignore_index() -> None:
    hidden, head, labels = states(), Head(), some_labels(())
    full = F.cross_entropy(head(hidden).materialize().flatten(0, 1), labels.flatten(), ignore_index=int(labels[0, 0]))
    loss = chunked_cross_entropy(head(hidden), labels, chunk_tokens=4, ignore_index=int(labels[0, 0]))
    torch.testing.assert_close(loss, full, rtol=1e-12, atol=0)


def test_no_grad_computes_the_loss_only() -> None:
    hidden, head = states(), Head()
    graphs: list[bool] = []

    def readout(rows: Tensor) -> Tensor:
        logits = head.readout(rows)
        graphs.append(logits.requires_grad)
        return logits

    with torch.no_grad():
        logits = LazyLogits(hidden, readout, tuple(head.parameters()))
        loss = chunked_cross_entropy(logits, some_labels(), chunk_tokens=4)
    assert not loss.requires_grad and len(graphs) == 6 and not any(graphs)
    with_grad = chunked_cross_entropy(head(hidden), some_labels(), chunk_tokens=4)
    assert loss.item() == with_grad.item()


def test_vocabulary_product_is_not_computed_again_in_backward() -> None:
    hidden, head = states(), Head()
    calls: list[int] = []

    def readout(rows: Tensor) -> Tensor:
        calls.append(len(rows))
        return head.readout(rows)

    logits = LazyLogits(hidden, readout, tuple(head.parameters()))
    loss = chunked_cross_entropy(logits, some_labels(), chunk_tokens=8)
    loss.backward()
    assert calls == [8, 8, 5]


def test_several_products_over_one_graph_and_scaling() -> None:
    hidden, head = states(), Head()
    loss = chunked_cross_entropy(head(torch.tanh(hidden)), some_labels(), chunk_tokens=4)
    once = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
    thrice = torch.autograd.grad(loss, hidden, torch.tensor(3.0, dtype=torch.float64), retain_graph=True)[0]
    loss.backward()
    torch.testing.assert_close(thrice, 3 * once, rtol=1e-14, atol=0)
    torch.testing.assert_close(hidden.grad, once, rtol=0, atol=0)


def test_gradcheck() -> None:
    labels = some_labels((1,))[:, :3]

    def loss(hidden: Tensor, weight: nn.Parameter, bias: nn.Parameter) -> Tensor:
        logits = LazyLogits(hidden, lambda rows: 3 * torch.tanh(F.linear(rows, weight, bias)), (weight, bias))
        return chunked_cross_entropy(logits, labels, chunk_tokens=4)

    head = Head()
    hidden = states().detach()[:, :3].clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, (hidden, head.weight, head.bias))


def allocations(work: Callable[[], object]) -> tuple[int, int]:
    """Peak bytes above the start, and the bytes of the largest single allocation, while ``work`` runs on the CPU."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    assert profiler.profiler is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max(accumulate(sizes)), max(sizes)


def test_full_logits_never_exist() -> None:
    tokens, vocab, hidden_size, chunk = 1024, 2048, 16, 64
    head = Head(torch.float32, vocab, hidden_size)
    hidden = torch.randn(tokens, hidden_size, requires_grad=True)
    labels = torch.randint(0, vocab, (tokens,))
    logits_bytes = 4 * tokens * vocab

    def full() -> None:
        F.cross_entropy(head(hidden).materialize(), labels).backward()

    def chunked() -> None:
        chunked_cross_entropy(head(hidden), labels, chunk_tokens=chunk).backward()

    full_peak, full_largest = allocations(full)
    peak, largest = allocations(chunked)
    assert full_largest == logits_bytes and full_peak >= 2 * logits_bytes
    weight_bytes = 4 * vocab * hidden_size
    assert largest <= max(4 * chunk * vocab, weight_bytes) < logits_bytes
    assert peak < full_peak / 4 and peak < logits_bytes


def test_causal_lm_loss_takes_full_and_lazy_logits() -> None:
    hidden, head, labels = states(), Head(), some_labels()
    want = F.cross_entropy(head(hidden).materialize().flatten(0, 1), labels.flatten())
    for outputs in (head(hidden), head(hidden).materialize()):
        for loss in (CausalLMLoss(), CausalLMLoss(chunk_tokens=2)):
            torch.testing.assert_close(loss(outputs, labels), want, rtol=1e-12, atol=0)
    low = CausalLMLoss()(head(hidden).materialize().bfloat16(), labels)
    assert low.dtype == torch.float32


def test_default_chunk_is_64_mib_of_fp32_logits() -> None:
    calls: list[int] = []
    vocab = 2**20

    def readout(rows: Tensor) -> Tensor:
        calls.append(len(rows))
        return rows.new_zeros(1, 1).expand(len(rows), vocab)

    with torch.no_grad():
        CausalLMLoss()(LazyLogits(torch.zeros(1, 40, 4), readout, ()), torch.zeros(1, 40, dtype=torch.long))
    assert calls == [0, 16, 16, 8]


def test_wrong_arguments_are_refused() -> None:
    hidden, head = states(), Head()
    with pytest.raises(InterlockingError, match=r"\(2, 7\).*\(3, 7\)"):
        chunked_cross_entropy(head(hidden), some_labels()[:2], chunk_tokens=4)
    with pytest.raises(InterlockingError, match="chunk_tokens is 0"):
        chunked_cross_entropy(head(hidden), some_labels(), chunk_tokens=0)
