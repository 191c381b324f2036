"""Tasks of EleutherAI's evaluation harness on every exit of a run.

See --help, and ``ibp_deepspeed/commands/evaluate_tasks.py``.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ibp_deepspeed.commands.evaluate_tasks import run

if __name__ == "__main__":
    run()
