"""A device that is full while a training writes: one sentence, and nothing of before is lost."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ibp_deepspeed.checkpoint.store import checked
from tests.commands import ranks
from tests.scripts.settings import SMALL

KIB_OF_A_CHECKPOINT = 12_500  # of SMALL, with AdamW's moments and two heads


@pytest.fixture
def small_device(tmp_path: Path) -> Iterator[Path]:
    """A file system in memory on which one checkpoint has room, but not two."""
    place = tmp_path / "device"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={KIB_OF_A_CHECKPOINT * 3 // 2}k", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_device_is_one_sentence(small_device: Path, config: Path, data: Path) -> None:
    """The first checkpoint is whole, the second has no room; when there is, the run goes on from the first."""
    words = ("--deepspeed_config", config, "--data", data, "--output", small_device / "run", *SMALL)
    more = ("--save-interval", 2, "--steps", 4, "--keep", 1, "--eval-micro-batches", 0)
    done = ranks(2, "train_lm.py", *words, *more)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert re.search(r"can't write the checkpoint .*global_step4: .* \(is the device full\?\)\.$", said), said
    checkpoints = small_device / "run" / "checkpoint"
    assert (checkpoints / "latest").read_text() == "global_step2" and checked(checkpoints / "global_step2") is not None
    subprocess.run(["mount", "-o", "remount,size=100m", small_device], check=True)
    done = ranks(2, "train_lm.py", *words, *more, "--resume")
    assert done.returncode == 0 and (checkpoints / "latest").read_text() == "global_step4", done.stderr
    assert sorted(path.name for path in checkpoints.iterdir()) == ["global_step4", "latest"]
