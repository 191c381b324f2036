"""The planner's answers: costs, memory, and when not to interlock."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from ibp_deepspeed.config.interlocking import AuxHeadConfig
from ibp_deepspeed.errors import PlanError
from ibp_deepspeed.models import CausalLM
from ibp_deepspeed.models.workload import kept_bytes_per_token, workload
from ibp_deepspeed.planner import plan
from ibp_deepspeed.planner.advice import advise
from ibp_deepspeed.planner.hardware import Cluster, Device, Link
from ibp_deepspeed.planner.learned import Learned, learned, table
from ibp_deepspeed.planner.learned_heads import LearnedHead, Sizes, learned_head
from ibp_deepspeed.planner.memory import PUT_OFF, stage_memory
from ibp_deepspeed.planner.plan import Candidate, Job, candidates, evaluate
from ibp_deepspeed.planner.workload import NOTHING, Work, Workload, balanced
from tests.docs.test_pages import commands
from tests.models.test_costs import llama

ROOT = Path(__file__).resolve().parents[2]
LAYER = Work(1e9, 1e9, 1e9, 1000, 1000, 64.0)


def job(stages: int = 8, micro_batches: int = 4, head: float = 0.1, memory: float | None = None, **more: Any) -> Job:
    """Two like layers a stage, one second each, nothing at the ends."""
    of_head = Work(head * 2e9 / 3, head * 2e9 / 3, head * 2e9 / 3, 100, 100, 0.0)
    work = Workload("layers", (NOTHING, *[LAYER] * (2 * stages), NOTHING), of_head, 1e3, 512, 4)
    where = Device("device", 1e9, memory, "made up")
    cluster = Cluster(where, Link(1e9, 0.0), Link(1e9, 0.0))
    bounds = [0, *range(3, 2 * stages, 2), 2 * stages + 2]
    return Job(work, bounds, micro_batches, 1, cluster, **more)


def rows(of: Job) -> dict[str, plan.Row]:
    return {c.name: evaluate(of, c) for c in candidates(of.stages)}


def test_times_are_those_of_the_schedules() -> None:
    found = rows(job())
    for name, units in (("1F1B", 33), ("N = 1", 12.4), ("modules of 4 (G = 4)", 15.4), ("asynchronous 1F1B", 12)):
        assert found[name].batch_time == pytest.approx(2 * units, rel=1e-3), name
    assert found["backpropagation, input gradients first"].batch_time == pytest.approx(2 * 23)
    assert found["N = 2"].work == pytest.approx(1 + (7 * 0.1 + 6) / 24) and found["1F1B"].work == 1
    assert found["ZBV"].reason is not None and "at least 16 micro-batches" in found["ZBV"].reason
    assert [name for name, row in found.items() if row.timing is not None and row.exact] == [
        "1F1B",
        "backpropagation, input gradients first",
    ]


@pytest.mark.parametrize(("stages", "most"), [(64, 4_000_000), (1024, 12_000_000)])
def test_a_plan_of_many_stages_is_a_bounded_amount_of_work(stages: int, most: int) -> None:
    """All rows; simulated as they are, 64 stages alone would be 20 million instructions, 1024 stages 10^11."""
    of = job(stages=stages, micro_batches=2 * stages, head=0.3)
    found = list(rows(of).values())
    assert all(row.timing is not None for row in found) and len(found) >= 38
    assert 0 < sum(row.timing.executed for row in found if row.timing is not None) < most
    for row in found:
        assert row.timing is not None and all(-1e-9 <= share < 1 for share in row.timing.idle), row.candidate.name


def test_memory_is_what_a_stage_holds() -> None:
    work = job().workload
    of = stage_memory(work, [0, 3, 18], 0, 4, head=True)
    assert (of.weights, of.gradients, of.optimizer) == (2100 * 4, 2100 * 4, 2100 * 8)
    assert of.activations == 4 * 2 * 64 + 2 * 2**26 and of.head == 100 * 16
    half = replace(work, weight_bytes=2)
    shared = stage_memory(half, [0, 3, 18], 0, 4, head=False, zero=1, replicas=4)
    assert (shared.weights, shared.gradients, shared.optimizer) == (2000 * 2, 2000 * 4, 2000 * 12 / 4)
    again = stage_memory(half, [0, 3, 18], 0, 4, head=False, recompute=True)
    assert again.activations == 4 * 1e3 + 128
    due = stage_memory(half, [0, 3, 18], 0, 4, head=False, put_off=2)
    assert due.activations == pytest.approx(4 * 128 + 2 * PUT_OFF * 128)
    due = stage_memory(half, [0, 3, 18], 0, 4, head=False, put_off=2, recompute=True)
    assert due.activations == pytest.approx(4 * 1e3 + 128 + 2 * PUT_OFF * 128)


def test_a_balanced_partition_counts_heads_and_vocabulary() -> None:
    ends = replace(LAYER, forward=3e9, input_gradient=3e9, weight_gradient=3e9)
    bounds = balanced([NOTHING, *[LAYER] * 12, ends], 4, None, range(4))
    assert [b - a for a, b in zip(bounds, bounds[1:], strict=False)] == [5, 4, 3, 2]  # embedding and LM head counted
    with_heads = balanced([NOTHING, *[LAYER] * 12, NOTHING], 3, ends, (0, 2))
    assert [b - a for a, b in zip(with_heads, with_heads[1:], strict=False)] == [3, 5, 6]


def test_advice() -> None:
    of = job(micro_batches=4)
    found = list(rows(of).values())
    advised = advise(of, found, 0.0).row
    assert advised is not None and advised.candidate.name.startswith("modules")
    strict = advise(of, found, -1.0)
    assert strict.row is not None and strict.row.candidate.name == "backpropagation, input gradients first"
    assert strict.reason.startswith("Do not interlock here") and "learn worse" in strict.reason
    many = job(stages=2, micro_batches=64)
    assert "nothing that interlocks is more than 5% faster" in advise(many, list(rows(many).values())).reason
    tiny = job(memory=1e6)
    nothing = advise(tiny, list(rows(tiny).values()))
    assert nothing.row is None and nothing.reason.startswith("Nothing fits into 0.000931 GiB")
    assert nothing.reason.endswith(
        "Not even one decoder layer a stage with recomputation would fit: take a smaller model or micro-batch."
    )


def test_what_would_fit_is_said_with_its_size() -> None:
    """Layers that keep 64 MB a micro-batch: 1F1B's first stage of four holds four times two of them."""
    heavy = job(stages=4, micro_batches=8)
    layers = (NOTHING, *[replace(LAYER, kept=64e6)] * 8, NOTHING)
    heavy = replace(heavy, workload=replace(heavy.workload, layers=layers, head=None))

    def said(memory: float, **more: Any) -> str:
        device = replace(heavy.cluster.device, memory=memory)
        of = replace(heavy, cluster=replace(heavy.cluster, device=device), **more)
        advice = advise(of, list(rows(of).values()))
        assert advice.row is None
        return advice.reason

    assert "With recomputation 1F1B would hold 0.2 GiB, which fits." in said(2.7e8)
    parameters = replace(LAYER, kept=0.0, parameters=10**7, trained=10**7)
    heavy = replace(heavy, workload=replace(heavy.workload, layers=(NOTHING, *[parameters] * 8, NOTHING)))
    assert "With ZeRO 1 1F1B would hold 0.3 GiB" in said(3.2e8, replicas=8)
    assert "On 8 stages 1F1B would hold 0.3 GiB" in said(3.2e8)
    with pytest.raises(PlanError, match="of 1F1B: with jitter or a straggler"):
        many = replace(heavy, micro_batches=20_000, cluster=replace(heavy.cluster, jitter=0.1))
        advise(many, list(rows(many).values()))


