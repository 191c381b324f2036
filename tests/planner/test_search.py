"""The search finds what trying everything finds, and says what it left out."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ibp_deepspeed.config.interlocking import InterlockingConfig
from ibp_deepspeed.planner.hardware import Cluster, Device, Link
from ibp_deepspeed.planner.learned_heads import LearnedHead
from ibp_deepspeed.planner.plan import evaluate, outlook
from ibp_deepspeed.planner.search import Result, search
from ibp_deepspeed.planner.ways import Kind, Space, ways
from ibp_deepspeed.planner.workload import Work, Workload
from tests.planner.test_plan import run

LAYER = Work(1e9, 1e9, 1e9, 1000, 1000, 2e7)
ENDS = Work(0.0, 0.0, 0.0, 3000, 3000, 0.0), Work(4e9, 4e9, 4e9, 3000, 3000, 0.0)
LOGITS = 2 * 2**26


def space(
    devices: int = 4, host: int = 4, samples: int = 8, memory: float | None = None, gbps: float = 1.0, layers: int = 8
) -> Space:
    """Layers of one second; a private head takes half a second, a cheap one a twentieth."""

    def kind(name: str, options: dict[str, Any], share: float) -> Kind:
        third = share * 1e9 / 3
        head = Work(third, third, third, 2000, 2000, 0.0)
        return Kind(name, options, Workload("layers", (ENDS[0], *[LAYER] * layers, ENDS[1]), head, 1e3, 512, 4))

    cluster = Cluster(Device("device", 1e9, memory, "made up"), Link(1e6, 0.0), Link(gbps * 1e4, 0.01))
    kinds = [kind("private", {}, 0.5), kind("cheap", {"negatives": 16}, 0.05)]
    return Space(devices, host, samples, kinds, cluster)


def by_brute_force(of: Space, tolerance: float) -> list[tuple[float, tuple[int, int, str]]]:
    """Time and group of the best of each group, all simulated, recomputing or not."""
    best: dict[tuple[int, int, str], float] = {}
    limit = of.cluster.device.memory
    for way in ways(of, Counter()):
        for recompute in (False, True):
            row = evaluate(replace(way.job, recompute=recompute), way.candidate)
            if row.reason is not None or (limit is not None and row.most_memory > limit):
                continue
            if row.exact or (row.learned is not None and row.learned.mean <= tolerance):
                best[way.group] = min(row.batch_time, best.get(way.group, float("inf")))
    return sorted((time, group) for group, time in best.items())


@settings(max_examples=6, deadline=None)
@given(
    st.sampled_from([(2, 2), (4, 4), (4, 2)]),
    st.sampled_from([2, 3, 4]),
    st.sampled_from([None, LOGITS + 5e7, LOGITS + 1e8, LOGITS + 3e8]),
    st.sampled_from([0.01, 1.0]),
    st.sampled_from([0.0, 0.021, 0.06]),
)
def test_the_search_is_brute_force_with_less_work(
    hosts: tuple[int, int], samples: int, memory: float | None, gbps: float, tolerance: float
) -> None:
    of = space(*hosts, samples=samples * hosts[0], memory=memory, gbps=gbps)
    expected = by_brute_force(of, tolerance)[:10]
    result = search(of, tolerance)
    assert result.complete and result.looked_at == sum(1 for _ in ways(of, Counter()))
    assert [found.row.batch_time for found in result.best] == pytest.approx([time for time, _ in expected], rel=1e-4)
    exact = [time for time, (_, _, name) in by_brute_force(of, -1.0)]
    assert (result.exact.row.batch_time if result.exact else None) == pytest.approx(
        exact[0] if exact else None, rel=1e-4
    )
    for found in result.best:
        assert memory is None or found.row.most_memory <= memory
        job = found.way.job
        assert job.stages * job.replicas == of.devices
        assert job.micro_batches * found.way.samples * job.replicas == of.samples
        assert found.way.candidate.block is not None
        block = {"aux_head": {}, **found.way.candidate.block}
        InterlockingConfig.parse(block)
        again = outlook(job, found.way.candidate.block)
        assert [m.total for m in again.memory] == [m.total for m in found.row.memory]


def test_it_does_not_depend_on_the_run_and_prunes() -> None:
    of = space(8, 4, samples=64, layers=16)
    first, second = search(of, 0.06), search(of, 0.06)
    assert [f.way.group for f in first.best] == [f.way.group for f in second.best] and len(first.best) == 10
    assert first.excluded == second.excluded
    left = sum(n for why, n in first.excluded.items() if not why.startswith("numbers of stages"))
    assert first.looked_at == first.simulated + left and first.simulated < first.looked_at / 10
    few = search(of, 0.06, most=5)
    assert few.simulated == 5 and not few.complete and few.excluded["beyond the number of simulations"] > 0


def test_heads_that_do_not_go_behind_borrowed_layers_are_tried_where_they_do() -> None:
    of = space()
    kinds = [
        replace(of.kinds[0], name=name, options={"objective": name}) for name in ("momentum", "stochastic_layerwise")
    ]
    found = search(replace(of, kinds=kinds), 1.0)
    assert found.excluded["their configuration can't run"] and found.best
    assert all("borrow" not in (of.way.candidate.block or {}).get("aux_head", {}) for of in found.best)


def test_what_is_advised_is_exact_unless_it_is_much_slower() -> None:
    far = search(space(samples=8), 0.0)
    assert far.exact is far.best[0] is far.advised
    exact, time = far.best[0], far.best[0].row.batch_time
    for share, advised in ((0.94, True), (0.96, False)):
        faster = replace(exact, row=replace(exact.row, batch_time=share * time, exact=False))
        result = Result(best=[faster, exact], exact=exact)
        assert result.advised is (faster if advised else exact)


def test_of_what_is_as_fast_the_one_that_learns_best_is_preferred() -> None:
    rows = search(space(samples=8), 0.06).best
    one = next(found for found in rows if found.row.learned is not None)
    assert one.row.learned is not None

    def way(time: float, mean: float) -> Any:
        assert one.row.learned is not None
        return replace(one, row=replace(one.row, batch_time=time, learned=replace(one.row.learned, mean=mean)))

    fastest, better, slow = way(1.0, 0.005), way(1.019, -0.007), way(1.03, -0.02)
    assert Result(best=[fastest, better, slow]).advised is better
    assert Result(best=[way(1.0, 0.004), way(1.01, 0.004)]).advised.row.batch_time == 1.0
    assert Result(best=[fastest, slow]).advised is fastest


def test_of_heads_that_cost_the_same_those_are_shown_that_learn_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not those that are named first."""
    of = space()
    copied = replace(of.kinds[0], name="copied", options={"readout": "shared"})
    for loss, shown in ((-0.01, "copied"), (0.01, "private")):
        measured = (LearnedHead({"readout": "shared"}, None, 2, loss, loss, loss, 3),)
        monkeypatch.setattr("ibp_deepspeed.planner.learned_heads.heads", lambda measured=measured: measured)
        best = search(replace(of, kinds=[of.kinds[0], copied]), 0.1).best
        assert {found.way.kind for found in best if found.way.kind} == {shown}


