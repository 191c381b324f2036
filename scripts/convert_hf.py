"""Between Hugging Face folders and checkpoints.

See --help, and ``ibp_deepspeed/commands/convert_hf.py``.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ibp_deepspeed.commands.convert_hf import run

if __name__ == "__main__":
    run()
