"""Input gradients first: what autograd gives in one backward pass, in two, without a product computed twice."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import profile
from transformers import AutoConfig

from ibp_deepspeed.models import CausalLM
from ibp_deepspeed.stage.micro_batch import MicroBatchInFlight
from ibp_deepspeed.stage.weight_gradients import WeightGradients, split_backward
from tests.toys import Layer

Gradients = dict[str, Tensor]


def llama() -> nn.Sequential:
    return decoder_layers("llama", hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)


def gpt2() -> nn.Sequential:
    return decoder_layers("gpt2", n_embd=32, n_head=4, resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0)


def mixtral() -> nn.Sequential:
    """Its experts are one tensor each, and get their gradients with B."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return decoder_layers("mixtral", **sizes, num_local_experts=4, num_experts_per_tok=2)


def decoder_layers(kind: str, **options: Any) -> nn.Sequential:
    options |= {"n_layer": 2} if kind == "gpt2" else {"num_hidden_layers": 2}
    model = CausalLM(AutoConfig.for_model(kind, vocab_size=50, **options), seed=1)
    return nn.Sequential(*map(model.build_layer, (1, 2)))


def shared() -> nn.Sequential:
    torch.manual_seed(5)
    twice = nn.Linear(32, 32)
    return nn.Sequential(twice, nn.Tanh(), twice, nn.Linear(32, 32, bias=False))


def frozen() -> nn.Sequential:
    torch.manual_seed(5)
    layers = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))
    layers[0].weight.requires_grad_(False)
    layers[2].requires_grad_(False)
    layers[4].bias.requires_grad_(False)
    return layers


def computed() -> nn.Sequential:
    """Weights that are computed from others, by a hook before the layer's forward and by a parametrization."""
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        hooked = torch.nn.utils.weight_norm(nn.Linear(32, 32))
    return nn.Sequential(
        hooked, nn.Tanh(), torch.nn.utils.parametrizations.weight_norm(nn.Linear(32, 32)), nn.Linear(32, 32)
    )


def convolutions() -> nn.Sequential:
    """Of one image with two channels: strides, groups, dilation, with a bias and without, frozen ones."""
    torch.manual_seed(5)
    layers = [
        nn.Conv2d(2, 4, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=2, bias=False),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 8, 1),
        nn.PixelShuffle(2),
        nn.Conv2d(2, 2, 3, stride=2, padding=1),
    ]
    layers[4].weight.requires_grad_(False)
    layers[6].bias.requires_grad_(False)  # type: ignore[union-attr]
    return nn.Sequential(nn.Unflatten(0, (1, 2)), *layers, nn.Flatten(0, 1))


STAGES: list[Callable[[], nn.Sequential]] = [llama, gpt2, mixtral, shared, frozen, computed, convolutions]


def train(layers: nn.Sequential, *, split: bool, dtype: torch.dtype) -> tuple[Gradients, list[Tensor], int]:
    """Three micro-batches; with ``split`` the weight gradients of all come at the end.

    Returns:
        the gradients of parameters, those of the inputs, and how many parameters had none before W.
    """
    torch.manual_seed(3)
    layers.to(dtype)
    later = WeightGradients()
    if split:
        split_backward(layers, later)
    found: list[Tensor] = []
    queues: list[MicroBatchInFlight] = []
    for _ in range(3):
        live = MicroBatchInFlight(layers)
        live.inputs = torch.randn(2, 7, 32, dtype=dtype, requires_grad=True)
        live.forward(input_gradient_follows=True)
        live.output_gradients[0] = torch.randn(2, 7, 32, dtype=dtype)
        with later.left_out():  # another loss, that trains other stages alone
            live.backward_input(0)
        assert found or all(p.grad is None for p in layers.parameters())
        with later.put_off(live.weight_gradients):
            live.update({0: 0.5}, None)
        found.append(live.input_gradient(0.5))
        live.free()
        queues.append(live)
    waiting = sum(p.grad is None for p in layers.parameters() if p.requires_grad)
    for live in queues:
        live.update_weights()
    return {name: p.grad for name, p in layers.named_parameters() if p.grad is not None}, found, waiting


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", STAGES)
def test_both_ways_give_the_same_bits(make: Callable[[], nn.Sequential], dtype: torch.dtype) -> None:
    """A weight that is used twice is summed in another order, so that its last bits may differ."""
    if make is mixtral and dtype is torch.float64:
        pytest.skip("torch's product of grouped matrices has no fp64")
    whole, inputs, none = train(make(), split=False, dtype=dtype)
    apart, same_inputs, waiting = train(make(), split=True, dtype=dtype)
    assert none == 0 and waiting > 0, "linear layers' gradients were not put off"
    assert all(map(torch.equal, inputs, same_inputs)) and whole.keys() == apart.keys()
    for name, gradient in whole.items():
        if make is shared:
            tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
            torch.testing.assert_close(apart[name], gradient, rtol=tolerance, atol=tolerance)
        else:
            assert torch.equal(apart[name], gradient), name


