"""Loss and accuracy of every exit of a trained image classifier; and its export to Hugging Face.

See --help, and ``ibp_deepspeed/commands/evaluate_vision.py``.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ibp_deepspeed.commands.evaluate_vision import run

if __name__ == "__main__":
    run()
