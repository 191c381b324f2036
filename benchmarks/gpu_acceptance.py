"""Whether this machine's GPUs train as they should: every part in a process of its own, under ten minutes on one GPU.

    python benchmarks/gpu_acceptance.py                        # all parts, on the GPUs that are there
    python benchmarks/gpu_acceptance.py --device cpu --small   # the same code at tiny shapes, a few minutes

A part's record, PART.json, is written under --out when it has ended, and table.md is made of them. A second start runs
what is missing or has failed. What was measured stays until it is measured again: a rerun that fails or can't run is
noted beside it. The exit code is 1 if a part has failed.

Parts: environment and versions; 2 and 4 processes on one GPU, and NCCL between as many GPUs as there are, against the
one-process pipeline; a decoder layer and a head of four models; a head with and without a fused kernel; a short study
of three strategies.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ibp_deepspeed import cli
from ibp_deepspeed.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
LOG_LINES = 30
CPU_FACTOR = 6  # times its limit is what a part may take on the CPU, whose cores its processes share with others


def main(phase: cli.SameOnAllRanks) -> None:
    """Run the parts that are due, one after the other."""
    args = parse_arguments()
    cli.quiet()
    environment = environment_for(args.device)
    folder = args.out or ROOT / "benchmarks/results/gpu" / folder_name(args.device, args.small)
    from benchmarks.gpu import records
    from benchmarks.gpu.parts import all_parts, chosen
    from benchmarks.gpu.table import page

    every = all_parts(args.small)
    wanted = chosen(every, args.parts or list(every))
    again = chosen(every, args.again)
    failed = False
    for name, part in {**wanted, **again}.items():
        record = records.read(folder, name)
        if record is None or records.has_failed(record) or record["small"] != args.small or name in again:
            print(f"{name} …", flush=True)
            record = run_part(
                name, part.limit * (CPU_FACTOR if args.device == "cpu" else 1), folder, environment, args.small
            )
        print(f"{name}: {records.in_words(record)} ({records.latest(record)['seconds']:.0f} s)", flush=True)
        failed |= records.has_failed(record)
    text = page(folder, every)
    (folder / "table.md").write_text(text, encoding="utf-8")
    print(f"\n{text}\nrecords in {folder}")
    if failed:
        sys.exit(1)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=["cuda", "cpu"], default="cuda", help="cpu hides all GPUs (default: %(default)s)")
    add("--small", action="store_true", help="tiny shapes")
    add("--parts", nargs="+", metavar="PART", help="these only, by name or its beginning (default: all)")
    add(
        "--again",
        nargs="+",
        default=[],
        metavar="PART",
        help="run these although their records are there (default: none)",
    )
    add("--out", type=Path, metavar="FOLDER", help="of the records (default: benchmarks/results/gpu/<card>)")
    return parser.parse_args()


def environment_for(device: str) -> dict[str, str]:
    """What the processes of the parts see: on cpu no GPU at all."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ} if device == "cpu" else dict(os.environ)
    return environment | ({"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})


def folder_name(device: str, small: bool) -> str:
    """Of the card, as words for a path.

    Raises:
        ConfigError: no card.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("torch sees no GPU here: give --device cpu --small to try the same on the CPU.")
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return re.sub(r"\W+", "-", name.lower()) + ("-small" if small else "")


def run_part(name: str, limit: float, folder: Path, environment: Mapping[str, str], small: bool) -> dict[str, object]:
    """Run a part in a process of its own, end all that it started, and return what is its record from now on."""
    from benchmarks.gpu import records

    began = time.monotonic()
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log,
        tempfile.TemporaryDirectory() as aside,
    ):
        path = records.path_of(Path(aside), name)
        command = [sys.executable, "-m", "benchmarks.gpu", name, "--out", str(path), *["--small"] * small]
        code = run_group(command, limit, environment, log.fileno())
        record = records.read(Path(aside), name)
        if record is None:
            ended = f"ran past its limit of {limit:.0f} s" if code is None else f"ended with code {code}"
            seconds = round(time.monotonic() - began, 1)
            record = {"part": name, "status": records.FAILED, "reason": ended, "seconds": seconds}
            record |= {"small": small, "machine": None, "rows": []}
        if record["status"] == records.FAILED:
            log.seek(0)
            record["log"] = log.read().replace(f"{ROOT}/", "").splitlines()[-LOG_LINES:]
    record = records.after(records.read(folder, name), record)
    records.write(records.path_of(folder, name), record)
    return record


def run_group(command: list[str], limit: float, environment: Mapping[str, str], output: int) -> int | None:
    """The exit code of a command, None if it was ended at its limit; nothing that it started outlives it."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=dict(environment), stdout=output, stderr=output, start_new_session=True
    )
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):  # all have ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


if __name__ == "__main__":
    cli.run(main)
