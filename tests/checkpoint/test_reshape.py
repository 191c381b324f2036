"""Checkpoints into pipelines of another shape: states follow their layers, heads their boundaries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from ibp_deepspeed.single_process.virtual_pipeline import VirtualPipeline
from tests.launch import launch
from tests.toys import Head, Layer, loss_fn, micro_batches
from tests.workers.reshape import LAYERS, SAMPLES, HeadWithSources

LOCAL = {"strategy": "pairwise", "mode": "window"}
GLOBAL = {"strategy": "global", "clip_scope": "global"}
FOUR, THREE, TWO = [0, 2, 4, 6, 8], [0, 2, 5, 8], [0, 4, 8]
TRUNK = [f"{layer}.{name}" for layer in range(LAYERS) for name in ("bias", "weight")]
HEADS = {4: "head before layer 4: from the checkpoint"}
GONE = [f"head before layer {boundary}: dropped, none stands there now" for boundary in (2, 6)]
BORN = [f"head before layer {boundary}: from the head before layer 4" for boundary in (2, 6)]
SUM: dict[str, Any] = {"strategy": "global", "mode": "sum"}
PHASES = [{"from_step": 2, "width": 4, "mode": "sum"}, {"from_step": 4, "width": 2}]
HALF, MODULE = {**LOCAL, "exits": 2}, {**LOCAL, "exits": 4}


def case(bounds: list[int], replicas: int = 1, strategy: dict[str, Any] = LOCAL, **more: Any) -> dict[str, Any]:
    return {"bounds": bounds, "replicas": replicas, "interlocking": strategy, **more}


def check_kept(row: dict[str, Any], heads: list[int]) -> None:
    """Everything of the trunk and of heads at kept boundaries is the saved value, moments included."""
    kept = {f"head {boundary}.{name}" for boundary in heads for name in ("bias", "weight")}
    assert set(row["kept"]) >= {*TRUNK, *kept}, row
    assert row["client"] == "kept"
    steps, samples, rate = row["counted"]
    assert steps == 3 and samples == 0 and rate == pytest.approx(0, abs=1e-12), row


def test_processes_in_other_shapes(tmp_path: Path) -> None:
    """4 × 1 ↔ 2 × 2 (stages × replicas) and other bounds, with plain, partitioned and bf16 optimizers; then 3 and 2."""
    folders = {name: str(tmp_path / name) for name in ("plain", "zero", "low", "exact", "halves", "again", "zero-less")}
    whole, halves = case(FOUR), case(TWO, 2)
    cases = [
        whole | {"save": folders["plain"], "own_settings": True},
        whole | {"save": folders["zero"], "zero": 1, "own_settings": True},
        halves | {"save": folders["halves"], "zero": 1},
        whole | {"save": folders["low"], "zero": 1, "bf16": True},
        case(FOUR, strategy=GLOBAL) | {"save": folders["exact"]},
        whole | {"save": folders["zero-less"], "bf16": True},
        whole | {"load": folders["zero-less"], "bf16": True},
        halves | {"load": folders["plain"]},
        halves | {"load": folders["zero"], "zero": 1},
        halves | {"load": folders["plain"], "zero": 1},
        halves | {"load": folders["low"], "zero": 1, "bf16": True},
        whole | {"load": folders["halves"]},
        case([0, 1, 4, 5, 8]) | {"load": folders["plain"], "sources": True},
        case(TWO, 2, GLOBAL) | {"load": folders["exact"], "zero": 1},
        case([0, 1, 3, 4, 8], strategy=GLOBAL) | {"load": folders["exact"]},
    ]
    unchanged, *rows = [row for row in launch("reshape", 4, cases).check().reports[0] if row is not None]
    check_kept(unchanged, [2, 4, 6])
    assert not unchanged["lines"] and unchanged["error"] <= 1e-6, unchanged
    for row in rows[:4]:
        check_kept(row, [4])
        assert row["lines"] == sorted([*GONE, HEADS[4]]) and not row["moved"], row
    back, bounds, *exact = rows[4:]
    for row in rows[:3]:
        assert row["eps"] == [[1e-8] * 2] * 2 + [[2e-8] * 2] * 2, "each stage has the settings of its parameters"
    check_kept(back, [4])
    assert back["lines"] == sorted([*BORN, HEADS[4]])
    assert set(back["moved"].values()) == {"head 4.weight", "head 4.bias"}
    assert bounds["lines"][0] == "head before layer 1: from the head before layer 2"
    check_kept(bounds, [4])
    for row in exact:
        check_kept(row, [])
        assert row["error"] <= 1e-6, row
    for stages, shape, boundaries in ((3, THREE, [2]), (2, TWO, [4])):
        wanted = [case(shape, load=folders["zero"], zero=1, again=folders["again"])]
        wanted += [case(shape, strategy=GLOBAL, load=folders["exact"])]
        row, same = launch("reshape", stages, wanted).check().reports[0]
        check_kept(row, boundaries)
        check_kept(same, [])
        assert same["error"] <= 1e-6
    virtual = make(FOUR, GLOBAL)
    virtual.load_checkpoint(tmp_path / "exact")
    assert_trunk_is(virtual, tmp_path / "exact")


@pytest.mark.parametrize("low", [False, True], ids=["fp32", "bf16"])
def test_a_part_of_a_checkpoint_of_another_shape(low: bool, tmp_path: Path) -> None:
    """DeepSpeed's options of load_checkpoint, for the same and for another shape, plain and partitioned."""
    two, four = [0, 4, 8], [0, 3, 8]
    shapes: list[dict[str, Any]] = [{"bf16": True, "zero": 1}] if low else [{}, {"zero": 1}]
    parts = ({"load_module_only": True}, {"load_optimizer_states": False}, {"load_lr_scheduler_states": False})
    came = (
        {"moments": False, "schedule": -1, "steps": 0, "random": False},
        {"moments": False, "schedule": 2, "steps": 3, "random": True},
        {"moments": True, "schedule": -1, "steps": 3, "random": True},
    )
    for shape in shapes:
        folder = str(tmp_path / str(len(shape)))
        cases = [case(two, save=folder) | shape]
        cases += [case(bounds, load=folder, options=part) | shape for bounds in (two, four) for part in parts]
        for rank, rows in enumerate(launch("reshape", 2, cases).check().reports):
            for each, row, wanted in zip(cases[1:], rows[1:], came * 2, strict=True):
                assert row == {**row, "weights": True, **wanted}, (rank, each, row)
                assert 0 < row["step"] < 0.5, (rank, each, row)


