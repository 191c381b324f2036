"""What your model's layers, its heads and its messages take on the device at hand, for plan.py and train_lm.py.

    python scripts/profile_stage.py --model llama-1b --sequence-length 2048 --out profile.json
    python scripts/plan.py --model llama-1b --sequence-length 2048 --stages 8 --profile profile.json
    deepspeed … scripts/train_lm.py --sequence-length 2048 … --partition profile:profile.json

One layer of each kind is measured, the last one and an auxiliary head with their losses: the forward pass (F), the
input gradient (B) and the weight gradient (W) as the engine splits them, and B and W at once. One at a time is on the
device, so that the model may be larger than its memory. On a CPU set OMP_NUM_THREADS as the training will have it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ibp_deepspeed import cli
from ibp_deepspeed.atomic_files import check_target
from ibp_deepspeed.commands.planning.subject import add_subject_arguments, check_positions, check_sizes, subject

if TYPE_CHECKING:
    from ibp_deepspeed.planner.profile import Piece, Profile, Spread


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    add_subject_arguments(parser)
    add = parser.add_argument_group("how it is measured").add_argument
    add("--compile", action="store_true", help='layers are compiled, as with "compile": true (then B is not split off)')
    add("--repeats", type=int, default=10, metavar="N", help="interleaved; medians count (default: %(default)s)")
    add("--out", type=Path, default=Path("profile.json"), metavar="FILE", help="written here (default: %(default)s)")
    return parser.parse_args(words)


def show(profile: Profile) -> None:
    """The table, and what a message takes."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    what = profile.subject
    console.print(
        f"{profile.model} on {profile.device} ({profile.about}): {what.samples} × {what.sequence_length:,} tokens; "
        f"milliseconds, medians of {profile.repeats} (smallest … largest)",
        soft_wrap=True,
    )
    table = Table("", "layers", "F", "B", "W", "B and W at once", "of a layer", "kept, MiB")
    for column in table.columns:
        column.no_wrap = True
    decoder = profile.pieces[1].work().total
    for piece in (*profile.pieces, profile.head):
        table.add_row(*_cells(piece, decoder))
    console.print(table)
    message = profile.message
    if message is None:
        console.print(f"a message between two processes: not measured, {profile.no_message}", soft_wrap=True)
        return
    console.print(
        f"a message of the hidden states ({message.size / 2**20:.2f} MiB) between two processes over "
        f"{message.backend}: {_milliseconds(message.seconds)} ms; of one number: {_milliseconds(message.latency)} ms",
        soft_wrap=True,
    )


def _cells(piece: Piece, decoder: float) -> list[str]:
    times = (piece.forward, piece.input_gradient, piece.weight_gradient, piece.backward)
    return [
        piece.name,
        "–" if not piece.layers else str(len(piece.layers)),
        *map(_milliseconds, times),
        f"{piece.work().total / decoder:.2f}",
        f"{piece.kept / 2**20:.1f}",
    ]


def _milliseconds(spread: Spread) -> str:
    if spread.high == 0:
        return "–"
    median, low, high = (f"{round(1e3 * value, 3):.3g}" for value in (spread.median, spread.low, spread.high))
    return f"{median} ({low} … {high})"


def main(phase: cli.SameOnAllRanks) -> None:
    """Measure, write, show."""
    args = parse_arguments()
    cli.quiet()
    check_sizes(args, "sequence_length", "micro_batch_size", "repeats")
    check_target(args.out)
    import torch

    from ibp_deepspeed.models.profiling.measure import make_profile
    from ibp_deepspeed.planner.profile import write_profile

    dtype = torch.float32 if args.fp32 else torch.bfloat16
    model, options = subject(args, dtype)
    check_positions(args.sequence_length, model.hf_config)
    profile = make_profile(
        model,
        args.model,
        options,
        dtype=dtype,
        samples=args.micro_batch_size,
        sequence_length=args.sequence_length,
        repeats=args.repeats,
        compiled=args.compile,
    )
    write_profile(profile, args.out)
    show(profile)
    print(f"wrote {args.out}")


def run() -> None:
    """The command line."""
    cli.run(main)


if __name__ == "__main__":
    run()
