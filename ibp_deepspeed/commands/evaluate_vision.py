"""Loss and accuracy of every exit of a trained image classifier on held-out images, in one process; and its export.

python scripts/evaluate_vision.py --checkpoint runs/digits/checkpoint
python scripts/evaluate_vision.py --checkpoint runs/digits/checkpoint --export runs/digits/hf
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from ibp_deepspeed import cli


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, type=Path, metavar="DIR", help="checkpoint folder written by train_vision.py")
    add("--data", metavar="DIR", help="images with the same classes (default: the data it was trained on)")
    add("--batch-size", type=int, default=64, metavar="B", help="images at once (default: %(default)s)")
    add("--max-batches", type=int, metavar="N", help="that many batches, spread over the split (default: all)")
    add("--device", default="cpu", help="torch device (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="also write the table to this file (default: none)")
    add("--export", type=Path, metavar="DIR", help="also write the model as a Hugging Face folder (default: none)")
    return parser.parse_args()


def main(phase: cli.SameOnAllRanks) -> None:
    """Evaluate, print, write."""
    args = parse_arguments()
    cli.quiet()
    from ibp_deepspeed.atomic_files import check_target
    from ibp_deepspeed.data.image_loader import HeldOutImages
    from ibp_deepspeed.models.devices import check_device
    from ibp_deepspeed.models.vision.evaluation import evaluate_images
    from ibp_deepspeed.models.vision.exits import ImageExits
    from ibp_deepspeed.models.vision.save import write

    check_device(args.device)
    if args.json is not None:
        check_target(args.json)
    exits = ImageExits(args.checkpoint, args.device)
    samples = None if args.max_batches is None else args.max_batches * args.batch_size
    evaluation = evaluate_images(
        exits, HeldOutImages(exits.data(args.data), args.batch_size, samples=samples), show=True
    )
    print(evaluation.table())
    if args.json is not None:
        args.json.write_text(json.dumps({"exits": evaluation.rows(), "sample": evaluation.sample}, indent=1) + "\n")
    if args.export is not None:
        parameters = write(exits, args.export)
        loads = "loads with AutoModelForImageClassification.from_pretrained, every key there, the same logits"
        print(f"{args.export}: {parameters:,} parameters, {loads}")


def run() -> None:
    """The command line."""
    cli.run(main)


if __name__ == "__main__":
    run()
