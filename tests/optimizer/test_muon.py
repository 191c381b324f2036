"""Muon for the matrices inside a model: which they are, how large its steps are, what it does not combine with."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from ibp_deepspeed.errors import ConfigError
from ibp_deepspeed.models.build import virtual_pipeline
from ibp_deepspeed.models.causal_lm import CausalLM
from ibp_deepspeed.optimizer.configured import check_optimizer
from ibp_deepspeed.optimizer.matrices import inner_matrices, muon_groups
from ibp_deepspeed.optimizer.muon import Muon
from ibp_deepspeed.single_process.virtual_pipeline import VirtualPipeline
from tests.checkpoint.test_reshape import FOUR, LOCAL, THREE, make, train, trunk

SIZES = ((24, 24), (64, 24), (24, 64))
OPTIONS: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1}
MUON = {"type": "Muon", "params": OPTIONS}


def matrices() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(*size, generator=generator) * 0.1) for size in SIZES]


def test_steps_are_those_of_torchs_muon_scaled_to_adamws() -> None:
    """torch's with ``match_rms_adamw`` in bf16: rows and columns of any proportion, decay, momentum, at one rate.

    DeepSpeed orthogonalizes in fp32 here: two digits are alike.
    """
    ours, theirs, begun = matrices(), matrices(), matrices()
    own = Muon(muon_groups(ours, ours, "matrices"), **OPTIONS)
    other = torch.optim.Muon(theirs, **OPTIONS, adjust_lr_fn="match_rms_adamw")  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        for mine, yours in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            yours.grad = mine.grad.clone()
        given = [p.grad.clone() for p in ours if p.grad is not None]
        own.step()
        assert all(torch.equal(a, p.grad) for a, p in zip(given, ours, strict=True) if p.grad is not None)
        other.step()
    for mine, yours, was in zip(ours, theirs, begun, strict=True):
        assert (mine - yours).norm() <= 0.02 * (yours - was).norm()


def test_everything_else_is_adamws_also_after_loading() -> None:
    """Vectors without decay; states that were loaded are gone on with."""
    runs = [[nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(5, 2))] for _ in range(3)]
    kinds = [Muon(muon_groups(parameters, [], "matrices"), **OPTIONS) for parameters in runs[:2]]
    groups: list[dict[str, Any]] = [{"params": runs[2][1:]}, {"params": runs[2][:1], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, **OPTIONS)
    for step in range(4):
        for parameters in runs:
            for number, parameter in enumerate(parameters):
                parameter.grad = torch.full_like(parameter, step - 1.5 + number)
        if step == 2:
            with torch.no_grad():
                for mine, loaded in zip(*runs[:2], strict=True):
                    loaded.copy_(mine)
            kinds[1].load_state_dict(copy.deepcopy(kinds[0].state_dict()))
        for optimizer in (*kinds[:1], reference, *(kinds[1:] if step >= 2 else ())):
            optimizer.step()
    for parameters in runs[:2]:
        assert all(map(torch.equal, parameters, runs[2]))


def test_what_has_no_gradient_does_not_move() -> None:
    """So a step is left out: neither decay nor momentum."""
    parameters = [*matrices(), nn.Parameter(torch.ones(3))]
    optimizer = Muon(muon_groups(parameters, parameters[:3], "all"), **OPTIONS)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    before = [p.detach().clone() for p in parameters]
    momenta = [optimizer.state[p]["momentum_buffer"].clone() for p in parameters[:3]]
    optimizer.zero_grad()
    optimizer.step()
    assert all(map(torch.equal, parameters, before))
    assert all(torch.equal(m, optimizer.state[p]["momentum_buffer"]) for m, p in zip(momenta, parameters, strict=False))


def language_model(stages: int, optimizer: dict[str, Any] = MUON, **head: Any) -> VirtualPipeline:
    config = AutoConfig.for_model(
        "llama",
        vocab_size=50,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": optimizer,
        "interlocking": {"strategy": "local", "aux_head": head},
    }
    return virtual_pipeline(CausalLM(config, seed=0), settings, stages, [4 // stages] * stages)


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_matrices_of_decoder_layers_are_muons_however_the_model_is_cut(stages: int) -> None:
    """Seven a layer, of a block in a head too; embedding, LM heads and norms are not."""
    made = language_model(stages, blocks=1)
    chosen: list[torch.Tensor] = []
    for k, optimizer in enumerate(made.optimizers):
        muons, others = ([g for g in optimizer.param_groups if g["use_muon"] is kind] for kind in (True, False))
        here = [p for group in muons for p in group["params"]]
        assert len(here) == 7 * (4 // stages + (k < stages - 1)) and {p.dim() for p in here} == {2}
        assert all(p.shape[1] == group["columns"] for group in muons for p in group["params"])
        read = [p for group in others for p in group["params"] if p.dim() == 2]
        assert all(50 in p.shape for p in read) and len(read) == (k == 0) + 1
        chosen += here
    assert not any(50 in p.shape for p in chosen)


def test_frozen_matrices_are_nobodys() -> None:
    layers = [nn.Linear(2, 2) for _ in range(3)]
    layers[1].requires_grad_(False)
    assert inner_matrices(layers, first=False, last=True, head=None) == [layers[0].weight]


def test_a_stage_with_nothing_to_train_takes_part() -> None:
    made = make(FOUR, LOCAL, frozen=2, optimizer=MUON)
    before = [p.clone() for p in made.reference.stages[2].parameters()]
    train(made, range(2))
    assert all(map(torch.equal, before, made.reference.stages[2].parameters()))


@pytest.mark.parametrize("low", [False, True], ids=["fp32", "bf16"])
def test_a_checkpoint_goes_on_in_another_cut(low: bool, tmp_path: Path) -> None:
    """Momentum and moments follow their layers; without losses that the cut decides, the numbers are the same."""
    more: dict[str, Any] = {"optimizer": MUON, "bf16": {"enabled": low}}
    block = {"strategy": "global", "mode": "furthest"}
    one, two = make(FOUR, block, **more), make(THREE, block, **more)
    train(one, range(3))
    one.save_checkpoint(tmp_path)
    two.load_checkpoint(tmp_path)
    for pipeline in (one, two):
        train(pipeline, range(3, 6))
    assert all(map(torch.equal, trunk(one), trunk(two)))


@pytest.mark.parametrize("change", [{}, {"optimizer": MUON}], ids=["from Muon", "to Muon"])
def test_moments_of_another_kind_of_optimizer_are_left_and_it_is_said(change: dict[str, Any], tmp_path: Path) -> None:
    kinds: list[dict[str, Any]] = [{"optimizer": MUON}, {}]
    saved, loaded = (make(FOUR, LOCAL, **kind) for kind in (kinds if not change else kinds[::-1]))
    train(saved, range(2))
    saved.save_checkpoint(tmp_path)
    loaded.load_checkpoint(tmp_path)
    assert all(map(torch.equal, trunk(saved), trunk(loaded)))
    kind = "AdamW" if change else "Muon"
    said = [line for line in loaded.load_report if "new moments" in line]
    assert said[0].endswith(f"those of the checkpoint are {kind}'s"), loaded.load_report
    train(loaded, range(2, 3))
    assert not any(map(torch.equal, trunk(saved), trunk(loaded)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"zero_optimization": {"stage": 1}}, "Muon needs whole matrices and fp32 sums"),
        ({"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "bf16"}}, "Muon needs whole matrices"),
        ({"bf16": {"enabled": True}, "interlocking": {"clip_scope": "global"}}, '"clip_scope": "global" does not work'),
        ({"optimizer": {"type": "Muon", "params": {"muon_lr": 0.02}}}, '"optimizer.params.muon_lr" is a rate of'),
        ({"optimizer": {"type": "Muon", "params": {"ns_method": "svd"}}}, "ns_method is 'svd'"),
        ({"optimizer": {"type": "Muon", "params": {"momentum": 1.5}}}, "momentum is 1.5"),
        ({"optimizer": {"type": "Muon", "params": {"nesterov": False}}}, "unexpected keyword argument 'nesterov'"),
    ],
)
def test_what_does_not_combine_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_optimizer({"optimizer": MUON, **settings})


def test_the_gpu_presets_combination_is_taken() -> None:
    check_optimizer(
        {
            "optimizer": {"type": "muon", "params": {**OPTIONS, "torch_adam": True, "fused": True}},
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": 1},
            "data_types": {"grad_accum_dtype": "fp32"},
        }
    )
