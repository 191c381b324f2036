"""Train an image classifier with interlocking backpropagation.

See --help, and ``ibp_deepspeed/commands/train_vision.py``.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ibp_deepspeed.commands.train_vision import run

if __name__ == "__main__":
    run()
