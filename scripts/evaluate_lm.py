"""Perplexity of every exit of a trained model on held-out text, and how far each can be believed, in one process.

See --help, and ``ibp_deepspeed/commands/evaluate_lm.py``.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ibp_deepspeed.commands.evaluate_lm import run

if __name__ == "__main__":
    run()
