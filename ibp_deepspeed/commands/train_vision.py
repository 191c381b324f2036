"""Train an image classifier with interlocking backpropagation.

    deepspeed --num_accelerators 4 scripts/train_vision.py --deepspeed_config ds_configs/vision_pairwise.json \\
        --model resnet32-cifar --data data/cifar-10-batches-py --steps 78000 --output runs/cifar

torchrun works too, and --one-process, as with train_lm.py. Every stage reads the classes, the first one the images; the
accuracy of every exit is in each evaluation. docs/vision.md says more.
"""

from __future__ import annotations

from ibp_deepspeed import cli
from ibp_deepspeed.commands.training.image_arguments import parse_arguments
from ibp_deepspeed.commands.training.image_plan import make_image_plan
from ibp_deepspeed.commands.training.session import train


def main(phase: cli.SameOnAllRanks) -> int:
    """Check, start, train, save."""
    return train(phase, __doc__, parse_arguments, make_image_plan)


def run() -> None:
    """The command line."""
    cli.run(main)


if __name__ == "__main__":
    run()
