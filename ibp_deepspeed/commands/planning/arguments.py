"""The command line of plan.py."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ibp_deepspeed import cli
from ibp_deepspeed.commands.planning.searching import add_search
from ibp_deepspeed.commands.planning.subject import add_subject_arguments

_FOUND_BY_SEARCH = (
    "stages",
    "micro_batches",
    "micro_batch_size",
    "data_parallel",
    "recompute",
    "partition",
    "stages_a_host",
    "straggler",
)


class _ListDevices(argparse.Action):
    """As --help, the known GPUs."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        from ibp_deepspeed.models.devices import MEMORY_GIB, PEAK_FLOPS

        for name, peak in PEAK_FLOPS.items():
            print(f"{name}: {peak / 1e12:g} TFLOP/s in dense bf16, {MEMORY_GIB[name]:g} GB")
        parser.exit()


def parse_arguments(description: str | None, words: list[str] | None = None) -> argparse.Namespace:
    """The command line (or ``words``); every option's help says its default."""
    parser = cli.parser(description)
    add_subject_arguments(parser)
    add = parser.add_argument_group("the pipeline").add_argument
    add("--stages", type=int, metavar="K", help="pipeline stages (default: none, needed without --search)")
    add("--micro-batches", type=int, default=8, metavar="M", help="of a batch (default: %(default)s)")
    add("--data-parallel", type=int, default=1, metavar="R", help="pipelines side by side (default: %(default)s)")
    add("--zero", type=int, default=0, choices=[0, 1], help="ZeRO stage (default: %(default)s)")
    add(
        "--optimizer",
        choices=["AdamW", "Muon"],
        default="AdamW",
        help="whose state and losses are planned with (default: %(default)s)",
    )
    add("--recompute", action="store_true", help="stages run forward again before their backward pass")
    add("--partition", metavar="N,N,…", help="decoder layers of each stage, or profile:FILE (default: balanced)")
    add_search(parser)
    add = parser.add_argument_group("the machines").add_argument
    add(
        "--profile",
        type=Path,
        metavar="FILE",
        help="times, and memory, as profile_stage.py measured them on a device (default: computed)",
    )
    add("--device", metavar="NAME", help="a known GPU, see --devices, or any name with --tflops (default: H100)")
    add("--devices", action=_ListDevices, nargs=0, help="list the known GPUs, and stop")
    add(
        "--tflops",
        type=float,
        metavar="X",
        help="peak of the device, 10^12 operations a second (default: a known GPU's)",
    )
    add("--memory", type=float, metavar="GIB", help="of the device (default: a known GPU's; otherwise not checked)")
    add("--reached", type=float, metavar="X", help="part of the peak that layers reach (default: 0.45)")
    add("--stages-a-host", type=int, metavar="N", help="consecutive stages on a host (default: all)")
    add(
        "--gbps",
        type=float,
        metavar="X",
        help="10^9 bits a second inside a host, each way (default: the profile's, or 400)",
    )
    add(
        "--host-gbps",
        type=float,
        metavar="X",
        default=100.0,
        help="the same between hosts, all devices together (default: %(default)s)",
    )
    add(
        "--latency-us",
        type=float,
        metavar="X",
        help="of a message, microseconds (default: the profile's inside a host, or 10)",
    )
    add(
        "--jitter",
        type=float,
        default=0.0,
        metavar="X",
        help="work takes by a random factor longer or shorter, X its logarithm's standard deviation (default: 0)",
    )
    add(
        "--straggler",
        nargs="+",
        default=[],
        metavar="STAGE=FACTOR",
        help="a stage, counted from 0, whose work takes so many times as long (default: none)",
    )
    add = parser.add_argument_group("the answer").add_argument
    add(
        "--tolerance",
        type=float,
        default=2.0,
        metavar="%",
        help="loss above backpropagation's that is accepted, in percent (default: %(default)s)",
    )
    add("--json", type=Path, metavar="FILE", help="write all numbers here (default: nowhere)")
    add(
        "--write",
        type=Path,
        metavar="FILE",
        help="write the DeepSpeed JSON of what is advised, or found best, here (default: nowhere)",
    )
    args = parser.parse_args(words)
    args.given = [name for name in _FOUND_BY_SEARCH if getattr(args, name) != parser.get_default(name)]
    return args
