"""plan.py with a measured profile: times, memory and messages of the device that it was measured on."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ibp_deepspeed.commands.training.arguments import profile_of_partition
from ibp_deepspeed.errors import PlanError

if TYPE_CHECKING:
    from ibp_deepspeed.config.interlocking import AuxHeadConfig
    from ibp_deepspeed.models import CausalLM
    from ibp_deepspeed.planner.hardware import Device, Link
    from ibp_deepspeed.planner.profile import Profile


def profile_path(args: argparse.Namespace) -> Path | None:
    """The file of --profile, or of --partition profile:FILE.

    Raises:
        PlanError: two of them, or a device beside it.
    """
    by_partition = profile_of_partition(args.partition)
    given: Path | None = args.profile or by_partition
    if by_partition is not None and by_partition != given:
        raise PlanError(f"--profile {given} and --partition profile:{by_partition}: give one profile.")
    for option in ("device", "tflops", "reached"):
        if given is not None and getattr(args, option) is not None:
            raise PlanError(
                f"--{option} {getattr(args, option)} and the profile {given}, whose times are its own device's: "
                "leave one out."
            )
    return given


def given_profile(args: argparse.Namespace) -> Profile | None:
    """What is in the file; None: none is given.

    Raises:
        PlanError: it can't be used.
    """
    from ibp_deepspeed.planner.profile import read_profile

    path = profile_path(args)
    return None if path is None else read_profile(path)


def check_subject(profile: Profile, args: argparse.Namespace, model: CausalLM, options: AuxHeadConfig) -> None:
    """That it was measured with what is planned, compiled or not.

    Raises:
        PlanError: it was not.
    """
    from ibp_deepspeed.models.profiling.subject import subject_of
    from ibp_deepspeed.planner.profile import check_profile

    asked = subject_of(
        model,
        options,
        dtype="float32" if args.fp32 else "bfloat16",
        sequence_length=args.sequence_length,
        samples=args.micro_batch_size,
        compiled="either",
    )
    path = profile_path(args)
    assert path is not None
    check_profile(profile, path, asked, ["--model", args.model, *["--set", *args.set] * bool(args.set)])


def measured(profile: Profile, args: argparse.Namespace, inside: Link) -> tuple[Device, Link]:
    """The profile's device, and the link inside a host, unless --gbps says another one.

    Args:
        profile: checked.
        args: of plan.py.
        inside: the link where none was measured.
    """
    path = profile_path(args)
    assert path is not None
    device = profile.machine(path, None if args.memory is None else args.memory * 2**30)
    if args.gbps is not None:
        return device, inside
    if profile.message is None:
        said = f"messages not measured ({profile.no_message})"
        return replace(device, source=f"{device.source}, {said}"), inside
    link = profile.message.link()
    link = link if args.latency_us is None else replace(link, latency=inside.latency)
    said = f"messages inside a host too (over {profile.message.backend})"
    return replace(device, source=f"{device.source}, {said}"), link
