"""Where the time of traced batches went: bubble, waits by cause, overlap, beside the schedule's prediction.

See --help, and ``ibp_deepspeed/commands/trace_report.py``.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ibp_deepspeed.commands.trace_report import run

if __name__ == "__main__":
    run()