def test_muons_momentum_follows_its_matrices(tmp_path: Path) -> None:
    """4 × 1 ↔ 2 × 2, plain and divided among replicas, where a matrix may be divided too."""
    whole, halves = case(FOUR, muon=True), case(TWO, 2, muon=True)
    low = {"zero": 1, "bf16": True}
    folders = {name: str(tmp_path / name) for name in ("plain", "low", "halves")}
    cases = [
        whole | {"save": folders["plain"]},
        whole | low | {"save": folders["low"]},
        halves | low | {"save": folders["halves"]},
        halves | {"load": folders["plain"]},
        halves | low | {"load": folders["low"]},
        halves | low | {"load": folders["halves"]},
        whole | low | {"load": folders["halves"]},
    ]
    rows = [row for row in launch("reshape", 4, cases).check().reports[0] if row is not None]
    for row, heads in zip(rows, ([4], [4], [4], [4]), strict=True):
        check_kept(row, heads)
    assert rows[2]["error"] == 0 and not rows[2]["lines"], rows[2]


@pytest.mark.parametrize("precision", [{}, {"zero": 1}], ids=["plain", "zero"])
def test_processes_with_other_exits(precision: dict[str, Any], tmp_path: Path) -> None:
    """Every stage, every second, the last alone, and back: heads go, stay with all their state, and come."""
    folders = {name: str(tmp_path / name) for name in ("every", "half", "module")}
    blocks: dict[str, dict[str, Any]] = {"every": LOCAL, "half": HALF, "module": MODULE}
    saving = [case(FOUR, strategy=block, save=folders[name]) for name, block in blocks.items()]
    loading = [
        case(FOUR, strategy=HALF, load=folders["every"]),
        case(FOUR, strategy=LOCAL, load=folders["half"]),
        case(FOUR, strategy=MODULE, load=folders["half"]),
        case(FOUR, strategy=HALF, load=folders["module"], sources=True),
    ]
    reports = launch("reshape", 4, [each | precision for each in saving + loading]).check().reports[0]
    fewer, more, none, first = reports[len(saving) :]
    for row, heads, lines in (
        (fewer, [4], [*GONE, HEADS[4]]),
        (more, [4], [*BORN, HEADS[4]]),
        (none, [], ["head before layer 4: dropped, none stands there now"]),
        (first, [], ["head before layer 4: from the model's LM head"]),
    ):
        check_kept(row, heads)
        assert row["lines"] == sorted(lines), row
    assert not fewer["moved"] and not none["moved"]
    assert set(more["moved"]) == {f"head {boundary}.{name}" for boundary in (2, 6) for name in ("bias", "weight")}
    assert set(more["moved"].values()) == {"head 4.weight", "head 4.bias"}
    assert first["moved"] == {f"head 4.{name}": f"{LAYERS - 1}.{name}" for name in ("bias", "weight")}
    virtual = make(FOUR, MODULE)
    virtual.load_checkpoint(tmp_path / "module")
    assert virtual.load_report == []
    assert_trunk_is(virtual, tmp_path / "module")


