"""A bf16 run's own evaluation, by the engine, and that of its checkpoint: the same losses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ibp_deepspeed.data import HeldOut, open_tokens
from ibp_deepspeed.models.exits.evaluation import evaluate
from ibp_deepspeed.models.exits.exits import Exits
from tests.commands import ranks
from tests.scripts.settings import SMALL


def test_a_checkpoint_is_evaluated_as_the_engine_does(config: Path, data: Path, tmp_path: Path) -> None:
    """Two stages in processes; held as a whole and layer by layer. In fp32 the losses are others."""
    settings = json.loads(config.read_text()) | {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}
    (tmp_path / "bf16.json").write_text(json.dumps(settings))
    words = ("--deepspeed_config", tmp_path / "bf16.json", "--data", data, "--output", tmp_path / "run")
    done = ranks(2, "train_lm.py", *words, "--stages", 2, "--steps", 2, *SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    want = next(row for row in reversed(rows) if "held_out" in row)
    found = []
    for dtype, gib in ((None, None), (None, 1e-3), (torch.float32, None)):
        exits = Exits(tmp_path / "run" / "checkpoint", dtype=dtype, memory_gib=gib)
        assert exits.is_streamed == (gib is not None)
        evaluation = evaluate(exits, HeldOut(open_tokens(data, "heldout"), 32, 2))
        assert evaluation.tokens == want["tokens"]
        found.append(evaluation.losses)
    assert found[0] == pytest.approx(want["held_out"], rel=1e-6)
    assert found[1] == pytest.approx(want["held_out"], rel=1e-6)
    assert found[2] != pytest.approx(want["held_out"], rel=1e-6)
