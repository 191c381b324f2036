"""K processes against one: the same trainings by the engine and by :class:`VirtualPipeline`, loss by loss.

Relative tolerances, over all batches and exits, of losses in 20 batches of AdamW:

* fp32: 1e-5. Both do the same products and sums, and on CPU differ by 1e-7; GPUs may sum in another order.
* bf16: 5e-3, a rounding of bf16. Gradients are summed in fp32 by both, and on CPU they differ by 7e-5.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.speed import harness
from benchmarks.speed.harness import Row

TOLERANCE = {"fp32": 1e-5, "bf16": 5e-3}
STRATEGIES = ("local", "pairwise", "global")
MICRO_BATCHES = 4
FULL = {"width": 512, "vocabulary": 8192, "tokens": 256, "batches": 20}
SMALL = {"width": 64, "vocabulary": 256, "tokens": 32, "batches": 6}
PRESETS = Path(__file__).parents[2] / "ds_configs"
COLUMNS: dict[str, Callable[[Row], str]] = {
    "K": lambda row: str(row["stages"]),
    "": lambda row: row["contender"],
    "dtype": lambda row: row["dtype"],
    "losses compared": lambda row: str(row["compared"]),
    "last exit, first and last batch": lambda row: "{:.3f} → {:.3f}".format(*row["last_exit"]),
    "largest relative difference": lambda row: f"{row['difference']:.1e}",
    "tolerance": lambda row: f"{row['tolerance']:.0e}",
}

Losses = dict[int, list[float]]
"""Number of the loss → its values, batch by batch, the held-out one in the middle last."""


def compare(stages: int, small: bool) -> list[Row]:
    """Train with K processes, then with one; a row for each strategy and precision."""
    sizes = SMALL if small else FULL
    cases = [
        {"stages": stages, "strategy": strategy, "dtype": dtype, **sizes}
        for dtype in TOLERANCE
        for strategy in STRATEGIES
    ]
    by_rank = harness.spawn(stages, train_in_processes, {"cases": cases})
    rows = []
    for number, case in enumerate(cases):
        ours = {loss: values for rank in by_rank for loss, values in rank[number].items()}
        rows.append(_row(case, ours, train_in_one(case)))
    return rows


def train_in_processes(arguments: dict[str, Any]) -> list[Losses]:
    """In each of K processes: the losses of this stage, case by case."""
    from ibp_deepspeed import init_distributed

    init_distributed()
    found = []
    for case in arguments["cases"]:
        if dist.get_rank() == 0:
            print(f"{case['strategy']} in {case['dtype']}", flush=True)  # the last words of a job that hangs
        found.append(_train_stage(case))
        dist.barrier()
    return found


def _train_stage(case: dict[str, Any]) -> Losses:
    from ibp_deepspeed import initialize
    from ibp_deepspeed.config.deepspeed import resolve_interlocking
    from ibp_deepspeed.models.build import pipeline_module

    config = settings(case)
    module = pipeline_module(_model(case), resolve_interlocking(config), case["stages"])
    engine = initialize(model=module, config=config)[0]
    trained, held_out = _train(case, engine)
    engine.close()
    own = module.losses[-1:]  # the loss that train_batch returns
    return {loss: [*(step.item() for step in trained), held_out[loss].item()] for loss in own}


def train_in_one(case: dict[str, Any]) -> Losses:
    """All losses, by one process on one device."""
    from ibp_deepspeed.models.build import virtual_pipeline

    device = "cuda" if torch.cuda.is_available() else "cpu"
    trained, held_out = _train(case, virtual_pipeline(_model(case), settings(case), case["stages"], device=device))
    return {k: [*(step[k].item() for step in trained), held_out[k].item()] for k in range(case["stages"])}


def _train(case: dict[str, Any], pipeline: Any) -> tuple[list[Tensor], Tensor]:
    """What ``train_batch`` returned, and what an evaluation in the middle did."""
    rows, trained = _micro_batches(case), []
    for step in range(case["batches"]):
        trained.append(pipeline.train_batch(rows))
        if step == case["batches"] // 2:
            held_out: Tensor = pipeline.eval_batch(_micro_batches(case), MICRO_BATCHES)
    return trained, held_out


def settings(case: dict[str, Any]) -> dict[str, Any]:
    """The preset of the strategy and precision, with batch sizes and without its log."""
    from ibp_deepspeed.config.auto import fill_auto

    kind = "gpu" if case["dtype"] == "bf16" else "cpu"
    preset = json.loads((PRESETS / f"{case['strategy']}_{kind}.json").read_text(encoding="utf-8"))
    preset.pop("tensorboard", None)
    values = {"--micro-batch-size": 2, "--gradient-accumulation-steps": MICRO_BATCHES, "--learning-rate": 1e-3}
    values |= {"--warmup-steps": 2, "--steps": case["batches"]}
    return fill_auto(preset, values, values, 1)


def _model(case: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    from ibp_deepspeed.models import CausalLM

    heads = case["width"] // 32
    config = AutoConfig.for_model(
        "llama",
        hidden_size=case["width"],
        intermediate_size=2 * case["width"],
        num_hidden_layers=case["stages"],
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=case["vocabulary"],
    )
    return CausalLM(config)


def _micro_batches(case: dict[str, Any]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Rows that count upwards from a random token: something that can be learnt. (inputs, labels, sample ids)"""
    generator, number = torch.Generator().manual_seed(0), 0
    while True:
        first = torch.randint(case["vocabulary"], (2, 1), generator=generator)
        tokens = (first + torch.arange(case["tokens"] + 1)) % case["vocabulary"]
        yield tokens[:, :-1], tokens[:, 1:].contiguous(), torch.arange(number, number + 2)
        number += 2


def _row(case: dict[str, Any], ours: Losses, expected: Losses) -> Row:
    tolerance = TOLERANCE[case["dtype"]]
    both = [(a, b) for loss, values in ours.items() for a, b in zip(values, expected[loss], strict=True)]
    pairs = [(a, b) for a, b in both if not (math.isnan(a) and math.isnan(b))]  # an exit without a head
    difference = max(abs(a - b) / abs(b) for a, b in pairs)
    last = ours[case["stages"] - 1]
    row = {
        "contender": case["strategy"],
        **{key: case[key] for key in ("stages", "dtype")},
        "compared": len(pairs),
        "last_exit": [last[0], last[-2]],
        "difference": difference,
        "tolerance": tolerance,
    }
    if not difference <= tolerance:  # one that is NaN is wrong too
        what = f"K = {case['stages']}, {case['strategy']}, {case['dtype']}"
        row["failed"] = f"{what}: losses differ by {difference:.1e}, more than {tolerance:.0e}"
    return row
