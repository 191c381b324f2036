"""What every training checks alone before the processes meet: who it is of how many, and its configuration."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from typing import Any

from ibp_deepspeed.commands.training.arguments import given_hyperparameters
from ibp_deepspeed.commands.training.monitors import check_monitors


def checked(ds_config: dict[str, Any], replicas: int) -> dict[str, Any]:
    """The whole DeepSpeed JSON, but for the interlocking block; returns it with all three batch sizes."""
    from ibp_deepspeed.config.batch_sizes import with_batch_sizes
    from ibp_deepspeed.config.deepspeed import check_blocks, check_ds_config
    from ibp_deepspeed.optimizer.configured import check_optimizer
    from ibp_deepspeed.optimizer.learning_rate import check_schedule

    check_ds_config(ds_config)
    complete = with_batch_sizes(ds_config, replicas)
    check_optimizer(complete)
    check_schedule(complete)
    check_monitors(complete)
    check_blocks(complete)
    return complete


def processes(args: argparse.Namespace, command: str) -> tuple[int, int]:
    """K, and replicas, of the processes that a launcher started, or of this one alone."""
    from ibp_deepspeed.models.errors import ModelError

    if args.one_process:
        _become_only_process(args.stages)
        return args.stages, 1
    if "RANK" not in os.environ:
        module = command.removesuffix(".py")
        raise ModelError(
            f"{command} needs a launcher (deepspeed --num_accelerators 4 scripts/{command} …; where the package is "
            f"installed: deepspeed --num_accelerators 4 --module ibp_deepspeed.commands.{module} …) or --one-process."
        )
    world = int(os.environ["WORLD_SIZE"])
    num_stages = world if args.stages is None else args.stages
    if num_stages < 1:
        raise ModelError(f"--stages is {num_stages}: give at least 1, or leave it out for a stage in each process.")
    if world % num_stages:
        raise ModelError(f"{world} processes can't be divided into pipelines of {num_stages} stages: start a multiple.")
    return num_stages, world // num_stages


def _become_only_process(num_stages: int | None) -> None:
    """What a launcher would have said to a single process."""
    from ibp_deepspeed.models.errors import ModelError

    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ModelError(f"--one-process was started as {os.environ['WORLD_SIZE']} processes: leave the launcher out.")
    if num_stages is None or num_stages < 1:
        was = "" if num_stages is None else f", which is {num_stages}"
        raise ModelError(f"--one-process needs --stages K, the number of pipeline stages to train, from 1 on{was}.")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", port)


def check_numbers(args: argparse.Namespace) -> None:
    """Refuse numbers of options that make no sense.

    Raises:
        ModelError: one.
    """
    from ibp_deepspeed.models.errors import ModelError

    for option, value in given_hyperparameters(args).items():
        if value < (0 if option in ("--warmup-steps", "--learning-rate") else 1):
            raise ModelError(f"{option} is {value}: give a larger one.")
    if args.allow_changed and args.resume is None:
        raise ModelError("--allow-changed says what may differ from a checkpoint: it goes together with --resume.")
    if args.keep < 1:
        raise ModelError(f"--keep is {args.keep}: keep at least 1 checkpoint.")
    for name in ("save_interval", "eval_interval", "eval_micro_batches", "grace_seconds"):
        if (getattr(args, name) or 0) < 0:
            raise ModelError(f"--{name.replace('_', '-')} is {getattr(args, name):g}: give 0 or more.")


def warn_of_unknown_keys(ds_config: dict[str, Any]) -> None:
    """Say which keys do nothing; in a library they are only logged."""
    from ibp_deepspeed.config.known_keys import unknown_keys

    unknown = unknown_keys(ds_config)
    if unknown:
        print(f"warning: nobody reads {', '.join(unknown)} of the configuration.", file=sys.stderr)


def warn_of_schedule(ds_config: dict[str, Any], steps: int) -> None:
    """Say it when the learning rate would have reached its end long before the training does."""
    total = ds_config.get("scheduler", {}).get("params", {}).get("total_num_steps")
    if isinstance(total, int) and total < steps:
        print(
            f"warning: the configuration's learning rate ends at batch {total}, --steps is {steps}: set "
            f'"scheduler.params.total_num_steps" to "auto".',
            file=sys.stderr,
        )
