"""What each way to train a model on a pipeline costs, before it starts: time, memory, messages, extra work.

See --help, and ``ibp_deepspeed/commands/plan.py``.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ibp_deepspeed.commands.plan import run

if __name__ == "__main__":
    run()
