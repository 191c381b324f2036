"""Write a trained model as a Hugging Face folder.

python scripts/convert_hf.py export --checkpoint runs/first/checkpoint --out runs/first/hf
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ibp_deepspeed import entry


def export(checkpoint: Path, out: Path) -> None:
    """Assemble, save beside the target, reload and compare, then rename.

    Raises:
        ModelError: the target exists, or the folder does not load as it was saved.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from models import ModelError
    from models.exits import Exits

    if out.exists():
        raise ModelError(f"{out} exists already: give another --out or remove it.")
    exits = Exits(checkpoint)
    model = exits.to_hugging_face()
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        model.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(str(Path(exits.description.data) / "tokenizer")).save_pretrained(temporary)
        reloaded, info = AutoModelForCausalLM.from_pretrained(temporary, output_loading_info=True)
        problems = {kind: names for kind, names in info.items() if names}
        ids = torch.arange(min(32, model.config.vocab_size))[None]
        with torch.no_grad():
            difference = (model(ids).logits - reloaded.eval()(ids).logits).abs().max().item()
        if problems or difference > 0:
            raise ModelError(f"the export does not load as it was saved: {problems or difference}.")
        temporary.chmod(0o755)
        os.rename(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def main(phase: entry.SameOnAllRanks) -> None:
    """Parse and run a command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("export", help="checkpoint → folder for from_pretrained, without the heads")
    command.add_argument("--checkpoint", required=True, type=Path, metavar="DIR", help="folder written by train_lm.py")
    command.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write")
    args = parser.parse_args()
    export(args.checkpoint, args.out)
    print(f"{args.out} loads with AutoModelForCausalLM.from_pretrained, every key and logit the same")


if __name__ == "__main__":
    entry.run(main)
