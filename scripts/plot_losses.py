"""Draw the losses of all exits from a run's history.

See --help, and ``ibp_deepspeed/commands/plot_losses.py``.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ibp_deepspeed.commands.plot_losses import run

if __name__ == "__main__":
    run()
