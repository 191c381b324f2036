"""A plan for Muon: one moment of each matrix inside the model, and the losses that were measured with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ibp_deepspeed.commands.planning.arguments import parse_arguments
from ibp_deepspeed.commands.planning.files import settings
from ibp_deepspeed.commands.planning.job import make_job
from ibp_deepspeed.commands.planning.searching import space
from ibp_deepspeed.config.interlocking import AuxHeadConfig
from ibp_deepspeed.models import CausalLM
from ibp_deepspeed.models.build import virtual_pipeline
from ibp_deepspeed.models.workload import with_muon, workload
from ibp_deepspeed.optimizer.configured import check_muon, is_muon
from ibp_deepspeed.planner.learned import learned
from ibp_deepspeed.planner.memory import stage_memory
from ibp_deepspeed.planner.plan import Candidate, evaluate
from tests.models.test_causal_lm import tiny
from tests.planner.test_plan import run

PLAN = ("--model", "llama-tiny", "--sequence-length", "128", "--stages", "8", "--micro-batches", "2")


def moments(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of what an optimizer holds of its parameters, element for element."""
    return sum(
        value.numel() * value.element_size()
        for parameter, state in optimizer.state.items()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.shape == parameter.shape
    )


@pytest.mark.parametrize("kind", ["AdamW", "Muon"])
def test_the_state_that_is_counted_is_the_optimizers(kind: str) -> None:
    head: dict[str, Any] = {"readout": "private", "blocks": 1}
    model = CausalLM(tiny("llama", num_hidden_layers=4), seed=0)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "optimizer": {"type": kind, "params": {"lr": 1e-3}},
        "interlocking": {"strategy": "local", "aux_head": head},
    }
    pipeline = virtual_pipeline(model, config, 2, [2, 2])
    tokens = torch.randint(0, model.vocab_size, (2, 8))
    pipeline.train_batch(iter([(tokens, tokens)]))
    options = AuxHeadConfig(**head)
    work = workload(model, options, samples=2, sequence_length=8, weight_bytes=4)
    work = with_muon(work, model, options) if kind == "Muon" else work
    for stage, optimizer in enumerate(pipeline.optimizers):
        counted = stage_memory(work, [0, 3, 6], stage, 1, head=stage == 0).optimizer
        assert counted == moments(optimizer) > 0


def test_losses_are_those_with_the_optimizer() -> None:
    """Asynchronous backpropagation's too; what was not measured with Muon is not taken from AdamW."""
    for width, exits, mode in ((1, 2, "window"), (2, 4, "window"), (0, 1, "late")):
        plain, muon = (learned(width, exits, mode, 0, optimizer=name) for name in ("AdamW", "Muon"))
        assert plain is not None and muon is not None and plain.mean != muon.mean
        assert muon.size.endswith(", Muon") and "Muon" not in plain.size
    assert learned(1, 4, "window", 1, optimizer="Muon") is None


def test_every_row_of_a_plan_follows_the_optimizer() -> None:
    jobs = {name: make_job(parse_arguments("", [*PLAN, "--optimizer", name])) for name in ("AdamW", "Muon")}
    for way in (Candidate("1F1B"), Candidate("G = 4", {"strategy": "local", "exits": 4})):
        rows = {name: evaluate(job, way) for name, job in jobs.items()}
        assert rows["Muon"].batch_time == rows["AdamW"].batch_time
        assert rows["Muon"].most_memory < rows["AdamW"].most_memory
    assert rows["Muon"].learned is not None and rows["Muon"].learned.optimizer == "Muon"
    searched = space(
        parse_arguments("", [*PLAN[:4], "--search", "--devices-total", "4", "--batch-samples", "8", "--optimizer=Muon"])
    )
    assert all(kind.workload.optimizer == "Muon" and kind.workload.layers[1].matrices for kind in searched.kinds)


def test_what_is_written_trains_with_it() -> None:
    args = parse_arguments("", [*PLAN, "--optimizer", "Muon", "--zero", "1"])
    written = settings(make_job(args), {"strategy": "local"}, 1, args)
    assert is_muon(written) and written["optimizer"]["params"]["lr"] == "auto"
    check_muon(written)
    plain = settings(make_job(parse_arguments("", [*PLAN])), {"strategy": "local"}, 1, parse_arguments("", [*PLAN]))
    assert plain["optimizer"] == {**written["optimizer"], "type": "AdamW"}


def test_fp32_with_zero_is_refused(tmp_path: Path) -> None:
    for more in ((), ("--search", "--devices-total", "4", "--batch-samples", "8")):
        words = PLAN if not more else PLAN[:4]
        shown = run(
            *words, *more, "--optimizer", "Muon", "--fp32", "--zero", "1", "--json", str(tmp_path / "plan.json")
        )
        assert shown.returncode == 1 and shown.stderr.count("\n") == 1 and not list(tmp_path.iterdir())
        assert "--optimizer Muon needs whole matrices, --fp32 with --zero 1 cuts them: leave one out" in shown.stderr


def test_a_plan_says_the_losses_of_muon(tmp_path: Path) -> None:
    target = tmp_path / "plan.json"
    shown = run(*PLAN, "--optimizer", "Muon", "--fp32", "--json", str(target))
    assert shown.returncode == 0 and "Muon" in shown.stdout, shown.stderr
    known = [row["learned"]["optimizer"] for row in json.loads(target.read_text())["rows"] if row["learned"]]
    assert known and set(known) == {"Muon"}
