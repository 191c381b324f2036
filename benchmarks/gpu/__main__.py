"""One part of the acceptance in this process: ``python -m benchmarks.gpu PART --out FILE [--small]``."""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from benchmarks.gpu import records
from benchmarks.gpu.parts import NotRun, Part, all_parts
from benchmarks.gpu.records import Record
from benchmarks.speed.harness import machine
from ibp_deepspeed.errors import first_line


def main() -> int:
    """Run, write the record, say with the exit code whether it failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", metavar="PART", help="its name, as gpu_acceptance.py prints it")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="record to write")
    parser.add_argument("--small", action="store_true", help="tiny shapes, also on CPU")
    args = parser.parse_args()
    record = run(args.part, all_parts(args.small)[args.part], args.small)
    records.write(args.out, record)
    return int(record["status"] == records.FAILED)


def run(name: str, part: Part, small: bool) -> Record:
    """The record of a part, whatever happens in it."""
    began = time.perf_counter()
    rows: list[dict[str, object]] = []
    try:
        rows = part.module.run(small, **part.arguments)
        status, reason = records.outcome(rows)
    except NotRun as why:
        status, reason = records.NOT_RUN, str(why)
    except Exception as error:  # anything: the other parts go on
        traceback.print_exc()
        status, reason = records.FAILED, _in_words(error)
    seconds = round(time.perf_counter() - began, 1)
    about = {"part": name, "status": status, "reason": reason, "seconds": seconds, "small": small}
    return {**about, "machine": machine(), "rows": rows}


def _in_words(error: Exception) -> str:
    if isinstance(error, ChildFailedError):
        rank, failure = error.get_first_failure()
        said: object = failure.message  # text, or what the process's exception handler wrote
        return f"rank {rank}: {first_line(said['message'] if isinstance(said, dict) else said)}"
    return f"{type(error).__name__}: {first_line(error)}"


if __name__ == "__main__":
    sys.exit(main())
