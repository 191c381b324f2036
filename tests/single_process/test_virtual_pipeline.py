"""Virtual stages train as the engine's real ones, and read each other's checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from ibp_deepspeed.errors import ConfigError, NonFiniteError
from ibp_deepspeed.single_process.virtual_pipeline import VirtualPipeline
from tests.launch import launch
from tests.toys import loss_fn, make_reference, micro_batches
from tests.workers.skipping import Listener

ROOT = Path(__file__).resolve().parents[2]
SHARED = {"readout": "shared", "refresh_interval": 2, "refresh_delay": 4}
STABLE = {"type": "WarmupStableDecayLR", "params": {"warmup_num_steps": 2, "total_num_steps": 6, "decay_share": 0.5}}
MUON = {"type": "Muon", "params": {"lr": 0.05, "weight_decay": 0.1}}
CASES: list[dict[str, Any]] = [
    {"interlocking": {"strategy": "pairwise", "mode": "window"}, "exchange": True, "settings": {"optimizer": MUON}},
    {"interlocking": {"strategy": "pairwise", "mode": "window"}, "exchange": True},
    {"interlocking": {"strategy": "local"}, "exchange": True, "settings": {"scheduler": STABLE}},
    {
        "interlocking": {"strategy": "local", "mixed": {"width": 3, "fraction": 0.5}, "aux_head": SHARED},
        "follow": True,
        "exchange": True,
    },
    {
        "interlocking": {"strategy": "local", "mode": "window", "aux_head": {**SHARED, "borrow": 1}},
        "follow": True,
        "exchange": True,
        "settings": {"gradient_clipping": 0.02},
    },
    {
        "interlocking": {"strategy": "pairwise", "clip_scope": "global", "global_interval": 2},
        "settings": {"gradient_clipping": 0.02, "optimizer": {"type": "SGD", "params": {"lr": 0.2, "momentum": 0.9}}},
    },
]


def test_virtual_stages_equal_the_engine_and_exchange_checkpoints(tmp_path: Path) -> None:
    cases = [case | {"folder": str(tmp_path / str(i))} for i, case in enumerate(CASES)]
    for rows in launch("virtual", 3, cases).check().reports:
        for case, row in zip(cases, rows, strict=True):
            assert all(error <= 1e-5 for error in row.values()), (case, row)


def bf16(strategy: str, mode: str, **more: Any) -> dict[str, Any]:
    return {"interlocking": {"strategy": strategy, "mode": mode}, "bf16": True, "zero": 1, "folder": "", **more}


@pytest.mark.parametrize("replicas", [1, 2])
def test_bf16_sums_and_keeps_in_full_precision(replicas: int) -> None:
    """Against BF16_Optimizer: fp32 copies, and the bf16 weights that are rounded from them.

    Each gradient is rounded to bf16 alike, so that nothing but the order of fp32 additions differs. Two replicas add in
    another order. With several losses a trunk, in mode window, the engine adds their gradients in bf16 where they meet,
    at the stage's output, and the one process in fp32 at the parameters: there the last digit of bf16 (2^-8) shows.
    """
    stages = 3 if replicas == 1 else 2
    cases = [bf16(*how, stages=stages) for how in (("local", "window"), ("pairwise", "furthest"))]
    cases += [bf16("pairwise", "furthest", stages=stages, settings={"optimizer": MUON, "gradient_clipping": 0.05})]
    cases += [bf16("pairwise", "window", stages=stages)]
    for *alike, window in launch("virtual", stages * replicas, cases).check().reports:
        for case, row in zip(cases, alike, strict=False):
            assert all(row[error] <= 1e-6 for error in ("loss", "trained", "masters")), (case, row)
        assert window["masters"] <= 2e-3 and window["trained"] <= 2**-8 and window["loss"] <= 2e-3, window


def test_the_optimizer_of_the_gpu_presets_is_torchs_fused_one() -> None:
    """Also with Muon in its place, for what is not Muon's.

    DeepSpeed hands ``fused`` to torch, whose kernel needs no nvcc; on CPU it is the same mathematics.
    """
    preset = json.loads((ROOT / "ds_configs" / "pairwise_gpu.json").read_text())
    optimizer = {**preset["optimizer"], "params": {**preset["optimizer"]["params"], "lr": 0.01}}
    assert optimizer["params"]["fused"] and optimizer["params"]["torch_adam"]
    cases = [
        bf16("pairwise", "furthest", settings={"optimizer": kind, "data_types": preset["data_types"]})
        for kind in (optimizer, {**optimizer, "type": "Muon"})
    ]
    for rows in launch("virtual", 3, cases).check().reports:
        for row in rows:
            assert row["fused"] and all(row[error] <= 1e-6 for error in ("loss", "trained", "masters")), row


def make(follow: bool = False, **changes: Any) -> VirtualPipeline:
    parts = make_reference(2, {"strategy": "local"}, follow=follow)
    config = {"train_micro_batch_size_per_gpu": 4, "optimizer": {"type": "AdamW", "params": {"lr": 0.01}}}
    stages = cast(list[nn.Sequential], parts.stages)
    return VirtualPipeline(stages, list(parts.aux_heads.values()), loss_fn, config | changes)


def test_resumed_bf16_run_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    runs = [make(bf16={"enabled": True}) for _ in range(2)]
    for step in range(3):
        runs[0].train_batch(iter(micro_batches(step, 1)))
    runs[0].save_checkpoint(tmp_path)
    runs[1].load_checkpoint(tmp_path)
    losses = [[run.train_batch(iter(micro_batches(step, 1))).tolist() for step in (3, 4, 5)] for run in runs]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", ["AdamW", "Muon"])
def test_gradients_that_are_not_finite_cost_their_stage_one_step(kind: str, bf16: bool) -> None:
    """In the engine: tests/engine/test_skipping.py."""
    warmup = {"type": "WarmupLR", "params": {"warmup_min_lr": 0.01, "warmup_max_lr": 0.02}}
    policy = {"strategy": "local", "non_finite": "skip_batch"}
    optimizer = {"type": kind, "params": {"lr": 0.01}}
    run = make(bf16={"enabled": bf16}, interlocking=policy, scheduler=warmup, optimizer=optimizer)
    batch, weights = micro_batches(0, 1), [stage[0].weight for stage in run.reference.stages]  # type: ignore[index]
    run.train_batch(iter(batch))
    run.reference.stages[1][0].register_forward_hook(lambda _, __, outputs: outputs * torch.inf)  # type: ignore[index]
    before = [weight.clone() for weight in weights]
    with Listener() as said:
        run.train_batch(iter(batch))
    assert not torch.equal(weights[0], before[0]) and torch.equal(weights[1], before[1])
    assert len(said.lines) == 1 and "stage 1, batch 2" in said.lines[0], said.lines
    assert run.schedulers[0].get_lr() == run.schedulers[1].get_lr()


def test_gradients_that_are_not_finite_end_the_training() -> None:
    """By default, before the stage's step."""
    run = make(interlocking={"strategy": "local"})
    run.train_batch(iter(micro_batches(0, 1)))
    run.reference.stages[1][0].register_forward_hook(lambda _, __, outputs: outputs * torch.nan)  # type: ignore[index]
    before = run.reference.stages[1][0].weight.clone()  # type: ignore[index]
    with pytest.raises(NonFiniteError, match="stage 1, batch 2: .* is not finite; go on from the last checkpoint"):
        run.train_batch(iter(micro_batches(0, 1)))
    assert torch.equal(run.reference.stages[1][0].weight, before)  # type: ignore[index]