def test_processes_go_on_within_the_sum_of_all_exits(tmp_path: Path) -> None:
    """Stopped in a phase of mode sum; and a local training that goes on in it: the same shape, heads as they were."""
    phases, local, folders = {**HALF, "schedule": PHASES}, HALF, [str(tmp_path / name) for name in ("phases", "local")]
    saving = [case(FOUR, strategy=block, save=folder) for block, folder in zip((phases, local), folders, strict=True)]
    loading = [case(FOUR, strategy=phases, load=folders[0])]
    loading.append(case(FOUR, strategy={**SUM, "exits": 2}, load=folders[1]))
    reports = launch("reshape", 4, saving + loading).check().reports[0][len(saving) :]
    for row in reports:
        check_kept(row, [4])
        assert not row["lines"] and not row["moved"], row
    assert reports[0]["error"] <= 1e-6 < reports[1]["error"]


@pytest.mark.parametrize("precision", [{}, {"zero": 1}, {"zero": 1, "bf16": True}], ids=["plain", "zero", "bf16"])
def test_other_parameter_groups_keep_every_state(precision: dict[str, Any], tmp_path: Path) -> None:
    """One group, as all checkpoints once had, into two, and back; also into another cut."""
    one, two = {**LOCAL, "decay": "all"}, LOCAL
    folders = {name: str(tmp_path / name) for name in ("one", "two")}
    saving = [case(FOUR, strategy=block, save=folders[name]) for name, block in (("one", one), ("two", two))]
    loading = [
        case(FOUR, strategy=two, load=folders["one"]),
        case(FOUR, strategy=one, load=folders["two"]),
        case(TWO, 2, strategy=two, load=folders["one"]),
    ]
    reports = launch("reshape", 4, [each | precision for each in saving + loading]).check().reports[0]
    into_two, into_one, cut = reports[2:]
    said = "moments and steps are the checkpoint's, nothing is lost"
    for row, heads, decays in ((into_two, [2, 4, 6], [0.1, 0.0]), (into_one, [2, 4, 6], [0.1]), (cut, [4], [0.1, 0.0])):
        check_kept(row, heads)
        assert row["decays"] == decays and not row["moved"] and said in row["lines"][-1], row
    assert len(into_two["lines"]) == len(into_one["lines"]) == 1, "heads are where they were"
    assert "on matrices alone" in into_two["lines"][0] and "on all parameters" in into_one["lines"][0]


@pytest.mark.parametrize("low", [False, True], ids=["fp32", "bf16"])
def test_one_process_loads_other_parameter_groups(low: bool, tmp_path: Path) -> None:
    """States, steps and rates go over; without decay what follows is the same, whatever the groups."""
    more: dict[str, Any] = {"optimizer": {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.0}}}
    more |= {"bf16": {"enabled": True}} if low else {}
    one, two = (make(FOUR, {**LOCAL, "decay": decay}, **more) for decay in ("all", "matrices"))
    train(one, range(3))
    one.save_checkpoint(tmp_path)
    two.load_checkpoint(tmp_path)
    assert two.load_report == [
        "weight decay acts on matrices alone from here on; moments and steps are the checkpoint's, nothing is lost"
    ]
    for pipeline in (one, two):
        train(pipeline, range(3, 6))
    assert all(map(torch.equal, trunk(one), trunk(two)))


