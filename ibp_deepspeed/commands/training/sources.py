"""The first lines of a run: what its strategy, stages, batch, learning rate and vocabulary are, and who said so."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ibp_deepspeed.commands.training.arguments import given_hyperparameters

if TYPE_CHECKING:
    from ibp_deepspeed.commands.training.plan import Plan
    from ibp_deepspeed.commands.training.training_plan import TrainingPlan

_BATCH = {
    "micro-batches": ("gradient_accumulation_steps",),
    "samples": ("train_micro_batch_size_per_gpu",),
}
_RATE = ("optimizer", "params", "lr")


def say_sources(plan: TrainingPlan, args: argparse.Namespace) -> list[str]:
    """On one process, before the processes meet: print these lines, and return them."""
    lines, warning = source_lines(plan, args), only_stage_warning(plan, args)
    print("\n".join(lines), flush=True)
    if warning is not None:
        print(warning, file=sys.stderr)
    return lines


def source_lines(plan: TrainingPlan, args: argparse.Namespace) -> list[str]:
    """A line for each thing that a user may have meant otherwise.

    Args:
        plan: what the run consists of.
        args: the command line.
    """
    from ibp_deepspeed.config.deepspeed import load_ds_config

    written = load_ds_config(args.deepspeed_config)
    sizes = " of ".join(
        f"{_value(plan.ds_config, place)} {what} ({_source(place, written, args)})" for what, place in _BATCH.items()
    )
    return [
        _strategy(plan, written, args),
        _stages(plan, args),
        f"batch: {plan.ds_config['train_batch_size']} samples: {sizes} in each replica",
        f"learning rate: {_value(plan.ds_config, _RATE)} ({_source(_RATE, written, args)})",
        *plan.data_lines(args),
    ]


def only_stage_warning(plan: TrainingPlan, args: argparse.Namespace) -> str | None:
    """That one process alone was started, where that may not have been meant."""
    if plan.num_stages > 1 or args.stages is not None:
        return None
    return (
        "warning: one process was started, which is one stage: this is training without a pipeline. Say how many with "
        "deepspeed --num_accelerators K (on CPU it starts one for each NUMA node otherwise), or with --one-process "
        "--stages K."
    )


def _strategy(plan: TrainingPlan, written: Mapping[str, Any], args: argparse.Namespace) -> str:
    block, chosen = written.get("interlocking"), plan.interlocking
    exits = "" if chosen.exits == "every" else f", exits {chosen.exits}"
    what = f"strategy: {chosen.strategy}, mode {chosen.mode}{exits}"
    if block is None:
        return f'{what} (defaults: {args.deepspeed_config} has no "interlocking" block)'
    missing = [name for name in ("strategy", "mode") if name not in block]
    defaults = f", {' and '.join(missing)} by default" if missing else ""
    return f"{what} ({args.deepspeed_config}{defaults})"


def _stages(plan: TrainingPlan, args: argparse.Namespace) -> str:
    stages = "a process each" if args.stages is None else "--stages"
    processes = "one process" if args.one_process else f"{plan.num_stages * plan.replicas} processes"
    return f"stages: {plan.num_stages} ({stages}); replicas: {plan.replicas} ({processes})"


def text_lines(plan: Plan, args: argparse.Namespace) -> list[str]:
    """How many tokens a language model has, what it reads and how, and who said so."""
    return [_vocabulary(plan, args), *_mixture(plan), *_documents(plan, args)]


def _vocabulary(plan: Plan, args: argparse.Namespace) -> str:
    tokens = f"vocabulary: {plan.model.vocab_size:,} tokens"
    if args.init_from is not None:
        return f"{tokens} ({args.init_from})"
    if any(pair.startswith("vocab_size=") for pair in args.set):
        return f"{tokens} (--set)"
    from ibp_deepspeed.models.config import load_config

    own = load_config(args.model).vocab_size
    replaced = "" if own == plan.model.vocab_size else f", in the place of the {own:,} of {args.model}"
    return f"{tokens} ({args.data}{replaced})"


def _mixture(plan: Plan) -> list[str]:
    """The sources, where they are several."""
    return [] if plan.mixture is None else [f"data: {plan.mixture.describe()}"]


def _documents(plan: Plan, args: argparse.Namespace) -> list[str]:
    """Whether samples keep the documents of a text apart; nothing of dialogues, which have a sample each."""
    texts = [file for file in (plan.mixture.train if plan.mixture else [plan.train]) if file.marks is None]
    if not texts:
        return []
    said = "default" if args.document_masks is None else "--document-masks"
    if plan.document_masks:
        return [f"documents: packed whole into samples, and masked from each other ({said})"]
    if args.document_masks is None:
        old = next(file.path.parent for file in texts if file.bounds is None)
        said = f"{old} has no bounds of documents: it was prepared by an earlier version"
    else:
        said = "--no-document-masks"
    return [f"documents: samples cross their ends, and are not masked ({said})"]


def _value(ds_config: Mapping[str, Any], place: tuple[str, ...]) -> Any:
    found: Any = ds_config
    for key in place:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _source(place: tuple[str, ...], written: Mapping[str, Any], args: argparse.Namespace) -> str:
    """Who said a value: an option, its default in the place of "auto", or the file."""
    from ibp_deepspeed.config.auto import AUTO, FILLED

    value, option = _value(written, place), FILLED[place]
    if value == AUTO:
        return option if option in given_hyperparameters(args) else f"default of {option}"
    return f"{args.deepspeed_config}" if value is not None else "default"