def test_what_is_known_of_learning_is_named_with_its_size() -> None:
    assert table() and all(row.low <= row.mean <= row.high and row.seeds >= 3 for row in table())
    found = learned(1, 2, "furthest", 0)
    assert isinstance(found, Learned) and f"over {found.seeds} seeds; {found.size}" in found.sentence()
    assert found.size.startswith("8 layers of width ")
    assert learned(1, 64, "window", 0) is None and learned(2, 4, "furthest", 0) is None


def test_borrowed_layers_need_longer_stages() -> None:
    of = job()
    short = replace(of, bounds=[0, 2, *range(3, 10), 18])
    assert evaluate(of, Candidate("b", {"strategy": "local", "aux_head": {"borrow": 1}})).timing is not None
    reason = evaluate(short, Candidate("b", {"strategy": "local", "aux_head": {"borrow": 1}})).reason
    assert reason == (
        "a head behind 1 borrowed layer needs stages of more than that, the shortest has 1: fewer stages would make "
        "them longer."
    )
    more = evaluate(of, Candidate("b", {"strategy": "local", "aux_head": {"borrow": 3}})).reason
    assert more is not None and more.endswith("the shortest has 2: borrow = 1 would fit.")


def test_a_private_head_of_llama_3_8b_is_two_forward_passes_of_a_stage() -> None:
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 4, "vocab_size": 128_256}
    model = CausalLM(AutoConfig.for_model("llama", num_attention_heads=32, num_key_value_heads=8, **sizes))
    size: dict[str, int] = {"samples": 1, "sequence_length": 2048, "weight_bytes": 2}

    def share(**options: Any) -> float:
        found = workload(model, AuxHeadConfig(**options), **size)
        assert found.head is not None
        return found.head.total / (4 * found.layers[1].forward)

    assert share() == pytest.approx(1.74, abs=0.01)
    assert share(negatives=16_384) == pytest.approx(1.74 * 16_384 / 128_256, rel=0.01)
    assert share(readout="shared") == pytest.approx(1.74 * 2 / 3, rel=0.01)
    assert share(aux_tokens=0.25) == pytest.approx(1.74 / 4, rel=0.01)