def test_frozen_readouts_need_no_file_of_copies(tmp_path: Path) -> None:
    """The engine writes none for them, so that none may be asked for."""
    interlocking = {"strategy": "local", "aux_head": {"readout": "frozen"}}
    runs = [make(follow=True, interlocking=interlocking) for _ in range(2)]
    runs[0].train_batch(iter(micro_batches(0, 1)))
    runs[0].save_checkpoint(tmp_path)
    assert not list(tmp_path.rglob("shared_readout*"))
    runs[1].load_checkpoint(tmp_path)
    losses = [run.train_batch(iter(micro_batches(1, 1))).tolist() for run in runs]
    assert losses[0] == losses[1]


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="\"optimizer.type\" is 'Lamb'"):
        make(optimizer={"type": "Lamb"})
    with pytest.raises(ConfigError, match="\"scheduler.type\" is 'Cosine'"):
        make(scheduler={"type": "Cosine"})
    with pytest.raises(ConfigError, match="train_batch_size 7"):
        make(train_batch_size=7)
    with pytest.raises(ValueError, match="ended after 0 of 1"):
        make().train_batch(iter([]))


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    """So that the checkpoint before is the newest."""
    parts = make_reference(2, {"strategy": "local"})
    config = {"train_micro_batch_size_per_gpu": 4, "optimizer": {"type": "SGD", "params": {"lr": 0.01}}}
    run = VirtualPipeline(cast(list[nn.Sequential], parts.stages), list(parts.aux_heads.values()), loss_fn, config)
    run.save_checkpoint(tmp_path)
    run.train_batch(iter(micro_batches(0, 1)))
    with torch.no_grad():
        next(parts.stages[1].parameters()).view(-1)[0] = torch.inf
    with pytest.raises(NonFiniteError, match=r"after batch 1 weight \d+\.\S+ of the model is not finite, so"):
        run.save_checkpoint(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global_step0", "latest"]


def test_many_stages_train_on_one_device(tmp_path: Path) -> None:
    parts = make_reference(32, {"strategy": "local"})
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
        "interlocking": {"strategy": "nwise", "width": 4, "mode": "window"},
    }
    run = VirtualPipeline(cast(list[nn.Sequential], parts.stages), list(parts.aux_heads.values()), loss_fn, config)
    batch = micro_batches(0, 1)
    first = run.train_batch(iter(batch))
    for _ in range(10):
        last = run.train_batch(iter(batch))
    assert first.shape == (32,) and last.mean() < first.mean()
    run.save_checkpoint(tmp_path)
    assert len(list((tmp_path / "global_step11").glob("mp_rank_*"))) == 32
