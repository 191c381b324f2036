"""Which layers each stage of a training has."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ibp_deepspeed.commands.training.arguments import parse_partition, profile_of_partition

if TYPE_CHECKING:
    from ibp_deepspeed.config.interlocking import InterlockingConfig
    from ibp_deepspeed.models import CausalLM
    from ibp_deepspeed.planner.workload import Workload


def stage_bounds(
    args: argparse.Namespace,
    model: CausalLM,
    interlocking: InterlockingConfig,
    num_stages: int,
    ds_config: Mapping[str, Any],
) -> list[int]:
    """Bounds by --partition; without it stages are balanced by their operations.

    Raises:
        InterlockingError: numbers that don't fit, or a profile that is damaged or of something else.
    """
    return model.partition(
        num_stages,
        aux_heads=interlocking.aux_head,
        exits=interlocking.exits_for(num_stages),
        manual=parse_partition(args.partition),
        sequence_length=args.sequence_length,
        measured=_measured(args, model, interlocking, num_stages, ds_config),
    )


def _measured(
    args: argparse.Namespace,
    model: CausalLM,
    interlocking: InterlockingConfig,
    num_stages: int,
    ds_config: Mapping[str, Any],
) -> Workload | None:
    """What ``profile:FILE`` says of this training's model, micro-batch, dtype and heads."""
    from ibp_deepspeed.models.profiling.subject import subject_of
    from ibp_deepspeed.planner.profile import check_profile, read_profile

    path = profile_of_partition(args.partition)
    if path is None:
        return None
    profile = read_profile(path)
    asked = subject_of(
        model,
        interlocking.aux_head if len(interlocking.exits_for(num_stages)) > 1 else None,
        dtype="bfloat16" if ds_config.get("bf16", {}).get("enabled") else "float32",
        sequence_length=args.sequence_length,
        samples=ds_config["train_micro_batch_size_per_gpu"],
        compiled=interlocking.compile,
    )
    vocabulary = f"vocab_size={model.vocab_size}"  # of the data's tokenizer
    words = ["--model", args.model or args.init_from, "--set", *args.set, *[vocabulary] * (vocabulary not in args.set)]
    check_profile(profile, path, asked, words)
    return profile.workload()
