"""train_lm.py with faults: the first argument is a JSON list of them, the others are train_lm.py's.

A fault has the ``rank`` that it is for, and the ``restart`` (of torchrun's, from 0; left out: any). It is an ``act`` of
:mod:`tests.faults` before the first instruction with the other attributes of a ``Moment``; or a ``point`` of
:mod:`tests.crash_points`, by number or in words, among those of the folder of checkpoints, at which the rank is killed.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ibp_deepspeed.commands.training import start as starting
from tests import crash_points
from tests.faults import ACTS, at


def main() -> None:
    """Install what is for this process, and train."""
    faults, words = json.loads(sys.argv[1]), sys.argv[2:]
    place = {"rank": int(os.environ["RANK"]), "restart": int(os.environ["TORCHELASTIC_RESTART_COUNT"])}
    for fault in faults:
        if all(fault.pop(name, value) == value for name, value in place.items()):
            _install(fault, words)
    sys.argv = [str(Path(starting.__file__).parents[1] / "train_lm.py"), *words]
    runpy.run_path(sys.argv[0], run_name="__main__")


def _install(fault: dict[str, Any], words: list[str]) -> None:
    if "point" in fault:
        parser = argparse.ArgumentParser()
        parser.add_argument("--output", type=Path, required=True)
        output = parser.parse_known_args(words)[0].output
        crash_points.watch(output / "checkpoint", crash_points.killer(fault["point"]))
        return
    act, start = ACTS[fault.pop("act")], starting.start

    def faulty(*given: Any) -> Any:
        engine: Any = start(*given)
        engine.before_instruction = at(act, **fault)
        return engine

    mock.patch.object(starting, "start", faulty).start()


if __name__ == "__main__":
    main()
