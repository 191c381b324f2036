"""What runs reached, beside the time that their schedules need on a device for each stage.

See --help, and ``ibp_deepspeed/commands/compare_runs.py``.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ibp_deepspeed.commands.compare_runs import run

if __name__ == "__main__":
    run()