def test_kept_bytes_are_those_of_a_real_layer() -> None:
    model, tokens = llama(), 96
    layer = model.build_layer(1)
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(torch.zeros(1, tokens, model.hidden_size, requires_grad=True))
    counted = sum(storage.nbytes() for place, storage in kept.items() if place not in own)
    assert kept_bytes_per_token(model, torch.float32) * tokens == pytest.approx(counted, rel=0.05)


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/plan.py", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_command_writes_what_it_advises(tmp_path: Path) -> None:
    target, numbers = tmp_path / "ds.json", tmp_path / "plan.json"
    model = ("--model", "llama-tiny", "--stages", "8", "--sequence-length", "128", "--fp32")
    shown = run(*model, "--micro-batches", "2", "--write", str(target), "--json", str(numbers), "--tolerance", "9")
    assert shown.returncode == 0, shown.stderr
    settings = json.loads(target.read_text())
    assert settings["gradient_accumulation_steps"] == 2 and settings["interlocking"]["strategy"] in ("local", "nwise")
    assert len(json.loads(numbers.read_text())["rows"]) > 10 and "Advice:" in shown.stdout


def test_the_pages_commands_run_and_one_stage_can_be_planned(tmp_path: Path) -> None:
    plain, *searches = [words for words in commands("planning.md") if "--device" in words]
    shown = run(*plain[2:])
    assert shown.returncode == 0 and "Advice: " in shown.stdout, shown.stderr
    assert "of it by heads with negatives" in shown.stdout and "not measured: losses" not in shown.stdout
    assert "the slowest stage is" in shown.stdout and "balanced by parameters" in shown.stdout
    page = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")
    for words in searches:
        target = tmp_path / words[-1]
        shown = run(*words[2:-1], str(target))
        assert shown.returncode == 0, shown.stderr
        advice = next(line for line in shown.stdout.splitlines() if line.startswith("Advice: "))
        assert advice in page  # what the page decides by
        assert json.loads(target.read_text())["interlocking"]["exits"] in (4, 8)
    deep = run("--model", "llama-tiny", "--stages", "4", "--head", "blocks=1")
    assert deep.returncode == 0 and "Such heads were not measured: losses are those of private ones" in deep.stdout
    uneven = run("--model", "llama-tiny", "--stages", "4", "--jitter", "0.1", "--straggler", "1=2")
    assert uneven.returncode == 0 and "Advice: " in uneven.stdout, uneven.stderr
    alone = run("--model", "llama-tiny", "--stages", "1")
    assert alone.returncode == 0 and "Do not interlock here" in alone.stdout, alone.stderr
    listed = run("--devices")
    assert listed.returncode == 0 and "H100: 989 TFLOP/s" in listed.stdout, listed.stderr


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--stages", "99"), "--stages is 99, the model has 8 decoder layers"),
        (("--stages", "0"), "--stages is 0: give at least 1"),
        (("--stages", "2", "--device", "Abacus"), "--device Abacus is not known: give its --tflops"),
        (("--stages", "2", "--head", "ranc=3"), 'unknown key "interlocking.aux_head.ranc" (did you mean "rank"?)'),
        (("--stages", "2", "--gbps", "0"), "--gbps is 0: give more than 0"),
        (("--stages", "2", "--head", "negatives"), "--head negatives: write it as key=value"),
        (("--stages", "2", "--head", "negatives=99999"), "tokens, give at most those"),
        (("--stages", "2", "--head", "borrow=1"), "have a row of their own"),
        ((), "the number of stages is missing: give --stages, or --search with --devices-total"),
        (("--stages", "2", "--straggler", "2=1.5"), "stage 2 can't be slow, the 2 stages are 0 to 1"),
        (("--stages", "2", "--straggler", "1"), "--straggler 1: write it as STAGE=FACTOR, like 2=1.5"),
        (("--stages", "2", "--straggler", "1=0"), "stage 1 takes 0 times as long: give more than 0"),
        (("--stages", "2", "--jitter", "-1"), "a jitter of -1: give 0 or more"),
        (("--stages", "2", "--json", "nowhere/plan.json"), "there is no folder nowhere to write plan.json to"),
    ],
)
def test_wrong_arguments_are_one_sentence(words: tuple[str, ...], sentence: str) -> None:
    shown = run("--model", "llama-tiny", *words)
    assert shown.returncode == 1 and shown.stdout == "", shown.stdout
    assert shown.stderr.startswith("error: ") and sentence in shown.stderr and shown.stderr.count("\n") == 1


