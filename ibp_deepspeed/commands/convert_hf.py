"""Between Hugging Face folders and checkpoints.

    python scripts/convert_hf.py check --model path/to/model
    python scripts/convert_hf.py import --model path/to/model --out runs/imported
    python scripts/convert_hf.py export --checkpoint runs/first/checkpoint --out runs/first/hf
    python scripts/convert_hf.py export --checkpoint runs/first/checkpoint --exit 2 --out runs/first/half
    python scripts/convert_hf.py export --checkpoint runs/first/checkpoint --all-exits --out runs/first/family
    python scripts/convert_hf.py export --checkpoint runs/lora/checkpoint --adapter --out runs/lora/adapter

train_lm.py --init-from reads Hugging Face folders by itself; an import has a file for each layer.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from ibp_deepspeed import cli


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = cli.parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("import", help="Hugging Face model → folder for train_lm.py --init-from").add_argument
    add("--model", required=True, metavar="DIR", help="folder of save_pretrained, or a name on the hub")
    add("--out", required=True, type=Path, metavar="DIR", help="folder to write")
    command = commands.add_parser("check", help="prove with a small model of its config that a model can be cut")
    add = command.add_argument
    add("--model", required=True, metavar="NAME", help="shipped config, config file, folder or hub name")
    command = commands.add_parser("export", help="checkpoint → folder for from_pretrained, without the heads")
    add = command.add_argument
    add("--checkpoint", required=True, type=Path, metavar="DIR", help="folder written by train_lm.py, or by import")
    add("--out", required=True, type=Path, metavar="DIR", help="folder to write")
    which = command.add_mutually_exclusive_group()
    which.add_argument(
        "--exit",
        type=int,
        metavar="K",
        help="the first K stages with their head, as a model (default: the whole model)",
    )
    which.add_argument(
        "--all-exits", action="store_true", help="a family: one folder for each exit, a card and an index"
    )
    which.add_argument(
        "--adapter",
        action="store_true",
        help="the adapters of --lora alone, as peft writes them, for the model that they were trained on (default: the "
        "whole model, with the adapters in its weights)",
    )
    add("--push-to-hub", metavar="USER/NAME", help="upload what is written to the hub (default: no)")
    add("--private", action="store_true", help="--push-to-hub: a repository that is made is private")
    add("--shard-size", default="5GB", metavar="SIZE", help="of the largest safetensors file (default: %(default)s)")
    add(
        "--memory-gib",
        type=float,
        metavar="GIB",
        help="a model that takes more than half of it in fp32 is written layer by layer (default: what is free)",
    )
    add("--data", type=Path, metavar="DIR", help="--all-exits: held-out text (default: of the data it was trained on)")
    add("--batch-size", type=int, default=8, metavar="B", help="--all-exits: samples at once (default: %(default)s)")
    add("--max-batches", type=int, metavar="N", help="--all-exits: batches to measure (default: all held-out text)")
    return parser.parse_args()


def check(args: argparse.Namespace) -> None:
    """Prove the cut of a model, whatever is known of its type, and show what was compared."""
    from ibp_deepspeed.models import ModelError
    from ibp_deepspeed.models.config import load_config
    from ibp_deepspeed.models.proofs.first_use import proving
    from ibp_deepspeed.models.proofs.proof import prove
    from ibp_deepspeed.models.proofs.report import lines

    config = load_config(args.model)
    with proving():
        proof = prove(config)
    for line in lines(proof):
        print(line)
    if proof.refusal is not None:
        raise ModelError(f"{proof.refusal}.")
    print(f"a model of type '{proof.model_type}' with this config can be cut")


def check_shard_size(text: str) -> None:
    """Of --shard-size, in Hugging Face's units.

    Raises:
        ModelError: it is none.
    """
    from ibp_deepspeed.models import ModelError

    if re.fullmatch(r"(?=.*[1-9])\d+(\.\d+)?\s*[KMGT]B", text, re.IGNORECASE) is None:
        raise ModelError(f"--shard-size {text}: write a number and its unit, like 500MB or 5GB.")


def check_export(args: argparse.Namespace) -> None:
    """What can be told before a checkpoint is read.

    Raises:
        ModelError: a size without a unit, or a name that can be no repository's.
    """
    from ibp_deepspeed.models.exits.memory import check_memory

    check_shard_size(args.shard_size)
    check_memory(args.memory_gib)
    if args.push_to_hub is not None:
        from ibp_deepspeed.models.hf.push import check_repo

        check_repo(args.push_to_hub)


def export(args: argparse.Namespace) -> None:
    """One exit."""
    from ibp_deepspeed.models.exits.exits import Exits
    from ibp_deepspeed.models.hf.save import write

    exits = Exits(args.checkpoint, memory_gib=args.memory_gib)
    parameters = write(exits, args.out, args.exit, shard_size=args.shard_size)
    report(exits, args.exit or len(exits), parameters, args.out)


def export_adapter(args: argparse.Namespace) -> None:
    """What ``--lora`` has trained, for peft."""
    from ibp_deepspeed.models.exits.exits import Exits
    from ibp_deepspeed.models.hf.adapter import write_adapter

    exits = Exits(args.checkpoint)
    numbers = write_adapter(exits, args.out)
    base = exits.description.init_from
    print(f"{args.out}: {numbers:,} numbers, loads with PeftModel.from_pretrained onto {base}, the same logits")


def export_all(args: argparse.Namespace) -> None:
    """Every exit in a folder of its own, and what each costs and is worth."""
    from ibp_deepspeed.data import HeldOut, open_tokens
    from ibp_deepspeed.errors import OutputError
    from ibp_deepspeed.models import ModelError
    from ibp_deepspeed.models.exits.exits import Exits
    from ibp_deepspeed.models.exits.table import measure, table
    from ibp_deepspeed.models.hf.family import folder_of, write_index
    from ibp_deepspeed.models.hf.model_card import story
    from ibp_deepspeed.models.hf.save import write

    exits = Exits(args.checkpoint, memory_gib=args.memory_gib)
    folders = exits.description.folders if args.data is None else [args.data]
    if not folders:
        raise ModelError(f"{exits.folder} says nothing of the data it was trained on: give --data.")
    if args.out.exists():
        raise OutputError(f"{args.out} exists already: give another --out or remove it.")
    for exit_ in list(exits.objectives)[:-1]:
        exits.objectives[exit_].as_layers()  # refuses before anything is measured
    rows: list[dict[str, Any]] = []
    tokens = [open_tokens(folder, "heldout") for folder in folders]
    for each in tokens:
        each.check_vocabulary(exits.model.vocab_size)
    samples = None if args.max_batches is None else args.max_batches * args.batch_size
    length, masks = exits.description.sequence_length, exits.description.document_masks
    held_out = HeldOut(
        tokens[0] if len(tokens) == 1 else tokens, length, args.batch_size, samples=samples, document_masks=masks
    )
    for row in measure(exits, held_out):
        out = args.out / folder_of(row["exit"])
        results = {"held-out perplexity": f"{row['perplexity']:.3f}"}
        row["parameters"] = write(exits, out, row["exit"], shard_size=args.shard_size, results=results)
        rows.append(row)
        report(exits, row["exit"], row["parameters"], out)
    text = table(rows)
    write_index(args.out, rows, text, story(exits))
    print(f"\n{text}")


def report(exits: Any, exit_: int, parameters: int, out: Path) -> None:
    """Say what was written."""
    part = "the model" if exit_ == len(exits) else f"exit {exit_} of {len(exits)} with {exits.depth(exit_)} layers"
    tokenizer = "" if exits.checkpoint.tokenizer else "; it has no tokenizer, as the checkpoint has none"
    print(
        f"{out}: {part}, {parameters:,} parameters, loads with AutoModelForCausalLM.from_pretrained, every key there, "
        f"the same logits{tokenizer}"
    )


def main(phase: cli.SameOnAllRanks) -> None:
    """Run a command."""
    args = parse_arguments()
    cli.quiet()
    if args.command == "export":
        check_export(args)
    if args.command == "check":
        check(args)
    elif args.command == "import":
        from ibp_deepspeed.models.hf.importing import import_model

        folder = import_model(args.model, args.out)
        print(f"{folder}: train with scripts/train_lm.py --init-from {folder}")
    else:
        (export_adapter if args.adapter else export_all if args.all_exits else export)(args)
        if args.push_to_hub is not None:
            from ibp_deepspeed.models.hf.push import push

            print(f"pushed to {push(args.out, args.push_to_hub, args.private)}")


def run() -> None:
    """The command line."""
    cli.run(main)


if __name__ == "__main__":
    run()
