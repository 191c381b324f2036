"""The command line of train_vision.py."""

from __future__ import annotations

import argparse
from typing import Any

from ibp_deepspeed import cli
from ibp_deepspeed.commands.training.arguments import (
    Defaults,
    add_callbacks,
    add_evaluation_and_checkpoints,
    add_hyperparameters,
    add_trace_and_log,
)
from ibp_deepspeed.commands.training.trainer_names import with_our_names

SIZES = Defaults("32", "4", "0.1", "none")
CHANGES = ["seed", "data", "batch-size"]


def parse_arguments(description: str | None, words: list[str] | None = None) -> argparse.Namespace:
    """The command line (or ``words``); every option's help says its default."""
    parser = cli.parser(description)
    add = parser.add_argument_group("what is trained").add_argument
    add(
        "--deepspeed_config",
        required=True,
        metavar="FILE",
        help='DeepSpeed JSON with an "interlocking" block, or a preset\'s name (vision_pairwise)',
    )
    add(
        "--data",
        required=True,
        metavar="DIR",
        help="folder with CIFAR's files for Python, a Hugging Face data set (save_to_disk), or folders of classes; or "
        "digits, for scikit-learn's",
    )
    add("--model", required=True, metavar="CONFIG", help="config: JSON file, folder, hub name or ours (resnet32-cifar)")
    add("--set", nargs="*", default=[], metavar="KEY=VALUE", help="override values of the config (default: none)")
    add("--image-size", type=int, default=32, metavar="S", help="images are made S × S (default: %(default)s)")
    add(
        "--held-out-fraction",
        type=float,
        default=0.1,
        metavar="X",
        help="of the training images, where the data have no split to hold out (default: %(default)s)",
    )
    add(
        "--augment",
        nargs="*",
        choices=["crop", "flip"],
        help="shift training images by up to an eighth, mirror every second one (default: both, of digits crop alone)",
    )
    add("--stages", type=int, metavar="K", help="pipeline stages (default: the number of processes)")
    add("--one-process", action="store_true", help="all stages in this process, on one device; needs --stages")
    blocks = "blocks of each stage (default: balanced by operations, heads counted)"
    add("--partition", metavar="N,N,…", help=blocks)
    add("--seed", type=int, default=0, metavar="N", help="weights, order and crops of data (default: %(default)s)")
    add_hyperparameters(parser, SIZES)
    add_evaluation_and_checkpoints(parser, CHANGES)
    add_callbacks(parser)
    add_trace_and_log(parser)
    return parser.parse_args(with_our_names(words))


def default_hyperparameters(args: argparse.Namespace) -> dict[str, Any]:
    """Option → value where none was given: those of the paper's code, 128 images a batch."""
    return {
        "--steps": args.steps,
        "--micro-batch-size": 32,
        "--gradient-accumulation-steps": 4,
        "--learning-rate": 0.1,
        "--warmup-steps": 0,
    }