def test_each_stage_keeps_the_settings_of_its_parameters(tmp_path: Path) -> None:
    """Rates that a user gave the stages, also where stages become one; most parameters decide, and it is said."""
    one = make(FOUR, LOCAL, scheduler={})
    train(one, range(1))
    for optimizer, rate in zip(one.optimizers, (0.1, 0.1, 0.2, 0.3), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
    one.save_checkpoint(tmp_path)
    three, five = make(THREE, LOCAL, scheduler={}), make([0, 1, 2, 4, 6, 8], LOCAL, scheduler={})
    three.load_checkpoint(tmp_path)
    five.load_checkpoint(tmp_path)
    assert rates(three) == [[0.1] * 2, [0.1] * 2, [0.3] * 2] and rates(five) == [
        [r] * 2 for r in (0.1, 0.1, 0.1, 0.2, 0.3)
    ]
    said = [line for line in three.load_report if "parameter group" in line]
    assert said[:1] == ["stage 1, parameter group 0: lr 0.1, as most of its parameters had; 1 of 4 had others"], said
    assert not any("parameter group" in line for line in five.load_report)


def rates(pipeline: VirtualPipeline) -> list[list[float]]:
    return [[group["lr"] for group in optimizer.param_groups] for optimizer in pipeline.optimizers]


def make(
    bounds: list[int],
    interlocking: dict[str, Any],
    sources: bool = False,
    frozen: int | None = None,
    **more: Any,
) -> VirtualPipeline:
    layers = [Layer(seed) for seed in range(LAYERS - 1)] + [Head(LAYERS - 1)]
    stages = [nn.Sequential(*layers[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]
    kind = HeadWithSources if sources else Head
    without = interlocking["strategy"] == "global" and interlocking.get("mode") != "sum"
    heads = None if without else [kind(100 + k) for k in range(len(stages) - 1)]
    if frozen is not None:
        for module in (stages[frozen], *(heads[frozen : frozen + 1] if heads else ())):
            module.requires_grad_(False)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": SAMPLES,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10, "warmup_max_lr": 0.02}},
        "interlocking": interlocking,
        **more,
    }
    return VirtualPipeline(cast(Any, stages), cast(Any, heads), loss_fn, config)


def train(pipeline: VirtualPipeline, batches: range) -> None:
    for batch in batches:
        pipeline.train_batch(iter(micro_batches(batch, SAMPLES)))


def trunk(pipeline: VirtualPipeline) -> list[torch.Tensor]:
    return [p.detach() for stage in pipeline.reference.stages for p in stage.parameters()]


def assert_trunk_is(pipeline: VirtualPipeline, folder: Path) -> None:
    there = torch.load(folder / "states.pt", weights_only=False)["moments"][0]
    for index, layer in enumerate(layer for stage in pipeline.reference.stages for layer in stage.children()):
        for name, parameter in layer.named_parameters():
            assert torch.equal(parameter, there[f"{index}.{name}"]["weight"])


@pytest.mark.parametrize("low", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("first", "second"), [(FOUR, TWO), (TWO, FOUR), (FOUR, THREE)])
def test_backpropagation_goes_on_as_if_nothing_had_happened(
    first: list[int], second: list[int], low: bool, tmp_path: Path
) -> None:
    """Its results don't depend on the cut: weights, masters, moments, steps and rates have all to be right."""
    more: dict[str, Any] = {"bf16": {"enabled": True}} if low else {}
    one, other = make(first, GLOBAL, **more), make(second, GLOBAL, **more)
    train(one, range(3))
    one.save_checkpoint(tmp_path)
    other.load_checkpoint(tmp_path)
    assert all(map(torch.equal, trunk(one), trunk(other)))
    for pipeline in (one, other):
        train(pipeline, range(3, 6))
    for ours, theirs in zip(trunk(other), trunk(one), strict=True):
        assert (ours - theirs).norm() <= (1e-2 if low else 1e-6) * theirs.norm()


def test_heads_of_another_kind_begin_with_the_readout(tmp_path: Path) -> None:
    """No heads before, or none that fits: the layers that a head names itself, with their moments."""
    one, other = make(TWO, GLOBAL), make(FOUR, LOCAL, sources=True)
    train(one, range(2))
    one.save_checkpoint(tmp_path)
    other.load_checkpoint(tmp_path)
    assert other.load_report == [f"head before layer {b}: from the model's LM head" for b in (2, 4, 6)]
    last = list(other.reference.stages[-1].children())[-1]
    moments = other.optimizers[0].state
    for head in other.reference.aux_heads.values():
        for ours, theirs in zip(head.parameters(), last.parameters(), strict=True):
            assert torch.equal(ours, theirs)
    pair = cast(nn.Parameter, other.reference.aux_heads[0].weight), cast(nn.Parameter, last.weight)
    assert torch.equal(moments[pair[0]]["exp_avg"], other.optimizers[-1].state[pair[1]]["exp_avg"])
    plain = make(FOUR, LOCAL)
    untouched = [p.detach().clone() for p in plain.reference.aux_heads[0].parameters()]
    plain.load_checkpoint(tmp_path)
    assert plain.load_report[0] == "head before layer 2: new"
    assert all(map(torch.equal, untouched, plain.reference.aux_heads[0].parameters()))
    train(plain, range(2, 3))


def test_another_strategy_is_the_same_shape(tmp_path: Path) -> None:
    """Width and mode leave no trace in the files: heads and moments go on as they are."""
    one, other = make(FOUR, LOCAL), make(FOUR, {"strategy": "nwise", "width": 3, "mode": "furthest"})
    train(one, range(2))
    one.save_checkpoint(tmp_path)
    other.load_checkpoint(tmp_path)
    assert other.load_report == []
    for ours, theirs in zip(other.optimizers, one.optimizers, strict=True):
        for a, b in zip(ours.state.values(), theirs.state.values(), strict=True):
            assert torch.equal(a["exp_avg"], b["exp_avg"])


def test_heads_go_stay_and_come_with_the_exits(tmp_path: Path) -> None:
    """One process: a head that stays has its weights and moments, a new one begins as its neighbour."""
    every, half, again = make(FOUR, LOCAL), make(FOUR, HALF), make(FOUR, LOCAL)
    train(every, range(2))
    every.save_checkpoint(tmp_path)
    half.load_checkpoint(tmp_path)
    assert half.load_report == [HEADS[4], *GONE]
    assert list(half.reference.aux_heads) == [1]
    assert_same_head(half, 1, every, 1)
    train(half, range(2, 4))
    half.save_checkpoint(tmp_path)
    assert [path.name for path in (tmp_path / "global_step4").glob("aux_head_*")] == ["aux_head_04-model_states.pt"]
    again.load_checkpoint(tmp_path)
    assert again.load_report == [BORN[0], HEADS[4], BORN[1]]
    for loss in (0, 1, 2):
        assert_same_head(again, loss, half, 1)
    assert all(map(torch.equal, trunk(again), trunk(half)))
    train(again, range(4, 5))


def assert_same_head(ours: VirtualPipeline, loss: int, theirs: VirtualPipeline, other: int) -> None:
    """Weights and moments."""
    heads = ours.reference.aux_heads[loss], theirs.reference.aux_heads[other]
    for one, two in zip(*(head.parameters() for head in heads), strict=True):
        assert torch.equal(one, two)
        for key in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(ours.optimizers[loss].state[one][key], theirs.optimizers[other].state[two][key])


def test_phases_of_mode_sum_go_on_bit_for_bit(tmp_path: Path) -> None:
    """Local, the sum of all exits, pairwise: stopped in the second, or before it, nothing changes."""
    block = {**HALF, "schedule": PHASES}
    whole = make(FOUR, block)
    for batch in range(6):
        if batch in (2, 3):
            whole.save_checkpoint(tmp_path)
        train(whole, range(batch, batch + 1))
    for batch in (2, 3):
        resumed = make(FOUR, block)
        resumed.load_checkpoint(tmp_path, f"global_step{batch}")
        assert resumed.load_report == []
        train(resumed, range(batch, 6))
        assert all(map(torch.equal, trunk(resumed), trunk(whole)))
        assert_same_head(resumed, 1, whole, 1)


def test_steps_may_be_numbers_or_tensors(tmp_path: Path) -> None:
    """DeepSpeed's own optimizers count in Python's numbers, torch's in tensors."""
    one = make(TWO, GLOBAL)
    train(one, range(1))
    one.save_checkpoint(tmp_path)
    path = tmp_path / "global_step1" / "mp_rank_00_model_states.pt"
    file = torch.load(path, weights_only=False)
    for state in file["optimizer"]["state"].values():
        state["step"] = 7
    torch.save(file, path)
    (tmp_path / "global_step1" / "contents.json").write_text(
        json.dumps({"shape": one._checkpoints.shape().model_dump(), "files": {}})
    )
    other = make(FOUR, GLOBAL)
    other.load_checkpoint(tmp_path)
    assert {float(state["step"]) for state in other.optimizers[0].state.values()} == {7}
