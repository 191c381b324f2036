"""Prepares text for training: splits it by document, trains or loads a tokenizer, writes packed tokens.

See --help, and ``ibp_deepspeed/commands/prepare_data.py``.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ibp_deepspeed.commands.prepare_data import run

if __name__ == "__main__":
    run()
