"""Train a causal language model with interlocking backpropagation.

    deepspeed --num_accelerators 4 scripts/train_lm.py --deepspeed_config ds_configs/pairwise_cpu.json \\
        --model models/configs/llama-tiny.json --data data/stdlib --steps 200 --output runs/first

torchrun works too. Each process is one pipeline stage of one data-parallel replica. With --one-process the same stages
are trained in one process on one device, without a launcher, to study how a strategy learns:

    python scripts/train_lm.py --one-process --stages 8 --deepspeed_config ds_configs/pairwise_cpu.json …
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ibp_deepspeed import cli
from scripts.training.checkpoints import resume, save, set_position
from scripts.training.loop import Run


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The command line (or ``words``); every option's help says its default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--deepspeed_config", required=True, metavar="FILE", help='DeepSpeed JSON with an "interlocking" block')
    add("--data", required=True, type=Path, metavar="DIR", help="folder written by scripts/prepare_data.py")
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument("--model", metavar="CONFIG", help="Hugging Face config: JSON file, folder or hub name")
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
        "own final norm and readout, or at random (default: %(default)s)",
    )
    add("--set", nargs="*", default=[], metavar="KEY=VALUE", help="override values of the model's config")
    add("--stages", type=int, metavar="K", help="pipeline stages (default: the number of processes)")
    add("--one-process", action="store_true", help="all stages in this process, on one device; needs --stages")
    add("--partition", metavar="N,N,…", help="decoder layers of each stage (default: balance parameters and heads)")
    add("--sequence-length", type=int, default=256, metavar="S", help="tokens of a sample (default: %(default)s)")
    add("--steps", type=int, default=200, metavar="N", help="batches to train (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="initial weights and order of data (default: %(default)s)")
    add("--eval-interval", type=int, default=100, metavar="N", help="batches between evaluations, 0: only at the end")
    add("--eval-micro-batches", type=int, default=16, metavar="N", help="held-out micro-batches (default: %(default)s)")
    add(
        "--output", type=Path, default=Path("runs/last"), metavar="DIR", help="checkpoint, history (default: runs/last)"
    )
    add("--save-interval", type=int, default=0, metavar="N", help="batches between checkpoints, 0: only at the end")
    add("--keep", type=int, default=2, metavar="N", help="newest checkpoints that are kept (default: %(default)s)")
    add(
        "--resume",
        nargs="?",
        const="auto",
        metavar="TAG",
        help="go on from a checkpoint in --output: the newest if there is one (no TAG, or auto), or that of this name",
    )
    add("--verbose", action="store_true", help="show DeepSpeed's own log")
    add("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args(words)


def parse_overrides(pairs: list[str]) -> dict[str, Any]:
    """``key=value`` pairs, values as JSON where they are."""
    from models.errors import ModelError

    values: dict[str, Any] = {}
    for pair in pairs:
        key, separator, text = pair.partition("=")
        if not separator:
            raise ModelError(f"--set {pair}: write it as key=value.")
        try:
            values[key] = json.loads(text)
        except json.JSONDecodeError:
            values[key] = text
    return values


def parse_partition(text: str | None) -> list[int] | None:
    """``2,2,2,2`` as numbers."""
    from models.errors import ModelError

    try:
        return [int(n) for n in text.split(",")] if text else None
    except ValueError:
        raise ModelError(f"--partition {text}: write decoder layers of each stage as numbers, like 2,2,2,2.") from None


@dataclass
class Plan:
    """What a run consists of, checked as far as one process can."""

    settings: dict[str, Any]
    interlocking: Any
    model: Any
    stages: int
    bounds: list[int]
    replicas: int
    train: Any
    held_out: Any
    description: Any
    resume: str | None
    files: dict[str, str]


def check(args: argparse.Namespace) -> Plan:
    """Check everything that can be checked alone, before the processes meet."""
    from ibp_deepspeed.data import open_tokens
    from ibp_deepspeed.engine.initialize import check_deepspeed_settings, load_config, resolve_interlocking
    from models import CausalLM, ModelError
    from models.build import Description
    from models.runs.checkpoint import TOKENIZER_FOLDER, tokenizer_texts
    from models.runs.resume import checkpoint_to_resume

    if args.one_process:
        become_only_process(args.stages)
    if "RANK" not in os.environ:
        raise ModelError(
            "train_lm.py needs a launcher (deepspeed --num_accelerators 4 scripts/train_lm.py …) or --one-process."
        )
    first, world = os.environ["RANK"] == "0", int(os.environ["WORLD_SIZE"])
    settings = load_config(args.deepspeed_config)
    check_deepspeed_settings(settings)
    interlocking = resolve_interlocking(settings)
    if first:
        warn_of_schedule(settings, args.steps)
        warn_of_mode(interlocking, args.stages or world)
    stages = args.stages or world
    if not args.one_process and (stages < 1 or world % stages):
        raise ModelError(f"{world} processes can't be divided into pipelines of {stages} stages: start a multiple.")
    train = open_tokens(args.data, "train", verify=first)
    held_out = open_tokens(args.data, "heldout", verify=first)
    begin = starting_point(args, train.manifest.vocabulary_size)
    config = begin.config
    if args.sequence_length > getattr(config, "max_position_embeddings", args.sequence_length):
        raise ModelError(
            f"--sequence-length {args.sequence_length} is longer than the model's {config.max_position_embeddings} "
            f"positions: use --set max_position_embeddings={args.sequence_length}."
        )
    model = CausalLM(config, seed=args.seed)
    train.check_vocabulary(model.vocab_size)
    partition = parse_partition(args.partition)
    bounds = model.partition(stages, aux_heads=interlocking.aux_head, manual=partition)
    if args.keep < 1 or args.save_interval < 0:
        raise ModelError(
            f"--keep {args.keep} --save-interval {args.save_interval}: keep at least 1, save at least at 0."
        )
    description = Description(
        model=model.config.to_dict(),
        bounds=bounds,
        interlocking=interlocking.model_dump(exclude_unset=True),
        sequence_length=args.sequence_length,
        data=str(args.data),
        source=train.manifest.source,
        init_from=args.init_from,
        settings={key: value for key, value in settings.items() if key != "interlocking"},
    )
    files = {**description.files(), **begin.files, **tokenizer_texts(args.data / TOKENIZER_FOLDER)}
    resume = checkpoint_to_resume(args.output / "checkpoint", args.resume, description, args.steps)
    if resume is None and begin.weights is not None:
        model = CausalLM(config, seed=args.seed, weights=begin.weights, fresh_heads=args.init_heads == "fresh")
    replicas = max(1, world // stages)
    return Plan(settings, interlocking, model, stages, bounds, replicas, train, held_out, description, resume, files)


def starting_point(args: argparse.Namespace, vocabulary_size: int) -> Any:
    """The config and weights of --model or --init-from."""
    from models.runs.checkpoint import TOKENIZER_FOLDER
    from models.runs.start import pretrained_start, random_start

    overrides = parse_overrides(args.set)
    if args.init_from is None:
        return random_start(args.model, {"vocab_size": vocabulary_size, **overrides})
    first = os.environ["RANK"] == "0"
    return pretrained_start(args.init_from, overrides, args.data / TOKENIZER_FOLDER if first else None)


def become_only_process(stages: int | None) -> None:
    """What a launcher would have said to a single process.

    Raises:
        ModelError: there is a launcher, or the number of stages is not given.
    """
    from models.errors import ModelError

    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ModelError(f"--one-process was started as {os.environ['WORLD_SIZE']} processes: leave the launcher out.")
    if stages is None:
        raise ModelError("--one-process needs --stages K, the number of pipeline stages to train.")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", port)


def warn_of_schedule(settings: dict[str, Any], steps: int) -> None:
    """Say it when the learning rate would have reached its end long before the training does."""
    total = settings.get("scheduler", {}).get("params", {}).get("total_num_steps")
    if isinstance(total, int) and total < steps:
        print(
            f"warning: the configuration's learning rate ends at batch {total}, --steps is {steps}: set "
            f'"scheduler.params.total_num_steps".',
            file=sys.stderr,
        )


def warn_of_mode(interlocking: Any, stages: int) -> None:
    """Say it when language models are known to learn slowly with these options."""
    options, width = interlocking.aux_head, interlocking.width_for(stages)
    linear = options is not None and options.blocks == options.borrow == 0
    if interlocking.mode == "furthest" and 1 < width < stages and linear:
        print(
            f'warning: mode "furthest" at width {width} with linear heads learns language slowly (docs/learning.md): '
            'set "mode": "window", or "aux_head": {"blocks": 1}.',
            file=sys.stderr,
        )


def start(plan: Plan, args: argparse.Namespace) -> Any:
    """Meet the other processes and make the engine, or the virtual pipeline."""
    import deepspeed
    import torch
    from deepspeed.accelerator import get_accelerator
    from deepspeed.monitor.config import get_monitor_config
    from deepspeed.monitor.monitor import MonitorMaster

    from ibp_deepspeed import init_distributed, initialize
    from models.build import pipeline_module, virtual_pipeline

    deepspeed.utils.logger.setLevel("INFO" if args.verbose else "WARNING")
    with contextlib.ExitStack() as stack:
        if not args.verbose:
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        init_distributed()
        torch.manual_seed(args.seed + int(os.environ["RANK"]))  # dropout
        if args.one_process:
            monitor = MonitorMaster(get_monitor_config(plan.settings))
            device = get_accelerator().current_device_name()
            return virtual_pipeline(plan.model, plan.settings, plan.stages, plan.bounds, device, monitor)
        module = pipeline_module(plan.model, plan.interlocking, plan.stages, plan.bounds)
        return initialize(model=module, config=plan.settings)[0]


def loaders(engine: Any, plan: Plan, args: argparse.Namespace) -> tuple[Any, Any]:
    """Training and held-out micro-batches of this rank's replica.

    Raises:
        DataError: less than one batch of data.
    """
    from ibp_deepspeed.data import MicroBatchLoader

    size, count = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
    replicas = plan.replicas
    rank = engine.grid.get_data_parallel_rank() if replicas > 1 else 0
    options = {"data_parallel_rank": rank, "data_parallel_size": replicas, "seed": args.seed}
    train = MicroBatchLoader(plan.train, args.sequence_length, size, **options, start=engine.global_steps * count)
    set_position(train, plan, args)
    train.samples.require(count * size * replicas, "a batch")
    return train, MicroBatchLoader(plan.held_out, args.sequence_length, size, **options, shuffle=False)


def describe(engine: Any, plan: Plan, args: argparse.Namespace, data: list[Any]) -> None:
    """Say on rank 0 what is going to be trained, and what of the data is left out."""
    options, micro_batches = plan.interlocking.aux_head, engine.gradient_accumulation_steps()
    head_parameters = plan.model.aux_head_parameters(options) if options else 0
    lines = [
        f"{plan.stages} stages × {plan.replicas} replicas, layers {plan.bounds}, "
        f"{sum(plan.model.parameter_counts()):,} parameters and {head_parameters:,} a head, strategy "
        f"{plan.interlocking.strategy} ({plan.interlocking.mode}), {micro_batches} micro-batches"
    ]
    if args.init_from and not plan.resume:
        heads = "at random" if args.init_heads == "fresh" else "as its final norm and readout"
        lines.append(f"begins with the weights of {args.init_from}" + (f", heads {heads}" if options else ""))
    if options and options.readout == "shared":
        size = "" if args.one_process else f" ({engine.refresh_bytes:,} bytes)"
        lines.append(
            f"the last stage's readout{size} goes to all heads every {options.refresh_interval} batches and is used "
            f"{options.delay(plan.stages, micro_batches)} batches later"
        )
    if plan.model.was_tied:
        lines.append("the readout is not tied to the embedding: they live on different stages.")
    lines += [remark for loader in data for remark in loader.samples.remarks()]
    print("\n".join(lines), flush=True)


def main(phase: cli.SameOnAllRanks) -> None:
    """Check, start, train, save."""
    args = parse_arguments()
    plan = check(args)
    engine = start(plan, args)
    resume(engine, plan, args)
    train, held_out = loaders(engine, plan, args)
    args.output.mkdir(parents=True, exist_ok=True)
    if engine.global_rank == 0:
        describe(engine, plan, args, [train, held_out])
    phase.ends()
    run = Run(engine, args, engine.train_batch_size() * args.sequence_length)
    losses = run.train(train, held_out, lambda: save(engine, plan, args, train))
    if engine.global_rank == 0:
        final = losses[-1].item()
        entropy = plan.train.manifest.unigram_entropy_nats
        print(f"held-out loss of the last exit {final:.4f}, unigram entropy {entropy:.4f} nats per token")
        print(f"checkpoint in {args.output / 'checkpoint'}")
    engine.close()


if __name__ == "__main__":
    cli.run(main)
