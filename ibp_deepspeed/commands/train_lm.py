"""Train a causal language model with interlocking backpropagation.

    deepspeed --num_accelerators 4 scripts/train_lm.py --deepspeed_config ds_configs/modules_cpu.json \\
        --model llama-tiny --data data/stdlib --steps 200 --output runs/first

torchrun works too. Each process is one pipeline stage of one data-parallel replica. With --one-process the same stages
are trained in one process on one device, without a launcher, to study how a strategy learns:

    python scripts/train_lm.py --one-process --stages 8 --deepspeed_config ds_configs/modules_cpu.json …
"""

from __future__ import annotations

from ibp_deepspeed import cli
from ibp_deepspeed.commands.training.arguments import parse_arguments
from ibp_deepspeed.commands.training.plan import make_plan
from ibp_deepspeed.commands.training.session import train


def main(phase: cli.SameOnAllRanks) -> int:
    """Check, start, train, save."""
    return train(phase, __doc__, parse_arguments, make_plan)


def run() -> None:
    """The command line."""
    cli.run(main)


if __name__ == "__main__":
    run()
