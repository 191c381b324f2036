"""Accuracy of local, pairwise, 3-wise and end-to-end training of a residual network, over seeds, in one process.

    python -m benchmarks.vision --output runs/vision-study
    python -m benchmarks.vision --output runs/vision-study --table

Started again it goes on with the runs that are missing: each leaves a line in OUTPUT/results.jsonl. The table has the
accuracy of the last exit, and what the schedule takes a batch, from the counted operations of this cut.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import logger

from ibp_deepspeed import InterlockingConfig, cli
from ibp_deepspeed.config.auto import fill_auto
from ibp_deepspeed.config.deepspeed import load_ds_config
from ibp_deepspeed.data.image_loader import HeldOutImages, ImageLoader
from ibp_deepspeed.data.image_sources import open_images
from ibp_deepspeed.models.build import virtual_pipeline
from ibp_deepspeed.models.vision.config import channels_of, load_image_config
from ibp_deepspeed.models.vision.costs import stage_costs
from ibp_deepspeed.models.vision.evaluation import evaluate_images
from ibp_deepspeed.models.vision.image_classifier import ImageClassifier
from ibp_deepspeed.schedule.predict import predict_timeline
from ibp_deepspeed.strategy.timeline import Timeline

ARMS: dict[str, dict[str, Any]] = {
    "local": {"strategy": "local"},
    "pairwise": {"strategy": "pairwise", "mode": "furthest"},
    "pairwise, window": {"strategy": "pairwise", "mode": "window"},
    "3-wise": {"strategy": "nwise", "width": 3, "mode": "furthest"},
    "3-wise, window": {"strategy": "nwise", "width": 3, "mode": "window"},
    "end-to-end": {"strategy": "global", "aux_head": None},
}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("--output", required=True, type=Path, metavar="DIR", help="folder of results.jsonl")
    add("--data", default="digits", metavar="DIR", help="as of train_vision.py (default: %(default)s)")
    add("--model", default="resnet-digits", metavar="CONFIG", help="as of train_vision.py (default: %(default)s)")
    add("--image-size", type=int, default=8, metavar="S", help="images are made S × S (default: %(default)s)")
    add("--stages", type=int, default=4, metavar="K", help="pipeline stages (default: %(default)s)")
    add("--steps", type=int, default=400, metavar="N", help="batches of a run (default: %(default)s)")
    add("--batch-size", type=int, default=128, metavar="B", help="images, one micro-batch (default: %(default)s)")
    add("--seeds", type=int, default=3, metavar="N", help="of each arm (default: %(default)s)")
    add("--arms", nargs="*", choices=list(ARMS), default=list(ARMS), help="which are run (default: all)")
    add("--device", default="cpu", help="torch device (default: %(default)s)")
    add("--table", action="store_true", help="only print the table of what there is")
    return parser.parse_args()


def setting(args: argparse.Namespace) -> dict[str, Any]:
    """What a line has beside its arm and seed, so that results of another study are not taken for this one's."""
    names = ("data", "model", "image_size", "stages", "steps", "batch_size")
    return {name: getattr(args, name) for name in names}


def build(args: argparse.Namespace, seed: int) -> tuple[ImageClassifier, Any]:
    """The model and the images; a fifth of the images is held out where there is no such split."""
    images = open_images(args.data, args.image_size, channels_of(args.model, {}), held_out_fraction=0.2)
    return ImageClassifier(load_image_config(args.model, images.classes), args.image_size, seed=seed), images


def ds_config(args: argparse.Namespace, arm: str) -> dict[str, Any]:
    """The preset's optimizer and schedule with the arm's strategy."""
    values = {
        "--steps": args.steps,
        "--micro-batch-size": args.batch_size,
        "--gradient-accumulation-steps": 1,
        "--learning-rate": 0.1,
    }
    filled = fill_auto(load_ds_config("vision_global"), {}, values, replicas=1)
    return {**filled, "tensorboard": {"enabled": False}, "interlocking": {**ARMS[arm], "decay": "all"}}


def train(args: argparse.Namespace, arm: str, seed: int) -> dict[str, Any]:
    """One run; returns its line."""
    model, images = build(args, seed)
    pipeline = virtual_pipeline(model, ds_config(args, arm), args.stages, device=args.device)
    loader = ImageLoader(images, args.batch_size, seed=seed, flip=images.flips)
    began = time.perf_counter()
    for _ in range(args.steps):
        pipeline.train_batch(loader)
    seconds = time.perf_counter() - began
    found = evaluate_images(pipeline, HeldOutImages(images, args.batch_size))
    return {**setting(args), "arm": arm, "seed": seed, "seconds": round(seconds, 1), **found.row()}


def batch_times(args: argparse.Namespace, micro_batches: int) -> dict[str, float]:
    """Arm → time of a batch by the schedule and the counted operations of its cut; the mean stage's forward pass takes
    1 a micro-batch."""
    model, _ = build(args, 0)
    found = {}
    for arm in args.arms:
        config = InterlockingConfig.parse(ARMS[arm])
        exits = config.exits_for(args.stages)
        bounds = model.partition(args.stages, aux_heads=config.aux_head, exits=exits)
        timeline = Timeline(config, args.stages, micro_batches, aux_heads=config.aux_head is not None)
        found[arm] = predict_timeline(timeline, stage_costs(model, config, bounds)).batch_time
    return found


def table(args: argparse.Namespace, rows: list[dict[str, Any]]) -> str:
    """Of the arms that have results."""
    one, four = (batch_times(args, count) for count in (1, 4))
    lines = [
        "| arm | seeds | accuracy of the last exit, mean ± deviation | of all exits | time a batch, M = 1 | M = 4 |",
        "|---|---|---|---|---|---|",
    ]
    for arm in args.arms:
        accuracies = [row["accuracy"] for row in rows if row["arm"] == arm]
        if not accuracies:
            continue
        last = [100 * each[-1] for each in accuracies]
        spread = statistics.stdev(last) if len(last) > 1 else 0.0
        exits = " ".join(
            "–" if None in column else f"{100 * statistics.mean(column):.1f}"
            for column in zip(*accuracies, strict=True)
        )
        lines.append(
            f"| {arm} | {len(last)} | {statistics.mean(last):.2f} ± {spread:.2f}% | {exits} | {one[arm]:.2f} | "
            f"{four[arm]:.2f} |"
        )
    return "\n".join(lines)


def read(path: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The lines of this study."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    rows = [json.loads(line) for line in text.splitlines()]
    return [row for row in rows if setting(args).items() <= row.items()]


def main(phase: cli.SameOnAllRanks) -> None:
    """Run what is missing, print the table."""
    args = parse_arguments()
    logger.setLevel("ERROR")
    path = args.output / "results.jsonl"
    rows = read(path, args)
    for seed in range(0 if args.table else args.seeds):
        for arm in args.arms:
            if any((row["arm"], row["seed"]) == (arm, seed) for row in rows):
                continue
            torch.manual_seed(seed)
            rows.append(train(args, arm, seed))
            args.output.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(f"{arm}, seed {seed}: {rows[-1]['accuracy']}, {rows[-1]['seconds']:.0f} s", flush=True)
    print(table(args, rows))


if __name__ == "__main__":
    cli.run(main)