@pytest.mark.parametrize("make", [llama, gpt2])
def test_no_product_is_computed_twice(make: Callable[[], nn.Sequential]) -> None:
    def products(split: bool) -> int:
        layers = make()
        with profile() as seen:
            train(layers, split=split, dtype=torch.float32)
        return sum(row.count for row in seen.key_averages() if row.key in ("aten::mm", "aten::addmm", "aten::bmm"))

    assert products(True) == products(False)


def test_between_b_and_w_a_stage_keeps_inputs_and_output_gradients_alone() -> None:
    """Fewer bytes than between the forward pass and B."""
    layers, later, sizes = llama(), WeightGradients(), dict[int, int]()

    def keep(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    split_backward(layers, later)
    live = MicroBatchInFlight(layers)
    live.inputs = torch.randn(2, 64, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        live.forward(input_gradient_follows=True)
    weights = {p.untyped_storage().data_ptr() for p in layers.parameters()}
    before = sum(size for place, size in sizes.items() if place not in weights)
    live.output_gradients[0] = torch.randn(2, 64, 32)
    with later.put_off(live.weight_gradients):
        live.update({0: 1.0}, None)
    live.free()
    kept = [t for work in live.weight_gradients for t in work.args if isinstance(t, Tensor)]  # type: ignore[attr-defined]
    after = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    assert sum(size for place, size in after.items() if place not in weights) < 0.9 * before


def test_a_layer_can_split_by_itself() -> None:
    """tests.toys.Layer hides its linear layer, and says how."""
    layers = nn.Sequential(Layer(1), Layer(2))
    later, queue = WeightGradients(), list[Callable[[], None]]()
    split_backward(layers, later)
    with later.put_off(queue):
        layers(torch.randn(4, 6, requires_grad=True)).sum().backward()
    assert len(queue) == 2 and all(p.grad is None for p in layers.parameters())
    for work in queue:
        work()
    assert all(p.grad is not None for p in layers.parameters())


def test_a_copy_of_a_layer_has_weights_of_its_own() -> None:
    layers = nn.Sequential(nn.Linear(6, 6))
    split_backward(layers, WeightGradients())
    copied, inputs = copy.deepcopy(layers), torch.randn(4, 6)
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.zero_()
    assert not torch.equal(copied(inputs), layers(inputs))
    copied(inputs).sum().backward()
    assert all(p.grad is not None for p in copied.parameters()) and all(p.grad is None for p in layers.parameters())


def test_without_gradients_layers_are_as_before() -> None:
    layers, inputs = nn.Sequential(nn.Linear(6, 6)), torch.randn(4, 6)
    expected = layers(inputs)
    split_backward(layers, WeightGradients())
    with torch.no_grad():
        assert torch.equal(layers(inputs), expected) and torch.equal(layers[0](input=inputs), expected)
    plain = layers(inputs.requires_grad_())
    plain.sum().backward()  # nobody asks for anything else: at once
    assert layers[0].weight.grad is not None and torch.equal(plain, expected)
