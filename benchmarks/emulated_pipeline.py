"""Time the real engine, and DeepSpeed's own 1F1B, on stages that sleep instead of computing.

    python benchmarks/emulated_pipeline.py --stages 4 --micro-batches 1 4 --widths 1 2 3

A unit of sleep is a stage's forward pass, its product to the input, or its product to the weights; a head costs 0.1
units. Two cores are then enough for any number of stages: what is measured is the schedule, the channels and the
engine's own overhead. Printed: time per micro-batch in units, the limit (the busiest stage's work alone), what the
schedule's simulation predicts, and DeepSpeed's time divided by ours.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from benchmarks.speed.harness import spawn
from benchmarks.speed.sleeping import HEAD_UNITS, SleepingHead, SleepingLayer, loss_fn


def make_engine(stages: int, micro_batches: int, width: int | None, options: dict[str, Any], unit: float) -> Any:
    """Our engine, or DeepSpeed's for ``width`` None; the model's own head is counted with the last stage."""
    import deepspeed
    from deepspeed.pipe import LayerSpec, PipelineModule

    from ibp_deepspeed import InterlockedPipelineModule, initialize

    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_batches,
        "optimizer": {"type": "SGD", "params": {"lr": 0.0}},
        "gradient_clipping": 0.0,
        "steps_per_print": None,
    }
    layers = [LayerSpec(SleepingLayer, unit) for _ in range(stages)]
    if width is None:
        module = PipelineModule(layers, num_stages=stages, loss_fn=loss_fn, partition_method="uniform")
        return deepspeed.initialize(model=module, config=config)[0]
    config["interlocking"] = {"strategy": "nwise", "width": width, **options}
    module = InterlockedPipelineModule(
        layers,
        num_stages=stages,
        loss_fn=loss_fn,
        aux_head=lambda stage: SleepingHead(HEAD_UNITS * unit),
        partition_method="uniform",
    )
    return initialize(model=module, config=config)[0]


def time_batches(engine: Any, batches: int, warm_up: int) -> float:
    """Seconds a batch on this rank, after ``warm_up`` batches."""
    import torch.distributed as dist

    def endless() -> Any:
        row = (torch.zeros(1, 8), torch.zeros(1, 8))
        while True:
            yield row

    data = endless()
    dist.barrier()
    for _ in range(warm_up):
        engine.train_batch(data)
    start = time.perf_counter()
    for _ in range(batches):
        engine.train_batch(data)
    return (time.perf_counter() - start) / batches


def worker(arguments: dict[str, Any]) -> list[float]:
    """Run all cases, interleaved ``repeats`` times; returns this rank's median seconds per micro-batch."""
    import deepspeed
    import torch.distributed as dist

    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    deepspeed.utils.logger.setLevel("ERROR")
    unit, options, cases = arguments["unit"], arguments["options"], arguments["cases"]
    engines = [make_engine(arguments["stages"], m, width, options, unit) for m, width in cases]
    seconds: list[list[float]] = [[] for _ in cases]
    for _ in range(arguments["repeats"]):
        for index, ((micro_batches, _), engine) in enumerate(zip(cases, engines, strict=True)):
            mine = time_batches(engine, max(2, arguments["batches"] // micro_batches), warm_up=2)
            slowest = torch.tensor(mine)
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
            seconds[index].append(slowest.item() / micro_batches)
    return [statistics.median(row) for row in seconds]


def table(
    stages: int, cases: list[tuple[int, int | None]], units: list[float], options: dict[str, Any]
) -> list[dict[str, Any]]:
    """Rows with the limit, the prediction and the ratio to DeepSpeed's 1F1B."""
    from ibp_deepspeed.simulate import simulate
    from ibp_deepspeed.strategy import Strategy

    peer = {m: units[i] for i, (m, width) in enumerate(cases) if width is None}
    rows = []
    for (micro_batches, width), measured in zip(cases, units, strict=True):
        if width is None:
            strategy = Strategy(stages, stages, aux_heads=False)
        else:
            strategy = Strategy(stages, width, options.get("mode", "furthest"), options.get("hop_slack", 0))
        prediction = simulate(strategy, micro_batches)
        rows.append(
            {
                "stages": stages,
                "micro_batches": micro_batches,
                "engine": "DeepSpeed 1F1B" if width is None else f"interlocked N={width}",
                "units": round(measured, 3),
                "limit": round(prediction.limit, 3),
                "predicted": round(prediction.micro_batch_time, 3),
                "speedup": round(peer[micro_batches] / measured, 3),
            }
        )
    return rows


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=4, help="K, processes (default 4)")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[1, 4], help="values of M (default 1 4)")
    parser.add_argument("--widths", type=int, nargs="+", default=[1, 2, 3], help="values of N (default 1 2 3)")
    parser.add_argument("--mode", choices=["furthest", "window"], default="furthest", help="default furthest")
    parser.add_argument("--hop-slack", type=int, default=0, help="default 0")
    parser.add_argument("--unit", type=float, default=0.1, help="seconds of a unit (default 0.1)")
    parser.add_argument("--batches", type=int, default=16, help="micro-batches measured a repeat (default 16)")
    parser.add_argument("--repeats", type=int, default=3, help="interleaved repeats, the median counts (default 3)")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args()
    cases: list[tuple[int, int | None]] = [(m, w) for m in args.micro_batches for w in [*args.widths, None]]
    options = {"mode": args.mode, "hop_slack": args.hop_slack}
    seconds = spawn(
        args.stages,
        worker,
        {
            "stages": args.stages,
            "cases": cases,
            "options": options,
            "unit": args.unit,
            "batches": args.batches,
            "repeats": args.repeats,
        },
    )[0]
    rows = table(args.stages, cases, [s / args.unit for s in seconds], options)
    print(f"\n{'K':>2} {'M':>2} {'engine':<16} {'units/micro-batch':>17} {'limit':>6} {'predicted':>9} {'speed-up':>8}")
    for row in rows:
        print(
            f"{row['stages']:>2} {row['micro_batches']:>2} {row['engine']:<16} {row['units']:>17.2f} "
            f"{row['limit']:>6.2f} {row['predicted']:>9.2f} {row['speedup']:>7.2f}x"
        )
    if args.json:
        args.json.write_text(json.dumps({"unit_seconds": args.unit, "mode": args.mode, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