def test_recomputation_is_for_what_does_not_fit_otherwise() -> None:
    free = search(space(memory=None), 0.0).best[0]
    assert free.without_recompute is None and not free.way.job.recompute
    needed = LOGITS + 5e7
    tight = search(space(memory=needed), 0.0, keep=50)
    again = [found for found in tight.best if found.way.job.recompute]
    assert again and all(found.without_recompute is not None and found.without_recompute > needed for found in again)
    assert all(found.row.most_memory <= needed for found in tight.best)
    none = search(space(memory=1e3), 0.0)
    assert not none.best and none.excluded["they need more than 9.31e-07 GiB, recomputing or not"] > 0


def test_slow_links_between_hosts_keep_replicas_or_pipelines_inside() -> None:
    """Nothing but 2 hosts of 4: with a link that takes minutes for gradients the pipeline spans the hosts."""
    slow, fast = search(space(8, 4, 64, gbps=0.001, layers=16), 0.0), search(space(8, 4, 64, gbps=100, layers=16), 0.0)
    assert slow.best[0].way.job.stages == 8 and slow.best[0].way.job.replicas == 1
    assert fast.best[0].way.job.stages < 8
    assert {found.way.job.stages for found in (*slow.best, *fast.best)} <= {1, 2, 4, 8}
    of_six = search(space(12, 6, 24, layers=16), 0.0)
    assert of_six.excluded["numbers of stages: they would break hosts"] == 1  # 4 of 1, 2, 3, 4, 6, 12


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "--search needs --devices-total"),
        (("--devices-total", "4"), "give one of --batch-samples and --batch-tokens"),
        (
            ("--devices-total", "4", "--batch-tokens", "1000"),
            "--batch-tokens 1000 is no number of samples of 2048 tokens: 2048 would be",
        ),
        (
            ("--devices-total", "6", "--devices-a-host", "4", "--batch-samples", "8"),
            "6 devices don't fill hosts of 4: 4 would",
        ),
        (
            ("--devices-total", "4", "--batch-samples", "8", "--head", "negatives=99999999"),
            "tokens, give at most those",
        ),
        (("--devices-total", "4", "--batch-samples", "8", "--stages", "2"), "--stages is what --search finds"),
        (("--devices-total", "0", "--batch-samples", "8"), "--devices-total is 0: give at least 1"),
        (
            ("--devices-total", "22", "--batch-samples", "7"),
            "of any number of stages on 22 devices: 11 would, on 2 stages",
        ),
        (("--devices-total", "4", "--batch-samples", "8", "--memory", "0.001"), "ways fits on 4 × H100"),
    ],
)
def test_what_can_not_be_searched_is_one_sentence(words: tuple[str, ...], sentence: str) -> None:
    shown = run("--search", "--model", "llama-tiny", *words)
    assert shown.returncode == 1 and shown.stderr.startswith("error: "), shown.stderr
    assert sentence in shown.stderr and shown.stderr.count("\n") == 1, shown.stderr


def test_the_command_writes_what_it_found(tmp_path: Path) -> None:
    target, numbers = tmp_path / "ds.json", tmp_path / "search.json"
    words = ("--search", "--model", "llama-tiny", "--devices-total", "4", "--batch-samples", "16")
    shown = run(*words, "--sequence-length", "128", "--fp32", "--write", str(target), "--json", str(numbers))
    assert shown.returncode == 0, shown.stderr
    assert "ways looked at" in shown.stdout and "their learning is not measured" in shown.stdout
    best, written = json.loads(numbers.read_text())["advised"], json.loads(target.read_text())
    assert written["gradient_accumulation_steps"] == best["micro_batches"]
    assert written["train_micro_batch_size_per_gpu"] == best["samples"]
    assert written["pipeline"]["activation_checkpoint_interval"] == int(best["recompute"])
    bounds = best["bounds"]
    counts = [high - low for low, high in zip([1, *bounds[1:-1]], [*bounds[1:-1], bounds[-1] - 1], strict=True)]
    assert f"--stages {best['stages']} --partition {','.join(map(str, counts))}" in shown.stdout
    InterlockingConfig.parse(written["interlocking"])
