"""The learning-quality study: its tasks, its bookkeeping, and its shortest result."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from benchmarks.pages import filled, markdown
from benchmarks.quality.asynchronous import Asynchronous
from benchmarks.quality.gradients import cosines
from benchmarks.quality.optimizers import LARGEST_BASIS, MuonAndAdamW, Optimized
from benchmarks.quality.plans import HOP_ROWS, PLANS, RATES, TEXT_ROWS, best_rates, hop
from benchmarks.quality.price import asynchronous_price, head_price, price
from benchmarks.quality.probes import probes
from benchmarks.quality.records import load
from benchmarks.quality.report import (
    DOCS,
    LEARNED,
    LEARNED_HEADS,
    PAGES,
    RESULTS,
    depth_table,
    hop_table,
    tables,
    text_table,
    tuned,
)
from benchmarks.quality.rivals import late_table
from benchmarks.quality.run import SOLVED, Run, train
from benchmarks.quality.second import BACKPROPAGATION, ROWS, large, large_run
from benchmarks.quality.second_report import (
    after,
    equal_time_table,
    exact_price,
    learned_heads,
    learned_rows,
    row_price,
)
from benchmarks.quality.seeds import difference
from benchmarks.quality.tasks import HopTask
from ibp_deepspeed import InterlockingConfig
from ibp_deepspeed.models import CausalLM
from ibp_deepspeed.models.build import virtual_pipeline
from ibp_deepspeed.single_process.virtual_pipeline import VirtualPipeline
from tests.models.test_causal_lm import tiny
from tests.toys import loss_fn, make_reference, micro_batches

SLOW_HEADS = "local, heads of slow copies of the next layer, K = 4"
ROOT = Path(__file__).parents[2]
OPTIONS = {"lr": 0.01, "betas": [0.9, 0.95], "weight_decay": 0.1}


@pytest.mark.parametrize("hops", [1, 2, 3])
def test_labels_are_where_the_hops_end(hops: int) -> None:
    tokens, labels = next(HopTask(hops, sequence_length=12, alphabet=3).batches(seed=0, size=20))
    for row, targets in zip(tokens.tolist(), labels.tolist(), strict=True):
        for i, target in enumerate(targets):
            place: int | None = i
            for _ in range(hops):
                before = [j for j in range(place) if row[j] == row[place]] if place is not None else []
                place = before[-1] + 1 if before else None
            assert target == (-100 if place is None else row[place])


def test_batches_depend_on_the_seed_alone_and_differ_from_the_held_out_ones() -> None:
    task = HopTask(1)
    first, again, other = (next(task.batches(seed, 8))[0] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(first, task.held_out()[0][0][:8])


def test_interlocking_learns_a_circuit_over_two_stages_that_local_learning_does_not() -> None:
    """The standing check: one hop, stages of one layer, the same 400 batches."""
    ends = {}
    for row in ("local, shared", "2-wise window, shared"):
        run = dataclasses.replace(hop(row, HOP_ROWS[row], 1, seed=0), steps=400, evaluations=2, width=32)
        ends[row] = train(run)["curve"][-1][1][-1]
    assert ends["2-wise window, shared"] > 0.97 > 0.93 > ends["local, shared"], ends


def test_a_run_is_named_by_what_it_depends_on() -> None:
    run = hop("global", HOP_ROWS["global"], 1, seed=0)
    assert run.id == Run(**json.loads(json.dumps(dataclasses.asdict(run)))).id
    changes: list[dict[str, Any]] = [{"seed": 1}, {"rate": 0.1}, {"task": {"hops": 2}}, {"interlocking": {}}]
    assert len({run.id, *(dataclasses.replace(run, **change).id for change in changes)}) == 5


def test_every_row_of_the_study_is_a_configuration() -> None:
    for interlocking in (*HOP_ROWS.values(), *TEXT_ROWS.values()):
        InterlockingConfig.parse(interlocking)
    assert len({run.id for run in PLANS["hops"](Path())}) == len(list(PLANS["hops"](Path())))


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    done = [{"id": run.id} for run in PLANS["check"](tmp_path)]
    (tmp_path / "check.jsonl").write_text("".join(json.dumps(record) + "\n" for record in done[1:]), encoding="utf-8")
    command = [sys.executable, "-m", "benchmarks.quality", "check", "--list", "--results", str(tmp_path)]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert shown.count("check local, shared") == 1 and shown.count("check ") == 1


def test_prices_follow_the_schedule() -> None:
    local, pairwise = (
        price(TEXT_ROWS["local, private"], 4, 2, 1000),
        price(TEXT_ROWS["pairwise window, private"], 4, 2, 1000),
    )
    assert price(TEXT_ROWS["global"], 4, 2, 1000).time == 1
    assert local.time == pytest.approx(3.1 / 5.25, abs=0.01) and pairwise.time == pytest.approx(4.1 / 5.25, abs=0.01)
    half = [{"from_step": 500, "width": 4, "mode": "furthest"}]
    changing = price({**TEXT_ROWS["local, private"], "schedule": half}, 4, 2, 1000)
    assert changing.time == pytest.approx((local.time + 1) / 2)
    periodic = price(TEXT_ROWS["local + global every 4th, shared"], 4, 2, 1000)
    assert local.time < periodic.time < 1
    assert price(TEXT_ROWS["local, shared, 1 block"], 4, 2, 1000).work > local.work + 0.3


def pair(stages: int = 1, **changes: Any) -> list[Asynchronous | VirtualPipeline]:
    """Ordinary backpropagation, or local learning on several stages, and another way, on the same layers."""
    config = {"train_micro_batch_size_per_gpu": 4, "optimizer": {"type": "AdamW", "params": OPTIONS}}
    block = {"strategy": "global" if stages == 1 else "local"}
    config |= {"interlocking": block}
    late: dict[str, Any] = {"delay": 0, "optimizer": "AdamW", **changes}
    made: list[Asynchronous | VirtualPipeline] = []
    for kind in (VirtualPipeline, partial(Asynchronous, **late)):
        parts = make_reference(stages, block)
        heads = list(parts.aux_heads.values()) if stages > 1 else None
        made.append(kind(cast(list[nn.Sequential], parts.stages), heads, loss_fn, config))
    return made


def all_parameters(run: VirtualPipeline) -> list[nn.Parameter]:
    return [parameter for stage in range(run.num_stages) for parameter in run.reference.parameters(stage)]


def weights(run: VirtualPipeline) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in all_parameters(run)]


def test_asynchronous_without_delay_is_backpropagation() -> None:
    exact, late = pair()
    for step in range(4):
        for run in (exact, late):
            run.train_batch(iter(micro_batches(step, 1)))
    assert all(map(torch.equal, weights(exact), weights(late)))


@pytest.mark.parametrize(("stages", "delay"), [(1, 1), (1, 2), (2, 1)])
def test_gradients_are_those_of_the_weights_some_batches_ago(stages: int, delay: int) -> None:
    """By hand: the gradients of each batch at old weights, given to the same optimizers; modules that are late too."""
    exact, late = pair(stages, delay=delay)
    history = [weights(exact)]
    for step in range(5):
        batch = micro_batches(step, 1)
        now, parameters = weights(exact), all_parameters(exact)
        for parameter, old in zip(parameters, history[max(0, step - delay)], strict=True):
            parameter.data.copy_(old)
        exact.reference.accumulate(batch)
        for parameter, value in zip(parameters, now, strict=True):
            parameter.data.copy_(value)
        for stage, optimizer in enumerate(exact.optimizers):
            torch.nn.utils.clip_grad_norm_(exact.reference.parameters(stage), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        history.append(weights(exact))
        late.train_batch(iter(batch))
        for a, b in zip(history[-1], weights(late), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_nesterov_is_another_optimizer_at_the_same_rate() -> None:
    exact, other = pair(optimizer="NAdam")
    for run in (exact, other):
        run.train_batch(iter(micro_batches(0, 1)))
    assert not any(map(torch.equal, weights(other), weights(exact)))
    assert [group["lr"] for group in other.optimizers[0].param_groups] == [OPTIONS["lr"]] * 2


def language_model(optimizer: str, vocabulary: int) -> VirtualPipeline:
    """Four stages of one layer, trained on three batches."""
    block = {"strategy": "local", "exits": 2}
    config = {"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "AdamW", "params": OPTIONS}}
    model = CausalLM(tiny("llama", num_hidden_layers=4, vocab_size=vocabulary), seed=0)
    kind = partial(Optimized, optimizer=optimizer)
    made = virtual_pipeline(model, {**config, "interlocking": block}, 4, [1] * 4, kind=kind)
    for _ in range(3):
        tokens = torch.randint(0, vocabulary, (2, 8))
        made.train_batch(iter([(tokens, tokens)]))
    return made


def test_basis_rotation_turns_sides_of_the_layers_and_not_of_the_vocabulary() -> None:
    made = language_model("SOAP", LARGEST_BASIS + 1)
    for optimizer in made.optimizers:
        assert [group["weight_decay"] for group in optimizer.param_groups] == [OPTIONS["weight_decay"], 0.0]
        for p in optimizer.param_groups[0]["params"]:
            for side, basis in zip(p.shape, optimizer.state[p]["Q"], strict=True):
                assert len(basis) == (0 if side > LARGEST_BASIS else side)
                if len(basis):
                    torch.testing.assert_close(basis @ basis.T, torch.eye(side), atol=1e-5, rtol=0)


def test_muon_takes_the_matrices_of_the_layers_on_every_stage() -> None:
    """Also on a stage without an embedding or a head, whose largest matrix is a layer's."""
    made = language_model("Muon", 500)
    for k, optimizer in enumerate(made.optimizers):
        muon, others = cast(MuonAndAdamW, optimizer).parts
        layers = [p for p in made.reference.masters(k) if p.dim() == 2 and 500 not in p.shape]
        chosen = [p for group in muon.param_groups for p in group["params"]]
        assert len(layers) == 7 and list(map(id, chosen)) == list(map(id, layers))
        read = [p for group in others.param_groups for p in group["params"] if p.dim() == 2]
        assert len(read) == (k in (0, 1, 3))  # embedding, auxiliary head, LM head


