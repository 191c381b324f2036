"""Continue text with a trained model, from an export or a checkpoint, from any exit.

    python scripts/generate.py --model runs/first/hf --prompt "def main("
    python scripts/generate.py --checkpoint runs/first/checkpoint --exit 2 --prompt "def main("
    python scripts/generate.py --checkpoint runs/first/checkpoint --draft-exit 1 --prompt "def main("
    python scripts/generate.py --model runs/first/family --exit 3 --draft-exit 1 --prompt "def main("

With a draft, a smaller exit proposes tokens and the model checks several at once: greedy decoding's text, in fewer
passes of the model. --draft-exit drafts with the model's own first layers, whose states and cache the check uses
again; --draft-model is transformers' assisted generation with another folder. It is then decoded again without the
draft, and standard error says what the draft brought.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ibp_deepspeed import cli
from ibp_deepspeed.errors import InterlockingError

if TYPE_CHECKING:
    from ibp_deepspeed.commands.inference.loading import Loaded


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = cli.parser(__doc__)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", metavar="DIR", help="Hugging Face folder of convert_hf.py export, or a family's")
    source.add_argument("--checkpoint", type=Path, metavar="DIR", help="checkpoint folder written by train_lm.py")
    add("--exit", type=int, metavar="K", help="of a checkpoint or family: the exit behind K stages (default: the last)")
    draft = parser.add_mutually_exclusive_group()
    draft.add_argument(
        "--draft-exit", type=int, metavar="K", help="of a checkpoint or family: draft with exit K (default: none)"
    )
    draft.add_argument("--draft-model", metavar="DIR", help="with --model: draft with this folder (default: none)")
    add("--prompt", default="import ", help='text to continue (default: "import ")')
    add("--chat", action="store_true", help="the prompt is a user's message, put into the tokenizer's chat template")
    add("--tokens", type=int, default=80, metavar="N", help="most new tokens (default: %(default)s)")
    add(
        "--temperature",
        type=float,
        metavar="T",
        help="of the draws, 0: always the likeliest token (default: 0.8, with a draft 0)",
    )
    add("--seed", type=int, default=0, metavar="N", help="of the draws (default: %(default)s)")
    add("--device", default="cpu", help="torch device (default: %(default)s)")
    add(
        "--memory-gib",
        type=float,
        metavar="GIB",
        help="an export that takes more than half of it stays in its files in part (default: what is free)",
    )
    args = parser.parse_args()
    if args.draft_model is not None and args.model is None:
        parser.error("--draft-model needs --model; a checkpoint's own exits are --draft-exit")
    return args


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
    from ibp_deepspeed.models.devices import check_device
    from ibp_deepspeed.models.exits.memory import check_memory

    check_memory(args.memory_gib)
    if args.tokens < 1:
        raise InterlockingError(f"--tokens is {args.tokens}: give at least 1.")
    drafting = args.draft_exit is not None or args.draft_model is not None
    if args.temperature is None:
        args.temperature = 0.0 if drafting else 0.8
    if drafting and args.temperature > 0:
        raise InterlockingError(f"--temperature is {args.temperature:g}: a draft is for greedy decoding, leave it out.")
    if args.temperature < 0:
        raise InterlockingError(f"--temperature is {args.temperature:g}: give 0 (greedy) or more.")
    check_device(args.device)


def main(phase: cli.SameOnAllRanks) -> None:
    """Load, sample, print."""
    args = parse_arguments()
    cli.quiet()
    import torch

    from ibp_deepspeed.commands.inference.loading import load

    check(args)
    torch.manual_seed(args.seed)
    loaded = load(args)
    tokenizer = loaded.tokenizer
    inputs = encode(tokenizer, args).to(args.device)
    if inputs["input_ids"].shape[1] == 0:
        raise InterlockingError(f"--prompt {args.prompt!r} has no tokens to continue: give some text.")
    prompt = inputs["input_ids"][0].tolist() if not args.chat else []
    if loaded.draft is None:
        new = sampled(loaded.model, inputs, args, pad_token_id=tokenizer.eos_token_id)
        report = None
    else:
        new, report = drafted(loaded, inputs, args)
    print(tokenizer.decode([*prompt, *new], skip_special_tokens=True))
    if report is not None:
        print(report, file=sys.stderr)


def sampled(model: Any, inputs: Any, args: argparse.Namespace, **options: Any) -> list[int]:
    """New tokens."""
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature > 0 else {"do_sample": False}
    output = model.generate(**inputs, max_new_tokens=args.tokens, **sampling, **options)[0]
    return output[inputs["input_ids"].shape[1] :].tolist()


def drafted(loaded: Loaded, inputs: Any, args: argparse.Namespace) -> tuple[list[int], str]:
    """New tokens, and what the draft brought."""
    from ibp_deepspeed.commands.inference.drafting import by_exit, by_model, compare, report

    ways = by_model(loaded, inputs) if loaded.shared is None else by_exit(loaded, inputs)
    found, plain = compare(*ways, args.tokens)
    name = args.draft_model if args.draft_exit is None else f"draft by exit {args.draft_exit}"
    return found.tokens.tolist(), report(name, found, plain)


def run() -> None:
    """The command line."""
    cli.run(main)


if __name__ == "__main__":
    run()
