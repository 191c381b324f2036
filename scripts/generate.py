"""Continue text with a trained model, from an export or a checkpoint, from any exit.

python scripts/generate.py --model runs/first/hf --prompt "def main("
python scripts/generate.py --checkpoint runs/first/checkpoint --exit 2 --prompt "def main("
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ibp_deepspeed import cli
from ibp_deepspeed.errors import InterlockingError, first_line


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = cli.parser(__doc__)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", metavar="DIR", help="Hugging Face folder, such as convert_hf.py export writes")
    source.add_argument("--checkpoint", type=Path, metavar="DIR", help="checkpoint folder written by train_lm.py")
    add("--exit", type=int, metavar="K", help="with --checkpoint: the exit behind K stages (default: the whole model)")
    add("--prompt", default="import ", help='text to continue (default: "import ")')
    add("--chat", action="store_true", help="the prompt is a user's message, put into the tokenizer's chat template")
    add("--tokens", type=int, default=80, metavar="N", help="most new tokens (default: %(default)s)")
    add(
        "--temperature",
        type=float,
        default=0.8,
        metavar="T",
        help="of the draws, 0: always the likeliest token (default: %(default)s)",
    )
    add("--seed", type=int, default=0, metavar="N", help="of the draws (default: %(default)s)")
    add("--device", default="cpu", help="torch device (default: %(default)s)")
    args = parser.parse_args()
    if args.exit is not None and args.checkpoint is None:
        parser.error("--exit needs --checkpoint")
    return args


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    """Model and tokenizer.

    Raises:
        InterlockingError: no model there, no such exit, or no tokenizer.
    """
    if args.checkpoint is not None or Path(args.model).exists():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoModelForCausalLM

    from models.config import load_config
    from models.tokenizer import load_tokenizer

    if args.checkpoint is not None:
        from models.exits.exits import Exits

        exits = Exits(args.checkpoint)
        model, tokenizer = exits.to_hugging_face(args.exit), exits.checkpoint.tokenizer
        if tokenizer is None:
            raise InterlockingError(f"{exits.folder} has no tokenizer, nor has the data it was trained on.")
    else:
        tokenizer = args.model
        if Path(args.model).exists() and not (Path(args.model) / "config.json").exists():
            raise InterlockingError(f"{args.model} is no exported model: run scripts/convert_hf.py export first.")
        try:
            config = load_config(args.model)
            model = AutoModelForCausalLM.from_pretrained(args.model, config=config, trust_remote_code=False)
        except InterlockingError:
            raise
        except Exception as error:  # damaged files raise many kinds
            raise InterlockingError(f"no model in {args.model}: {first_line(error)}") from error
    return model.eval().to(args.device), load_tokenizer(tokenizer)


def encode(tokenizer: Any, args: argparse.Namespace) -> Any:
    """The prompt as tensors."""
    if not args.chat:
        return tokenizer(args.prompt, return_tensors="pt", return_token_type_ids=False)
    if tokenizer.chat_template is None:
        raise InterlockingError("--chat: the tokenizer has no chat template.")
    messages = [{"role": "user", "content": args.prompt}]
    options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    return tokenizer.apply_chat_template(messages, **options)


def check(args: argparse.Namespace) -> None:
    """What can be told before a model is loaded.

    Raises:
        InterlockingError: a number out of its range, or a device that is not there.
    """
    from models.devices import check_device

    if args.tokens < 1:
        raise InterlockingError(f"--tokens is {args.tokens}: give at least 1.")
    if args.temperature < 0:
        raise InterlockingError(f"--temperature is {args.temperature:g}: give 0 (greedy) or more.")
    check_device(args.device)


def main(phase: cli.SameOnAllRanks) -> None:
    """Load, sample, print."""
    args = parse_arguments()
    cli.quiet()
    import torch

    check(args)
    torch.manual_seed(args.seed)
    model, tokenizer = load(args)
    inputs = encode(tokenizer, args).to(args.device)
    if inputs["input_ids"].shape[1] == 0:
        raise InterlockingError(f"--prompt {args.prompt!r} has no tokens to continue: give some text.")
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature > 0 else {"do_sample": False}
    output = model.generate(**inputs, max_new_tokens=args.tokens, pad_token_id=tokenizer.eos_token_id, **sampling)[0]
    start = inputs["input_ids"].shape[1] if args.chat else 0
    print(tokenizer.decode(output[start:], skip_special_tokens=True))


if __name__ == "__main__":
    cli.run(main)
