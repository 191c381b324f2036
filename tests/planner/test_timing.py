"""Large pipelines' times are continued from small ones; other systems' lists are executed as they stand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.speed.predicted import strategy_of
from ibp_deepspeed.errors import PlanError
from ibp_deepspeed.planner import timing
from ibp_deepspeed.planner.execution import execute
from ibp_deepspeed.planner.peers import make_peer
from ibp_deepspeed.planner.timing import Unevenness, peer_timing, strategy_timing
from ibp_deepspeed.schedule.predict import measure, predict
from ibp_deepspeed.schedule.simulator import Boundary, Costs, Simulator
from ibp_deepspeed.schedule.validate import validated_schedules
from ibp_deepspeed.strategy.strategy import Strategy
from ibp_deepspeed.strategy.timeline import BatchStrategy

EMULATED = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "speed" / "emulated.json"
MAKERS: dict[str, Callable[[int], Strategy]] = {
    "N = 1": lambda k: Strategy(k, 1, "window"),
    "N = 2": lambda k: Strategy(k, 2, "window"),
    "N = 3, furthest": lambda k: Strategy(k, 3, "furthest"),
    "G = 2": lambda k: Strategy(k, 1, "window", exits=tuple(range((k - 1) % 2, k, 2))),
    "B before W": lambda k: Strategy(k, k, "furthest", exits=(k - 1,)),
    "N = 8": lambda k: Strategy(k, 8, "window"),
    "N = 6, furthest": lambda k: Strategy(k, 6, "furthest"),
    "G = 4": lambda k: Strategy(k, 1, "window", exits=tuple(range((k - 1) % 4, k, 4))),
    "G = 4, N = 2": lambda k: Strategy(k, 2, "window", exits=tuple(range((k - 1) % 4, k, 4))),
    "N = 2, slack 1": lambda k: Strategy(k, 2, "window", hop_slack=1),
    "sum": lambda k: Strategy(k, k, "sum"),
    "borrowed": lambda k: Strategy(k, 1, "window", borrow=1),
    "1F1B": lambda k: Strategy(k, k, "furthest", exits=(k - 1,), split_backward=False),
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize(("stages", "micro_batches"), [(16, 4), (16, 16), (12, 60), (20, 31)])
def test_a_large_pipeline_is_continued_from_smaller_ones(
    name: str, stages: int, micro_batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for costs, latency in ((Costs(1, 1, 1, 0.1), 0.0), (Costs(1, 1.2, 0.7, 0.3), 0.3)):
        given = [costs] * stages, [Boundary(latency, latency / 2)] * (stages - 1)
        found = {}
        for largest in (0, 10**9):
            monkeypatch.setattr(timing, "LARGEST", largest)
            found[largest] = strategy_timing(MAKERS[name](stages), micro_batches, *given)
        continued, simulated = found[0], found[10**9]
        assert simulated.simulated and not continued.simulated
        assert continued.batch_time == pytest.approx(simulated.batch_time, rel=0.005)
        assert continued.in_flight == simulated.in_flight


@pytest.mark.parametrize("name", ["1F1B", "interleaved 1F1B", "ZB1", "ZBV", "DualPipeV", "asynchronous 1F1B"])
def test_peers_are_continued_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = [Costs()] * 16, [Boundary()] * 15
    monkeypatch.setattr(timing, "LARGEST", 10**9)
    exact = peer_timing(name, 16, 32, *given)
    monkeypatch.setattr(timing, "LARGEST", 0)
    continued = peer_timing(name, 16, 32, *given)
    assert exact.simulated and not continued.simulated
    assert continued.batch_time == pytest.approx(exact.batch_time, rel=0.005)
    assert max(exact.in_flight) <= max(continued.in_flight) <= max(exact.in_flight) + 2


def test_deepspeeds_1f1b_takes_what_ours_does_with_b_and_w_in_one() -> None:
    for stages, micro_batches in ((2, 1), (4, 3), (4, 8)):
        found = execute(make_peer("1F1B", stages, micro_batches), [Costs(1, 2, 0.5, 0)] * stages)
        ours = predict(MAKERS["1F1B"](stages), micro_batches, Costs(1, 2, 0.5, 0))
        assert found.batch_time == pytest.approx(ours.batch_time)
        assert found.batch_time == pytest.approx(3.5 * (micro_batches + stages - 1))


def test_stages_and_links_have_costs_of_their_own() -> None:
    fast, slow = Costs(1, 1, 1, 0), Costs(2, 2, 2, 0)
    boundaries = [Boundary(0.0, 0.0), Boundary(1.0, 3.0), Boundary(0.0, 0.0)]
    local = strategy_timing(MAKERS["N = 1"](4), 8, [fast, slow, fast, fast], boundaries)
    assert local.batch_time == pytest.approx(8 * 6) and local.idle == pytest.approx([0.5, 0, 0.5, 0.5])
    exact = strategy_timing(MAKERS["1F1B"](4), 1, [fast] * 4, boundaries)
    assert exact.batch_time == pytest.approx(12 + 2 * 4)  # there and back over the one slow link
    busy = strategy_timing(MAKERS["N = 1"](4), 8, [fast] * 4, [Boundary(0.0, 5.0)] * 3)
    assert busy.batch_time == pytest.approx(8 * 5)  # the link is full


def test_jitter_repeats_by_its_seed_and_costs_what_waits_for_it() -> None:
    strategy, costs = MAKERS["1F1B"](4), Costs(1, 1, 1, 0)
    schedules = validated_schedules(BatchStrategy.uniform(strategy, 4))

    def time(jitter: float, seed: int = 0) -> float:
        return measure(Simulator([schedules] * 20, costs=costs, jitter=jitter, seed=seed), 2, 4).batch_time

    assert time(0.0) == pytest.approx(3 * (4 + 3)) and time(0.2, 1) == time(0.2, 1) != time(0.2, 2)
    assert time(0.0) < time(0.2) < 1.3 * time(0.0)
    straggler = [costs, costs, Costs(1.5, 1.5, 1.5, 0), costs]
    slow = measure(Simulator([schedules] * 20, costs=straggler), 2, 4).batch_time
    # To stage 2 and its first F, stage 3 once; there four backward passes and the two F between them; back to stage 0.
    assert slow == pytest.approx(2 * 1 + 1.5 + 3 + 4 * 3 + 2 * 1.5 + 2 * 2)


def test_asynchronous_1f1b_waits_for_messages_that_take_long() -> None:
    """Each stage is one micro-batch further ahead than the next one: a round trip over a boundary in that time."""
    costs = [Costs(1, 1, 1, 0)] * 4
    at_once = peer_timing("asynchronous 1F1B", 4, 8, costs, [Boundary()] * 3)
    assert at_once.batch_time == pytest.approx(3 * 8) and at_once.in_flight == [4, 3, 2, 1]
    late = peer_timing("asynchronous 1F1B", 4, 8, costs, [Boundary(latency=1.0)] * 3)
    assert late.batch_time == pytest.approx((3 + 2 * 1 * 3 / 4) * 8)


def test_a_straggler_holds_up_who_waits_for_it_and_jitter_repeats() -> None:
    costs, links = [Costs(1, 1, 1, 0)] * 4, [Boundary()] * 3
    slow = [costs[0], costs[1], costs[2].scaled(1.5), costs[3]]
    local, plain = MAKERS["N = 1"](4), strategy_timing(MAKERS["1F1B"](4), 4, costs, links)
    assert strategy_timing(local, 4, slow, links, Unevenness(straggler=True)).batch_time == pytest.approx(4 * 4.5)
    for timing_of in (
        lambda uneven: strategy_timing(MAKERS["1F1B"](4), 4, costs, links, uneven),
        lambda uneven: peer_timing("1F1B", 4, 4, costs, links, uneven),
        lambda uneven: peer_timing("asynchronous 1F1B", 4, 4, costs, links, uneven),
    ):
        shaken, again = timing_of(Unevenness(0.2, seed=1)), timing_of(Unevenness(0.2, seed=1))
        assert shaken == again != timing_of(Unevenness(0.2, seed=2))
        assert timing_of(Unevenness()).batch_time < shaken.batch_time < 1.3 * plain.batch_time


def test_the_emulated_table_is_what_the_schedules_say() -> None:
    """All within 5%, ours and other systems'."""
    for row in json.loads(EMULATED.read_text(encoding="utf-8"))["rows"]:
        name, stages, count = row["contender"], row["stages"], row["micro_batches"]
        if name == "2BW":
            assert row["units"][0] == pytest.approx(3.0, rel=0.05), row
            continue
        if strategy_of(name, stages) is not None and name != "1F1B":
            assert row["units"][0] == pytest.approx(row["predicted"], rel=0.05), row
        else:
            peer = make_peer(name, stages, count)
            share = peer.chunks // stages
            said = execute(peer, [Costs(1 / share, 1 / share, 1 / share, 0)] * peer.chunks).batch_time / count
            assert said <= row["units"][0] <= 1.05 * said, (row, said)


def test_what_can_not_run_says_what_would() -> None:
    with pytest.raises(PlanError, match="ZBV needs at least 16 micro-batches on 8 stages, 8 are given"):
        make_peer("ZBV", 8, 8)
    with pytest.raises(PlanError, match="needs a multiple of 4 micro-batches, 6 are given: 4 or 8 would fit"):
        peer_timing("interleaved 1F1B", 4, 6, [Costs()] * 4, [Boundary()] * 3)
    with pytest.raises(PlanError, match="needs a multiple of 4 micro-batches, 3 are given: 4 would fit"):
        make_peer("ZB1", 4, 3)
    with pytest.raises(
        PlanError, match=r"up to 200,000 instructions; this one has [\d,]+: at most (\d+) micro"
    ) as seen:
        strategy_timing(MAKERS["N = 8"](64), 512, [Costs()] * 64, [Boundary()] * 63, Unevenness(jitter=0.1))
    fits = int(str(seen.value).split("at most ")[1].split()[0])
    assert 100 < fits < 512
    with pytest.raises(PlanError, match="fewer stages would fit"):
        peer_timing("1F1B", 20_000, 1, [Costs()] * 20_000, [Boundary()] * 19_999, Unevenness(jitter=0.1))