def test_an_unknown_optimizer_is_refused() -> None:
    with pytest.raises(ValueError, match="no optimizer Lion"):
        language_model("Lion", 500)


def test_a_copied_layer_that_no_loss_trains_costs_two_thirds() -> None:
    works = [row_price(row, 4).work for row in (SLOW_HEADS, "local, K = 4")]
    assert works[0] - works[1] == pytest.approx(0.75 * 2 / 2 / 3, abs=0.01)  # 3 of 4 stages; 2 of 3 units; 2 layers


def test_muon_makes_updates_of_layers_orthogonal_and_adamw_the_rest() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(16, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    parameters = list(model.parameters())
    optimizer = MuonAndAdamW(parameters, below=64, lr=0.1, betas=(0.9, 0.95), weight_decay=0.0)
    before = [parameter.detach().clone() for parameter in parameters]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    parameters[1].grad = torch.diag(torch.tensor([1.0, 0.7, 0.4, 0.2]))
    optimizer.step()
    after = [parameter.detach().clone() for parameter in parameters]
    steps = [now - was for now, was in zip(after, before, strict=True)]
    spectrum = torch.linalg.svdvals(steps[1])
    assert spectrum.max() / spectrum.min() < 2 and steps[0].abs().max() <= 0.1001 and all(s.any() for s in steps)
    for group in optimizer.param_groups:  # as a schedule does
        group["lr"] = 0.0
    optimizer.step()
    assert all(map(torch.equal, parameters, after))


def test_rows_of_the_second_study_wait_for_their_rates(tmp_path: Path) -> None:
    assert not list(large(tmp_path))
    tried = [large_run(BACKPROPAGATION, rate=rate, steps=9, study="rates") for rate in (0.1, 0.2)]
    lines = [{"id": r.id, "run": dataclasses.asdict(r), "curve": [[9, [r.rate]]]} for r in tried]
    (tmp_path / "rates.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    found = list(large(tmp_path))
    assert found and {run.rate for run in found} == {0.1} and len({run.id for run in found}) == len(found)
    assert {run.row for run in found} == {BACKPROPAGATION, "sum, K = 8"}
    for row in ROWS.values():
        assert row.like is None or ROWS[row.like].like is None
        InterlockingConfig.parse(row.block)


def record(row: str, loss: float, **values: Any) -> dict[str, Any]:
    run = {"row": row, "interlocking": TEXT_ROWS[row], "layers": 8, "stages": 4, "steps": 1000, "rate": 0.1}
    return {"run": run | {"task": {}} | values, "curve": [[1, [9.0, 9.0, 9.0, 9.0]], [2, [5.0, 4.0, 3.5, loss]]]}


def test_text_table_measures_against_global() -> None:
    rows = [
        record("global", 2.0),
        record("global", 3.0, layers=2, stages=2),
        record("global", 2.2, steps=500),
        record("local, private", 2.1),
        record("local, private", 2.3),
    ]
    cells = dict(zip(*[text_table(rows)[i] for i in (0, 2)], strict=True))
    assert cells["last exit"] == "2.200 ± 0.100" and cells["gap to global"] == "+10.0%"
    assert cells["share of depth's gain"] == "80%" and cells["seeds"] == "2"
    assert 2.0 < float(cells["global at equal time"]) < 2.2  # 0.59 of the batches, between 500 and 1000
    assert markdown(depth_table(rows)).count("3.000") == 1


def test_hop_table_counts_what_is_solved() -> None:
    solved = record("local, private", SOLVED, task={"hops": 1}) | {"steps": 300}
    table = hop_table([solved, record("local, private", 0.5, task={"hops": 1}) | {"steps": 900}], [1])
    assert table[1][1].endswith("· 1/2 (300)")


def test_the_first_rate_stays_unless_another_is_clearly_better() -> None:
    first, other = RATES[0], RATES[1]
    rows = [record("global", 2.0, rate=first), record("global", 1.9, rate=other)]
    rows += [record("global", 2.5, rate=first, layers=2), record("global", 2.46, rate=other, layers=2)]
    assert best_rates(rows) == {("global", 8): other, ("global", 2): first}
    better = [record("global", 1.9, rate=0.2), record("global", 2.1, rate=0.2)]
    rows = [record("global", 2.1, rate=0.1), *better, record("global", 9.0, layers=2)]
    assert tuned(rows) == rows[1:]


def test_gradient_of_backpropagation_agrees_with_itself() -> None:
    reference = make_reference(3, {"strategy": "global"})
    assert cosines(reference, *micro_batches(0, 1)[0]) == pytest.approx([1.0] * 3)
    local = make_reference(3, {"strategy": "local"})
    values = cosines(local, *micro_batches(0, 1)[0])
    assert values[-1] == pytest.approx(1.0) and all(value < 0.99 for value in values[:-1])


def test_tables_of_the_page_are_those_of_the_records() -> None:
    of = {path.stem: load(path) for path in RESULTS.glob("*.jsonl")}
    for name in PAGES:
        page = (DOCS / name).read_text(encoding="utf-8")
        assert page.count("<!-- table: ") == page.count("<!-- end -->") > 0
        assert filled(page, tables(of)) == page
    assert json.loads(LEARNED.read_text(encoding="utf-8")) == learned_rows(of)
    late = [(row.get("optimizer"), row["mean"] < 0.05) for row in learned_rows(of) if row["mode"] == "late"]
    assert late == [(None, True), ("Muon", True)], "the corrected rival"
    assert json.loads(LEARNED_HEADS.read_text(encoding="utf-8")) == learned_heads(of)


def test_a_head_costs_as_large_a_part_of_the_vocabulary_as_it_reads() -> None:
    whole, sampled, copied = (
        head_price(options, 4096, 96, "llama3-8b") for options in ({}, {"negatives": 256}, {"readout": "shared"})
    )
    matrices = 2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14_336
    assert whole == pytest.approx(4096 * 128_256 / (4 * (matrices + 4096 * 4096)))  # queries times keys: 4096 tokens
    assert sampled == pytest.approx(whole / 16, rel=1e-3) and copied == pytest.approx(whole * 2 / 3)
    beside_a_copy = head_price({"readout": "shared", "negatives": 1024}, 4096, 96, "llama3-8b")
    assert beside_a_copy == pytest.approx(copied * 1024 / 128_256, rel=1e-2), "the number, not the part"


def test_differences_are_between_runs_of_the_same_seed() -> None:
    assert difference({0: 2.2, 1: 3.0, 7: 9.0}, {0: 2.0, 1: 3.0}) == "+5.0% (+0.0 … +10.0)"
    assert difference({1: 3.3}, {0: 2.0, 1: 3.0}) == "+10.0% (one seed)" and difference({1: 1.0}, {0: 1.0}) == "–"


def test_less_time_is_fewer_batches_against_asynchronous_backpropagation() -> None:
    def record(row: str, steps: int, seed: int, loss: float) -> dict[str, Any]:
        run = {"row": row, "steps": steps, "seed": seed, "cosine": False, "decay": 0.25, "rate": 0.1}
        return {"run": run, "curve": [[steps, [9.0, loss]]]}

    late = [record("asynchronous, 1 batch late, Nesterov", 4000, seed, 4.0) for seed in range(3)]
    ours = [record("local, K = 4", 4000, seed, 4.0) for seed in range(3)]
    header, *rows = late_table([*late, *ours], [record("local, K = 4", 1000, 0, 6.0)])
    assert header[-2:] == ["ours to it", "at equal tokens"] and {row[-1] for row in rows} == {"+0.0% (+0.0 … +0.0)"}
    assert [row[:3] for row in rows] == [
        ["local, K = 4", m, "asynchronous, 1 batch late, Nesterov"] for m in ("4", "8")
    ]
    share = asynchronous_price(4, 4).time / row_price("local, K = 4", 4).time
    assert 0.9 < share < 1 and rows[0][4] == f"{4000 * share:.0f}"
    assert rows[0][5].startswith(f"{100 * (math.log2(1 / share) / 4):+.1f}% (")  # 6 to 4 over two doublings


def test_equal_time_is_read_between_trainings_of_other_lengths() -> None:
    ends = {1000: 4.0, 4000: 2.0}
    assert after(ends, 2000) == 3.0 and after(ends, 4000) == 2.0 and after(ends, 999) is None is after(ends, 4001)

    def record(row: str, steps: int, seed: int, loss: float) -> dict[str, Any]:
        run = {"row": row, "steps": steps, "seed": seed, "cosine": False}
        return {"run": run, "curve": [[steps, [9.0, loss]]]}

    lengths = [record("backpropagation", steps, 0, loss) for steps, loss in ((2000, 5.0), (4000, 4.0))]
    others = [record("backpropagation", 4000, seed, 4.0) for seed in (1, 2)]
    table = equal_time_table([*lengths, *others, *(record("G = 4, K = 8", 4000, seed, 4.0) for seed in range(3))])
    share = row_price("G = 4, K = 8", 4).time / exact_price(8, 4)
    assert table[1][:2] == ["G = 4, K = 8", "3"]
    reached = 5.0 + (4.0 - 5.0) * math.log2(share * 2)
    assert (
        table[1][3] == f"{share:.2f}: {100 * (4.0 / reached - 1):+.1f}% ({100 * (4.0 / reached - 1):+.1f} … "
        f"{100 * (4.0 / reached - 1):+.1f})"
    )


def test_probes_tell_layers_that_know_the_next_token_from_those_that_don_t() -> None:
    torch.manual_seed(0)
    blank, told = nn.Linear(8, 8), nn.Embedding(16, 8)
    nn.init.zeros_(blank.weight)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            ids = torch.randint(16, (4, 32))
            yield ids, (ids + 1) % 16

    found = probes([told, blank, nn.Identity()], batches(), [next(batches())], 16, 8)
    assert found[0] < 0.7 and found[1] == pytest.approx(math.log(16), rel=0.1)
