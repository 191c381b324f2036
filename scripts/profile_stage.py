"""What your model's layers, its heads and its messages take on the device at hand, for plan.py and train_lm.py.

See --help, and ``ibp_deepspeed/commands/profile_stage.py``.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ibp_deepspeed.commands.profile_stage import run

if __name__ == "__main__":
    run()
