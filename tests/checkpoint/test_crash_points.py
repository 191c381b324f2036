"""A process that is killed before any operation on the folder of checkpoints leaves a whole one, and room to go on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ibp_deepspeed.checkpoint import layout, store
from tests.crash_points import killer, watch
from tests.forks import end, fork
from tests.single_process.test_virtual_pipeline import make
from tests.toys import micro_batches

FILES = {"note.txt": "whole", "tokenizer/tokenizer.json": "{}"}


def weights(pipeline: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for stage in pipeline.reference.stages for p in stage.parameters()]


def save(pipeline: Any, folder: Path) -> None:
    """As train_lm.py does, keeping one."""
    pipeline.save_checkpoint(folder, files=FILES)
    store.keep_newest(folder, 1)


def forked(act: Callable[[], object]) -> int:
    """In a copy of this process; its exit status. Nothing here has threads."""
    child = os.fork()
    if not child:
        act()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def try_all(root: Path, same_name: bool, full: bool) -> None:
    """Saves after batch 1 and, killed at each point, after batch 2 (or another of the first name); writes the points.

    Without ``full`` the second of two flushes or removals that follow each other is left out: they change as little.
    """
    torch.set_num_threads(1)
    pipeline: Any = make()
    pipeline.train_batch(iter(micro_batches(0, 1)))
    save(pipeline, root / "before")
    saved = {1: weights(pipeline)}
    pipeline.train_batch(iter(micro_batches(1, 1)))
    saved[2] = weights(pipeline)
    tag = layout.tag_of(1 if same_name else 2)

    def again(folder: Path, reached: Callable[[str], None]) -> None:
        watch(folder, reached)
        pipeline.save_checkpoint(folder, tag, files=FILES)
        store.keep_newest(folder, 1)

    points: list[str] = []

    def listed() -> None:
        shutil.copytree(root / "before", root / "listed")
        again(root / "listed", points.append)
        (root / "points.json").write_text(json.dumps(points))

    assert forked(listed) == 0
    points = json.loads((root / "points.json").read_text())
    for number, words in enumerate(points):
        if not full and number and words.split()[0] == points[number - 1].split()[0] in ("fsync", "remove"):
            continue
        folder = root / str(number)
        shutil.copytree(root / "before", folder)
        assert forked(partial(again, folder, killer(number))) == -9, words
        goes_on(pipeline, folder, saved, words)
        shutil.rmtree(folder)


def goes_on(pipeline: Any, folder: Path, saved: dict[int, list[torch.Tensor]], words: str) -> None:
    """What another process finds is whole, is what was saved, and can be followed by more."""

    def check() -> None:
        pipeline.load_checkpoint(folder)
        found = weights(pipeline)
        whole = [all(map(torch.equal, found, before)) for before in saved.values()]
        assert any(whole), f"killed before {words}: neither the weights before nor those after"
        note = (folder / (folder / layout.LATEST).read_text() / "note.txt").read_text()
        assert note == FILES["note.txt"], words
        pipeline.train_batch(iter(micro_batches(2, 1)))
        save(pipeline, folder)
        names = {path.name for path in folder.iterdir()}
        assert len(names) == 2 and layout.LATEST in names, (words, names)

    assert forked(check) == 0, words


def test_a_kill_at_every_point_leaves_a_whole_checkpoint(tmp_path: Path, full: bool) -> None:
    """With the checkpoint's name new, and with one of that name to be replaced."""
    for same_name in (False, True):
        root = tmp_path / str(same_name)
        root.mkdir()
        log = root / "log"
        codes = end([fork(try_all, root, same_name, full, environment=os.environ, stdout=log, stderr=log)], 240)
        assert codes == [0], log.read_text()
        points = json.loads((root / "points.json").read_text())
        tag, verbs = layout.tag_of(1 if same_name else 2), {words.split()[0] for words in points}
        assert {"mkdir", "half", "open", "fsync", "rename", "remove", "rmdir"} == verbs and len(points) > 30, points
        for words in (
            f"rename {tag}.partial {tag}",
            "rename latest.new latest",
            f"half of {tag}.partial/{layout.MANIFEST}",
        ):
            assert words in points, (words, points)
