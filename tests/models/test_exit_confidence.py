"""Agreement, calibration, thresholds and early exit: against hand-made cases, and full logits of real heads."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from ibp_deepspeed.models.exits.confidence import calibration_error, confidences, threshold
from ibp_deepspeed.models.exits.early_exit import cheapest, curve, early_exit, fixed_exits
from ibp_deepspeed.models.exits.exits import Exits
from ibp_deepspeed.models.exits.predictions import Predictions, WatchedExits, predict
from ibp_deepspeed.models.exits.text import early_exit_table
from ibp_deepspeed.objectives import cross_entropy
from ibp_deepspeed.objectives.cross_entropy import LazyLogits
from tests.models.test_causal_lm import VOCAB, shifted, tokens
from tests.models.test_export import checkpoint


def by_hand(head_layers: tuple[int, ...] = (0, 0, 0)) -> Predictions:
    """Three exits behind 1, 2 and 4 of four layers, four positions."""
    return Predictions(
        exits=[1, 2, 4],
        trunk_layers=[1, 2, 4],
        head_layers=list(head_layers),
        tokens=torch.tensor([[7, 7, 3, 4], [7, 8, 3, 4], [7, 8, 3, 5]]),
        confidences=torch.tensor([[0.9, 0.4, 0.8, 0.2], [0.9, 0.7, 0.9, 0.3], [0.95, 0.9, 0.9, 0.6]]),
        losses=torch.tensor([[0.1, 3.0, 0.2, 2.0], [0.1, 0.5, 0.1, 1.5], [0.05, 0.1, 0.1, 1.0]]),
        labels=torch.tensor([7, 8, 3, 6]),
    )


def test_agreement_and_thresholds_of_a_case_made_by_hand() -> None:
    found = confidences(by_hand(), levels=(0.6, 0.99))
    assert {exit_: one.agreement for exit_, one in found.items()} == {1: 0.5, 2: 0.75, 4: 1.0}
    first = found[1].thresholds
    # confidences 0.9 and 0.8 agree, 0.4 and 0.2 do not: 2 of 3 are right from 0.4 on, and all from 0.8 on
    assert [one.share for one in first] == [0.75, 0.5]
    assert [one.confidence for one in first] == pytest.approx([0.4, 0.8])
    assert found[4].thresholds[1].share == 1.0
    # 0.9 right, 0.4 wrong, 0.8 right, 0.2 wrong, each in a bin of its own
    assert found[1].calibration_error == pytest.approx((0.1 + 0.4 + 0.2 + 0.2) / 4)


def test_calibration_is_of_means_in_bins_and_a_probability_of_one_has_a_bin() -> None:
    sure = torch.tensor([0.61, 0.63, 0.65, 1.0])
    assert calibration_error(sure, torch.tensor([True, True, False, True])) == pytest.approx(abs(2 - 1.89) / 4)


def test_positions_of_one_confidence_stay_together_and_a_level_may_be_out_of_reach() -> None:
    sure, agrees = torch.tensor([0.5, 0.9, 0.5]), torch.tensor([False, True, True])
    assert threshold(sure, agrees, 0.99).share == pytest.approx(1 / 3)
    assert threshold(sure, agrees, 0.6).share == 1.0
    none = threshold(sure, torch.tensor([True, False, True]), 0.99)
    assert none.confidence is None and none.share == 0.0


def test_early_exit_of_a_case_made_by_hand() -> None:
    """At 0.7 positions leave at exits 1, 2, 1 and at the end."""
    found = early_exit(by_hand(), 0.7)
    assert found.leaving == (0.5, 0.25, 0.25)
    assert found.saved == pytest.approx(1 - (1 + 2 + 1 + 4) / 16) and found.agreement == 1.0
    assert found.perplexity == pytest.approx(math.exp((0.1 + 0.5 + 0.2 + 1.0) / 4))
    assert early_exit(by_hand(), 0.1).agreement == 0.5
    never = early_exit(by_hand(), 1.1)
    assert never.saved == 0 and never.agreement == 1 and never.perplexity == pytest.approx(math.exp(1.25 / 4))


def test_blocks_of_every_head_that_is_asked_count() -> None:
    found = early_exit(by_hand((1, 1, 0)), 0.7)
    assert found.saved == pytest.approx(1 - (2 + 4 + 2 + 6) / 16)
    assert [one.saved for one in fixed_exits(by_hand((1, 1, 0)))] == pytest.approx([0.5, 0.25, 0.0])


def test_the_curve_goes_from_all_to_few_and_the_cheapest_point_keeps_its_level() -> None:
    points = curve(by_hand())
    assert points[0] == early_exit(by_hand(), min(by_hand().confidences[0].tolist()))
    saved = [point.saved for point in points]
    assert saved == sorted(saved, reverse=True) and len(set(saved)) > 2
    best = cheapest(points, 0.99)
    assert best is not None and best.agreement == 1.0 and best.saved == pytest.approx(0.5)
    assert cheapest(points[:1], 0.99) is None
    assert "no threshold reaches it" in early_exit_table(points[:1], 1.3)


@pytest.mark.parametrize("head", [{}, {"rank": 8}, {"readout": "shared", "blocks": 1}])
def test_predictions_in_chunks_are_those_of_the_full_logits(
    head: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every kind of head; positions without a label do not count."""
    checkpoint(tmp_path / "run", "llama", **head)
    exits, ids = Exits(tmp_path / "run"), tokens()
    labels = shifted(ids)
    labels[0, :3] = -100
    counted = labels != -100
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", 5 * VOCAB)
    watched = WatchedExits(exits)
    losses = watched.eval_batch(iter([(ids, labels, torch.arange(2))] * 2), 2)
    found = watched.predictions()
    assert found.exits == [1, 2] and found.head_layers == [head.get("blocks", 0), 0]
    assert found.trunk_layers == [2, 3]
    for row, exit_ in enumerate(found.exits):
        probabilities = exits.lazy_logits(ids, exit_).materialize()[counted].softmax(-1)
        best, likeliest = probabilities.max(-1)
        torch.testing.assert_close(found.confidences[row], best.repeat(2))
        assert found.tokens[row].tolist() == likeliest.repeat(2).tolist()
        assert found.losses[row].mean().item() == pytest.approx(losses[row].item(), rel=1e-5)
    assert found.labels.tolist() == labels[counted].repeat(2).tolist()


def test_a_chunk_is_never_larger_than_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", 30)
    sizes: list[int] = []

    def readout(rows: torch.Tensor) -> torch.Tensor:
        sizes.append(len(rows))
        return rows @ torch.ones(4, 10)

    predict(LazyLogits(torch.randn(7, 4), readout, ()), torch.zeros(7, dtype=torch.int64))
    assert [size for size in sizes if size] == [3, 3, 1]
