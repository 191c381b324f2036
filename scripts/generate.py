"""Continue text with an exported model.

python scripts/generate.py --model runs/first/hf --prompt "def main("
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from ibp_deepspeed import entry
from ibp_deepspeed.errors import InterlockingError


def main(phase: entry.SameOnAllRanks) -> None:
    """Load, sample, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, type=Path, metavar="DIR", help="folder written by convert_hf.py export")
    add("--prompt", default="import ", help='text to continue (default: "import ")')
    add("--tokens", type=int, default=80, metavar="N", help="new tokens (default: %(default)s)")
    add("--temperature", type=float, default=0.8, metavar="T", help="0: greedy (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    args = parser.parse_args()
    if not (args.model / "config.json").exists():
        raise InterlockingError(f"{args.model} is no exported model: run scripts/convert_hf.py export first.")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(str(args.model))
    model = AutoModelForCausalLM.from_pretrained(str(args.model)).eval()
    inputs = tokenizer(args.prompt, return_tensors="pt", return_token_type_ids=False)
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature > 0 else {"do_sample": False}
    output = model.generate(**inputs, max_new_tokens=args.tokens, pad_token_id=tokenizer.eos_token_id, **sampling)
    print(tokenizer.decode(output[0], skip_special_tokens=True))


if __name__ == "__main__":
    entry.run(main)
