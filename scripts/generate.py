"""Continue text with a trained model, from an export or a checkpoint, from any exit.

See --help, and ``ibp_deepspeed/commands/generate.py``.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ibp_deepspeed.commands.generate import run

if __name__ == "__main__":
    run()
