"""The command line of train_lm.py."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ibp_deepspeed import cli
from ibp_deepspeed.commands.training.monitors import MONITORS
from ibp_deepspeed.commands.training.trainer_names import with_our_names

EVAL_MICRO_BATCHES = 16
SAVE_SECONDS = 900.0
"""Between two checkpoints at most, where --save-interval is not given."""
_SHORT = 50
_BY_PROFILE = "profile:"
_CHANGES = ("seed", "data", "tokenizer", "sequence-length", "document-masks", "batch-size")


class Defaults(NamedTuple):
    """What hyperparameters are where none is given, as the help says it."""

    samples: str
    micro_batches: str
    rate: str
    warmup: str


_OF_TEXT = Defaults("8", "4", "0.25 / hidden size, a tenth of that with --init-from but --lora", "a 20th, at most 500")


class Source(NamedTuple):
    """Prepared data, and how much of the training they are (a share of all weights); None: not said."""

    folder: Path
    weight: float | None


def _source(text: str) -> Source:
    """``DIR=WEIGHT``, or DIR alone, which may have a = in its name."""
    folder, _, weight = text.rpartition("=")
    try:
        return Source(Path(folder), float(weight)) if folder else Source(Path(text), None)
    except ValueError:
        return Source(Path(text), None)


def parse_arguments(description: str | None, words: list[str] | None = None) -> argparse.Namespace:
    """The command line (or ``words``); every option's help says its default.

    ``data`` is the first folder of --data, which has the tokenizer, and ``mixture`` all of them with their weights.
    """
    parser = cli.parser(description)
    _add_what(parser)
    add_hyperparameters(parser, _OF_TEXT)
    add_evaluation_and_checkpoints(parser, _CHANGES)
    add_callbacks(parser)
    add_trace_and_log(parser)
    args = parser.parse_args(with_our_names(words))
    args.mixture = args.data
    args.data = args.mixture[0].folder
    return args


def add_trace_and_log(parser: argparse.ArgumentParser) -> None:
    """What is recorded and shown."""
    parser.add_argument(
        "--trace",
        nargs="?",
        const="",
        metavar="FIRST:LAST",
        help="record what every stage does in these batches, and write OUTPUT/trace.json for Perfetto and "
        "scripts/trace_report.py (without a value: three batches after the first ten; default: none)",
    )
    parser.add_argument("--verbose", action="store_true", help="show the log of DeepSpeed and Hugging Face")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)


def _add_what(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("what is trained").add_argument
    add(
        "--deepspeed_config",
        required=True,
        metavar="FILE",
        help='DeepSpeed JSON with an "interlocking" block, or a preset\'s name (pairwise_cpu)',
    )
    add(
        "--data",
        required=True,
        nargs="+",
        type=_source,
        metavar="DIR[=WEIGHT]",
        help="folder written by scripts/prepare_data.py; several with weights are mixed, sample by sample: a=0.7 b=0.3",
    )
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument("--model", metavar="CONFIG", help="config: JSON file, folder, hub name or ours (llama-tiny)")
    start.add_argument(
        "--init-from",
        metavar="DIR",
        help="begin with the weights of a Hugging Face folder or hub name, a "
        "checkpoint or an import (convert_hf.py); each process reads those of its own stage",
    )
    add(
        "--init-heads",
        choices=["readout", "fresh"],
        default="readout",
        help="with --init-from, heads begin as the model's "
        "own final norm and LM head, or at random (default: %(default)s)",
    )
    add(
        "--set",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="override values of the model's config (default: none)",
    )
    add(
        "--freeze",
        metavar="WHAT",
        help="layers that are not trained: N, the embedding and the first N decoder layers, or names such as "
        "embedding,layers.0-5,head (default: none)",
    )
    add(
        "--lora",
        nargs="?",
        const="",
        metavar="KEY=VALUE,…",
        help="train low-rank adapters (peft) of the weights of --init-from, which stay as they are: rank=8,alpha=16,"
        "dropout=0,targets=q_proj+v_proj, of which any can be left out: rank 8, alpha twice the rank, no dropout, the "
        "targets that peft knows for the model type; or targets=all-linear (default: train the weights)",
    )
    add("--stages", type=int, metavar="K", help="pipeline stages (default: the number of processes)")
    add("--one-process", action="store_true", help="all stages in this process, on one device; needs --stages")
    add(
        "--partition",
        metavar="N,N,…",
        help="decoder layers of each stage, or profile:FILE: balanced by what profile_stage.py measured "
        "(default: balanced by operations, heads counted)",
    )
    add(
        "--document-masks",
        action=argparse.BooleanOptionalAction,
        help="pack whole documents into samples, and keep them from seeing each other; otherwise samples are cut from "
        "the text wherever they end (default: on, if the data have the bounds of their documents)",
    )
    add("--sequence-length", type=int, default=256, metavar="S", help="tokens of a sample (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="initial weights and order of data (default: %(default)s)")


def add_hyperparameters(parser: argparse.ArgumentParser, defaults: Defaults) -> None:
    """Steps, batch and rate."""
    text = 'these fill in "auto" in the DeepSpeed JSON'
    add = parser.add_argument_group("how it is trained", text).add_argument
    add("--steps", type=int, default=200, metavar="N", help="batches to train (default: %(default)s)")
    add("--micro-batch-size", type=int, metavar="B", help=f"samples of a micro-batch (default: {defaults.samples})")
    add(
        "--gradient-accumulation-steps",
        type=int,
        metavar="M",
        help=f"micro-batches of a batch (default: {defaults.micro_batches})",
    )
    add(
        "--learning-rate",
        type=float,
        metavar="X",
        help=f"the highest of the schedule (default: {defaults.rate})",
    )
    add("--warmup-steps", type=int, metavar="N", help=f"batches of rising rate (default: {defaults.warmup})")


def add_evaluation_and_checkpoints(parser: argparse.ArgumentParser, changes: Sequence[str]) -> None:
    """When and where; ``changes``: what may differ from the training that is resumed."""
    add = parser.add_argument_group("evaluation and checkpoints").add_argument
    add(
        "--eval-interval",
        type=int,
        default=100,
        metavar="N",
        help="batches between evaluations, 0: only at the end (default: %(default)s)",
    )
    add(
        "--eval-micro-batches",
        type=int,
        metavar="N",
        help="held-out micro-batches of an evaluation, spread over the whole split, 0: evaluate nothing "
        f"(default: {EVAL_MICRO_BATCHES}, and the whole split at the end)",
    )
    add(
        "--output",
        type=Path,
        default=Path("runs/last"),
        metavar="DIR",
        help="for checkpoints, history and report (default: runs/last)",
    )
    add(
        "--save-interval",
        type=int,
        metavar="N",
        help="batches between checkpoints, 0: only at the end (default: a tenth of --steps from 50 on, and 15 minutes)",
    )
    add(
        "--grace-seconds",
        type=float,
        default=60.0,
        metavar="X",
        help="seconds after Ctrl-C or SIGTERM to finish the batch and save it, exit code 75 (default: %(default)s)",
    )
    add("--keep", type=int, default=2, metavar="N", help="newest checkpoints that are kept (default: %(default)s)")
    used = parser.add_mutually_exclusive_group()
    used.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="TAG",
        help="resume from a checkpoint in --output: the newest if there is one (no TAG, or auto), or that of this name "
        "(default: begin anew)",
    )
    used.add_argument("--overwrite", action="store_true", help="remove the run that --output has")
    add(
        "--allow-changed",
        nargs="+",
        choices=changes,
        metavar="WHAT",
        help="with --resume, go on although this differs from the checkpoint's training, which is refused otherwise. "
        "seed: the rest of the epoch comes in another order, some samples twice, others not at all; data, "
        "sequence-length, document-masks: the epoch begins again, with other samples; tokenizer: token ids may mean "
        "other words; batch-size: the order stays, samples that fill no whole micro-batch are passed over "
        "(default: nothing)",
    )


def add_callbacks(parser: argparse.ArgumentParser) -> None:
    """Who is told what happens, and may end it."""
    add = parser.add_argument_group("who is told, and may end it").add_argument
    add(
        "--report-to",
        nargs="+",
        choices=MONITORS,
        metavar="NAME",
        help=f"monitors that write losses and measures: {', '.join(MONITORS)} (default: those that the DeepSpeed JSON "
        "enables)",
    )
    add(
        "--callbacks",
        nargs="+",
        default=[],
        metavar="MODULE:CLASS",
        help="transformers' TrainerCallbacks of your own, called on rank 0 (default: none)",
    )
    add(
        "--early-stopping-patience",
        type=int,
        metavar="N",
        help="end after so many evaluations in which the last exit's held-out loss is no lower (default: never)",
    )


def save_interval(args: argparse.Namespace) -> int:
    """Batches between two checkpoints; 0: only at the end."""
    if args.save_interval is not None:
        return int(args.save_interval)
    return args.steps // 10 if args.steps >= _SHORT else 0


def given_hyperparameters(args: argparse.Namespace) -> dict[str, Any]:
    """Option → value, those that were given."""
    values = {
        "--steps": args.steps,
        "--micro-batch-size": args.micro_batch_size,
        "--gradient-accumulation-steps": args.gradient_accumulation_steps,
        "--learning-rate": args.learning_rate,
        "--warmup-steps": args.warmup_steps,
    }
    return {option: value for option, value in values.items() if value is not None}


def default_hyperparameters(args: argparse.Namespace, hidden_size: int) -> dict[str, Any]:
    """Option → value where none was given. Wide models, and weights that have been trained, need smaller rates."""
    tenth = args.init_from is not None and args.lora is None
    rate = 0.25 / hidden_size / (10 if tenth else 1)
    return {
        "--steps": args.steps,
        "--micro-batch-size": 8,
        "--gradient-accumulation-steps": 4,
        "--learning-rate": float(f"{rate:.3g}"),
        "--warmup-steps": min(500, max(1, args.steps // 20)),
    }


def parse_overrides(pairs: list[str], option: str = "--set") -> dict[str, Any]:
    """``key=value`` pairs of an option, values as JSON where they are.

    Raises:
        ModelError: one without ``=``.
    """
    from ibp_deepspeed.models.errors import ModelError

    values: dict[str, Any] = {}
    for pair in pairs:
        key, separator, text = pair.partition("=")
        if not separator:
            raise ModelError(f"{option} {pair}: write it as key=value.")
        try:
            values[key] = json.loads(text)
        except json.JSONDecodeError:
            values[key] = text
    return values


def profile_of_partition(text: str | None) -> Path | None:
    """FILE of ``profile:FILE``; None: it is something else."""
    return Path(text.removeprefix(_BY_PROFILE)) if text and text.startswith(_BY_PROFILE) else None


def parse_partition(text: str | None) -> list[int] | None:
    """``2,2,2,2`` as numbers; None: stages are balanced.

    Raises:
        ModelError: something else.
    """
    from ibp_deepspeed.models.errors import ModelError

    if not text or profile_of_partition(text):
        return None
    try:
        return [int(n) for n in text.split(",")]
    except ValueError:
        raise ModelError(
            f"--partition {text}: write decoder layers of each stage as numbers, like 2,2,2,2, or profile:FILE."
        ) from None