def test_options_of_heads_are_those_of_all_ways_that_have_heads() -> None:
    ways = {way.name: way.block for way in candidates(4, {"readout": "shared"})}
    assert ways["N = 2"] == {"strategy": "nwise", "width": 2, "mode": "window", "aux_head": {"readout": "shared"}}
    borrowed = ways["N = 1, heads behind a borrowed layer"]
    assert borrowed is not None and borrowed["aux_head"] == {"readout": "shared", "borrow": 1}
    alone = ways["backpropagation, input gradients first"]
    assert alone is not None and "aux_head" not in alone and ways["1F1B"] is None


def test_what_cheap_heads_lose_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = (
        LearnedHead({"negatives": 256}, 0.0625, 4, 0.02, 0.01, 0.03, 3),
        LearnedHead({"negatives": 1024}, 0.25, 4, 0.01, 0.01, 0.01, 1),
    )
    one = LearnedHead({"negatives": 256}, 0.0625, 2, 0.005, 0.005, 0.005, 1)
    copied = LearnedHead({"readout": "shared"}, None, 4, -0.001, -0.001, -0.001, 1)
    smooth = LearnedHead({"objective": "label_smoothing"}, None, 4, 0.01, 0.01, 0.01, 1)
    few_positions = LearnedHead({"aux_tokens": 0.25}, 0.25, 4, 0.1, 0.1, 0.1, 1)
    narrow = LearnedHead({"rank": 24}, 0.25, 4, 0.1, 0.1, 0.1, 1)
    both = LearnedHead({"readout": "shared", "negatives": 256}, 256, 4, 0.1, 0.1, 0.1, 1)
    measured = (both, few, many, one, copied, smooth, few_positions, narrow)
    monkeypatch.setattr("ibp_deepspeed.planner.learned_heads.heads", lambda: measured)
    small, large = Sizes(4096, 96), Sizes(131072, 4096)

    def head(exits: int = 4, sizes: Sizes | None = small, **options: Any) -> LearnedHead | None:
        return learned_head(AuxHeadConfig(**options), exits, sizes)

    assert head(negatives=1024, sizes=large) == replace(few, or_more=True) and head(negatives=8192, sizes=large) is few
    assert head(rank=48, sizes=large) == replace(narrow, or_more=True)
    assert head(rank=1024, sizes=large) is narrow is head(rank=24) and head(negatives=9000, sizes=None) is None
    assert head(aux_tokens=0.5, sizes=large) is few_positions and head(readout="shared", sizes=None) is copied

    assert (
        head(2, negatives=1000) is one
        and head(2, negatives=9) == replace(one, or_more=True)
        and head(8, negatives=1000) is few
    )
    assert head(2, readout="shared") is copied and head(negatives=300, readout="frozen") is None
    assert head(negatives=300, readout="shared") is both is head(negatives=300, readout="shared", sizes=large)
    assert head(aux_tokens=0.5, negatives=300) is None
    assert " heads with readout = shared, negatives = 256 at" in both.sentence()

    assert head() is None and head(negatives=1000) is few and head(negatives=9000) is many
    assert head(readout="shared") is copied and head(readout="frozen") is None and head(negatives=512, blocks=1) is None
    assert head(negatives=300, aux_tokens_seed=3, chunk_tokens=4) is few
    assert head(objective="label_smoothing") is smooth and head(objective="predsim") is None
    assert head(objective={"name": "label_smoothing", "smoothing": 0.3}) is None
    rare = head(negatives=9)
    assert rare is not None and rare.sentence().startswith("+2.0% or more of it by heads with negatives = 256 of 4,096")
    plain, with_few = learned(1, 4, "window", 0), learned(1, 4, "window", 0, AuxHeadConfig(negatives=300), small)
    assert plain is not None and with_few is not None and plain.head is None
    assert with_few.mean == pytest.approx((1 + plain.mean) * 1.02 - 1) and with_few.high > plain.high + 0.029
    assert (
        "+2.0% of it by heads with negatives = 256 of 4,096 at 4 exits (+1.0% to +3.0% over 3 seeds)."
        in with_few.sentence()
    )
