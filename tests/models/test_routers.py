"""The loss of routers: Hugging Face's on one stage, each stage's own on several, the same by processes and by one."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ibp_deepspeed import InterlockedReference
from ibp_deepspeed.config.interlocking import InterlockingConfig
from ibp_deepspeed.models import CausalLM, ModelError
from ibp_deepspeed.objectives.cross_entropy import CausalLMLoss
from tests.launch import launch
from tests.models.test_causal_lm import build, perturbed, shifted, tiny, tokens, whole

COEFFICIENT = 0.3


def balanced(model_type: str, layers: int = 3) -> Any:
    return tiny(model_type, output_router_logits=True, router_aux_loss_coef=COEFFICIENT, num_hidden_layers=layers)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss"])
def test_one_stage_has_the_loss_and_the_gradients_of_hugging_face(model_type: str) -> None:
    """The router's part is a tenth of the loss at least, so that its gradients count."""
    config = balanced(model_type)
    model = CausalLM(config)
    layers = perturbed(build(model))
    full, ids = whole(config, layers), tokens()
    full.config.output_router_logits = True
    for module in (full, *layers):
        module.train()
    want = full(input_ids=ids, labels=ids, use_cache=False)
    want.loss.backward()
    reference = InterlockedReference(
        [nn.Sequential(*layers)], None, CausalLMLoss(), {"strategy": "global"}, model.router_balance()
    )
    (loss,) = reference.accumulate([(ids, shifted(ids))])
    side = reference.side_losses[0]
    assert side.value.item() == pytest.approx(want.aux_loss.item(), rel=1e-6) and side.factor == COEFFICIENT
    assert loss.item() + side.factor * side.value.item() == pytest.approx(want.loss.item(), rel=1e-6)
    assert side.factor * side.value.item() > 0.1 * loss.item()
    ours = whole(config, layers)  # for the names alone: gradients follow the same order
    names = [name for name, _ in ours.named_parameters()]
    expected = {name: p.grad for name, p in full.named_parameters()}
    found = dict(zip(names, [None] * len(names), strict=True))
    from ibp_deepspeed.models.hf.assemble import model_key

    for index, layer in enumerate(layers):
        for name, parameter in layer.named_parameters():
            found[model_key(model._shell, index, name)] = parameter.grad
    for name, gradient in expected.items():
        other = found[name]
        assert gradient is not None and other is not None, name
        assert (gradient - other).norm() <= 1e-5 * gradient.norm() + 1e-9, name


def test_stages_take_the_means_over_their_own_layers() -> None:
    """By hand, from the routers' logits of each layer: LB_k, its factor, and what the sum differs by from LB."""
    config = balanced("mixtral", layers=3)
    model = CausalLM(config)
    layers = perturbed(build(model))
    noted: list[Tensor] = []
    for layer in layers[1:-1]:
        router = layer.get_submodule("layer.mlp.gate")
        router.register_forward_hook(lambda module, given, out: noted.append(out[0].detach()))
    stages = [nn.Sequential(*layers[:2]), nn.Sequential(*layers[2:])]  # one and two decoder layers
    reference = InterlockedReference(
        stages, [nn.Identity()], CausalLMLoss(), {"strategy": "global"}, model.router_balance()
    )
    with torch.no_grad():
        reference.outputs(tokens())
    experts, chosen = config.num_local_experts, config.num_experts_per_tok
    p = torch.stack([logits.softmax(-1).mean(0) for logits in noted])  # [3, experts]
    picked = [logits.topk(chosen).indices.flatten() for logits in noted]
    f = torch.stack(
        [torch.bincount(row, minlength=experts) / len(logits) for row, logits in zip(picked, noted, strict=True)]
    )
    first, second = experts * f[0] @ p[0], experts * f[1:].mean(0) @ p[1:].mean(0)
    found = [reference.side_losses[k] for k in (0, 1)]
    assert [side.value.item() for side in found] == pytest.approx([first.item(), second.item()], rel=1e-5)
    assert [side.factor for side in found] == pytest.approx([COEFFICIENT / 3, COEFFICIENT * 2 / 3])
    theirs = sys.modules[type(model._shell.model).__module__].load_balancing_loss_func(tuple(noted), experts, chosen)
    assert theirs.item() == pytest.approx((experts * f.mean(0) @ p.mean(0)).item(), rel=1e-5)
    assert first / 3 + second * 2 / 3 > theirs, "a balance of all layers together is less than one of each stage"


@pytest.mark.parametrize("name", ["compile", "blocks", "borrow"])
def test_what_it_does_not_go_with_is_one_sentence(name: str) -> None:
    block = {"compile": True} if name == "compile" else {"aux_head": {name: 1}}
    with pytest.raises(ModelError, match=f'{name}" does not go together with the loss of a router'):
        CausalLM(balanced("mixtral")).side_loss(InterlockingConfig.parse(block))


def test_the_engine_trains_with_it_as_one_process_does() -> None:
    """Three stages, five batches of SGD: modes and widths, B and W at once and apart, recomputation, frozen stages."""
    window = {"strategy": "nwise", "width": 2, "mode": "window"}
    blocks: list[dict[str, Any]] = [
        {"strategy": "local"},
        {"strategy": "pairwise"},
        {"strategy": "pairwise", "backward": "fused"},
        window,
        {"strategy": "global"},
        {"strategy": "global", "mode": "sum", "exit_weights": [0.2, 0.5, 1.0]},
        {"strategy": "local", "exits": 2, "mixed": {"width": 2, "fraction": 0.5, "mode": "window"}},
        {"strategy": "nwise", "width": 2, "mode": "window", "window_weights": [1.0, 0.5]},
    ]
    cases: list[dict[str, Any]] = [{"interlocking": block} for block in blocks]
    cases += [{"interlocking": block, "checkpoint": True} for block in (window, blocks[4])]
    cases += [{"interlocking": blocks[4], "freeze": freeze} for freeze in ("2", "layers.2-3")]
    reports = launch("routers", 3, cases, timeout=300).check().reports
    for rank, rows in enumerate(reports):
        for case, row in zip(cases, rows, strict=True):
            assert row["parameter"] <= 2e-5, (rank, case, row)
            assert row["without"] > 1e-3 or case.get("freeze"), (rank, case, row)
            assert row["reported"] == pytest.approx(row["expected"], rel=1e-5), (rank, case, row)
