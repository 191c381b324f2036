"""Continue text with a trained model, from an export or a checkpoint, from any exit.

    python scripts/generate.py --model runs/first/hf --prompt "def main("
    python scripts/generate.py --checkpoint runs/first/checkpoint --exit 2 --prompt "def main("
    python scripts/generate.py --checkpoint runs/first/checkpoint --draft-exit 1 --prompt "def main("

With a draft, a smaller exit proposes tokens and the model checks several at once: greedy decoding's text, in fewer
passes of the model. It is then decoded again without the draft, and standard error says what the draft brought.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

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
    draft = parser.add_mutually_exclusive_group()
    draft.add_argument(
        "--draft-exit", type=int, metavar="K", help="with --checkpoint: draft with exit K (default: none)"
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
    args = parser.parse_args()
    if args.exit is not None and args.checkpoint is None:
        parser.error("--exit needs --checkpoint")
    if args.draft_exit is not None and args.checkpoint is None:
        parser.error("--draft-exit needs --checkpoint; an export is given as --draft-model")
    if args.draft_model is not None and args.model is None:
        parser.error("--draft-model needs --model; a checkpoint's own exits are --draft-exit")
    return args


def load(args: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Model, draft (None without one) and tokenizer.

    Raises:
        InterlockingError: no model there, no such exit, or no tokenizer.
    """
    from ibp_deepspeed.models.tokenizer import load_tokenizer

    draft = None
    if args.checkpoint is not None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        from ibp_deepspeed.models.exits.exits import Exits

        exits = Exits(args.checkpoint)
        last, tokenizer = args.exit or len(exits), exits.checkpoint.tokenizer
        if tokenizer is None:
            raise InterlockingError(f"{exits.folder} has no tokenizer, nor has the data it was trained on.")
        if args.draft_exit is not None:
            exits.check(args.draft_exit)
            if args.draft_exit >= last:
                raise InterlockingError(f"--draft-exit {args.draft_exit} drafts for exit {last}: give a smaller one.")
            draft = exits.to_hugging_face(args.draft_exit)
        model = exits.to_hugging_face(last)
    else:
        model, tokenizer = from_folder(args.model), args.model
        draft = None if args.draft_model is None else from_folder(args.draft_model)
    ready = [None if part is None else part.eval().to(args.device) for part in (model, draft)]
    return *ready, load_tokenizer(tokenizer)


def from_folder(folder: str) -> Any:
    """The model in a Hugging Face folder, or of a name on the hub.

    Raises:
        InterlockingError: there is none, or it is damaged.
    """
    if Path(folder).exists():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoModelForCausalLM

    from ibp_deepspeed.models.config import load_config

    if Path(folder).exists() and not (Path(folder) / "config.json").exists():
        raise InterlockingError(f"{folder} is no exported model: run scripts/convert_hf.py export first.")
    try:
        return AutoModelForCausalLM.from_pretrained(folder, config=load_config(folder), trust_remote_code=False)
    except InterlockingError:
        raise
    except Exception as error:  # damaged files raise many kinds
        raise InterlockingError(f"no model in {folder}: {first_line(error)}") from error


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

    check(args)
    torch.manual_seed(args.seed)
    model, draft, tokenizer = load(args)
    inputs = encode(tokenizer, args).to(args.device)
    if inputs["input_ids"].shape[1] == 0:
        raise InterlockingError(f"--prompt {args.prompt!r} has no tokens to continue: give some text.")
    prompt = inputs["input_ids"][0].tolist() if not args.chat else []
    if draft is None:
        new = sampled(model, inputs, args, pad_token_id=tokenizer.eos_token_id)
        report = None
    else:
        new, report = drafted(model, draft, inputs, args, pad_token_id=tokenizer.eos_token_id)
    print(tokenizer.decode([*prompt, *new], skip_special_tokens=True))
    if report is not None:
        print(report, file=sys.stderr)


def sampled(model: Any, inputs: Any, args: argparse.Namespace, **options: Any) -> list[int]:
    """New tokens."""
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature > 0 else {"do_sample": False}
    output = model.generate(**inputs, max_new_tokens=args.tokens, **sampling, **options)[0]
    return output[inputs["input_ids"].shape[1] :].tolist()


def drafted(model: Any, draft: Any, inputs: Any, args: argparse.Namespace, **options: Any) -> tuple[list[int], str]:
    """New tokens, and what the draft brought."""
    from ibp_deepspeed.commands.inference.drafting import compare, report
    from ibp_deepspeed.models.exits.decoding import assisted, greedy

    found, plain = compare(
        lambda tokens: assisted(model, draft, inputs, max_new_tokens=tokens, **options),
        lambda tokens: greedy(model, inputs, max_new_tokens=tokens, **options),
        args.tokens,
    )
    name = args.draft_model if args.draft_exit is None else f"draft by exit {args.draft_exit}"
    return found.tokens.tolist(), report(name, found, plain)


def run() -> None:
    """The command line."""
    cli.run(main)


if __name__ == "__main__":
    run()
