"""Every row of the second study can be trained: a training that can't begin ends a night's queue."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.quality.__main__ import main
from benchmarks.quality.asynchronous import Asynchronous
from benchmarks.quality.gradients import sampled_gradients
from benchmarks.quality.module_tables import chance_table
from benchmarks.quality.optimizers import Optimized
from benchmarks.quality.sampling import sampling_table
from benchmarks.quality.second import LAYERS, ROWS, STEPS, large_run
from ibp_deepspeed.cli import SameOnAllRanks
from ibp_deepspeed.errors import InterlockingError
from ibp_deepspeed.models import CausalLM
from ibp_deepspeed.models.build import virtual_pipeline
from tests.models.test_causal_lm import tiny

NEGATIVES, RANK = 8, 2
"""For a vocabulary and a width that are smaller than the study's."""


@pytest.mark.parametrize("row", ROWS)
def test_every_row_trains_a_batch(row: str) -> None:
    run = large_run(row, rate=1e-3, study="test")
    head = {**(run.interlocking.get("aux_head") or {})}
    head |= {key: value for key, value in (("negatives", NEGATIVES), ("rank", RANK)) if key in head}
    block = {**run.interlocking, **({"aux_head": head} if head else {})}
    model = CausalLM(tiny("llama", num_hidden_layers=LAYERS), seed=0)
    kind: Callable[..., Optimized] = partial(Optimized, optimizer=run.optimizer)
    if run.delay is not None:
        kind = partial(Asynchronous, delay=run.delay, optimizer=run.optimizer)
    size = model.hf_config.vocab_size
    counts = torch.ones(size, dtype=torch.long)
    partition = [LAYERS // run.stages] * run.stages
    settings = {**run.settings(), "interlocking": block}
    pipeline = virtual_pipeline(model, settings, run.stages, partition, token_counts=counts, kind=kind)
    tokens = torch.randint(0, size, (8 // run.micro_batches, 12))
    losses = pipeline.train_batch(iter([(tokens, tokens)] * run.micro_batches))
    assert losses[-1].isfinite()


def test_a_loss_over_all_tokens_has_the_exact_gradient_and_fewer_tokens_are_further_from_it() -> None:
    """On a model of random weights, whose gradients without the label are large."""
    run = large_run("G = 2, K = 4, copied LM heads", rate=1e-3, study="test")
    model = CausalLM(tiny("llama", num_hidden_layers=LAYERS), seed=0)
    size = model.hf_config.vocab_size
    pipeline = virtual_pipeline(model, run.settings(), 4)
    batches = [(tokens, tokens) for tokens in torch.randint(0, size, (2, 8, 12))]
    found = sampled_gradients(pipeline.reference, batches, torch.ones(size, dtype=torch.long), (2, size // 2, size))
    few, half, everything = found["sizes"].values()
    assert everything == pytest.approx([0, 1], abs=1e-5) and found["vocabulary"] == size
    assert few[0] > half[0] > 0.01 and few[1] < half[1] < 0.9999
    assert found["batches"] > 0.1


def test_gradients_over_drawn_tokens_stand_beside_each_other_at_the_same_number() -> None:
    def record(vocabulary: int, sizes: dict[str, list[float]]) -> dict[str, Any]:
        return {"sampled": {"vocabulary": vocabulary, "batches": 1.5, "sizes": sizes}}

    few, many = record(4096, {"256": [0.5, 0.9]}), record(32768, {"256": [0.4, 0.95], "512": [0.2, 0.99]})
    assert [row[1:] for row in sampling_table([many, few])[1:]] == [
        ["50% · 0.900", "40% · 0.950"],
        ["–", "20% · 0.990"],
        ["150%", "150%"],
    ]


def test_a_text_that_is_missing_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any process starts, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["quality", "rates", "--results", "results"])
    with pytest.raises(InterlockingError, match="data/large is not a folder: make it with scripts/prepare_data"):
        main(SameOnAllRanks())
    assert not list(tmp_path.iterdir())


def test_chance_is_the_size_of_the_differences_between_twins() -> None:
    def record(row: str, seed: int, loss: float) -> dict[str, Any]:
        return {"run": {"row": row, "seed": seed, "steps": STEPS, "cosine": False}, "curve": [[STEPS, [loss]]]}

    ends = [("G = 4, K = 8", 3.03), ("G = 2, K = 4", 3.0), ("G = 2, K = 8", 3.88), ("local, K = 4", 4.0)]
    table = chance_table([record(row, 0, loss) for row, loss in ends])
    assert [row[3] for row in table[1:]] == ["+1.0% (one seed)", "-3.0% (one seed)", f"{math.sqrt(5):.1f}%"]
