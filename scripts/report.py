"""Make the page of a run, finished, running or failed: curves, where each stage's time went, what was predicted.

See --help, and ``ibp_deepspeed/commands/report.py``.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ibp_deepspeed.commands.report import run

if __name__ == "__main__":
    run()
