"""Checkpoints are whole or not there, whatever stops their writing."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from ibp_deepspeed.checkpoint import layout, store
from ibp_deepspeed.errors import CheckpointError
from ibp_deepspeed.models.errors import ModelError
from ibp_deepspeed.models.runs.description import Description
from ibp_deepspeed.models.runs.resume import checkpoint_to_resume
from tests.single_process.test_virtual_pipeline import make
from tests.toys import micro_batches


def write(folder: Path, tag: str, text: str) -> None:
    """What a save does, with one file."""
    store.clear(folder, tag)
    made = folder / layout.partial(tag)
    made.mkdir(parents=True)
    (made / "layer.pt").write_text(text)
    store.publish(folder, tag)


def newest(folder: Path) -> str:
    """What a run that goes on would read."""
    store.undo_interrupted_replacements(folder)
    return (folder / (folder / "latest").read_text() / "layer.pt").read_text()


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Have the process "killed" at its n-th call that changes names or removes files."""

    def after(calls: int) -> None:
        left = [calls]

        def counted(function: Any) -> Any:
            def run(*args: Any, **kwargs: Any) -> Any:
                left[0] -= 1
                if left[0] < 0:
                    raise KeyboardInterrupt
                return function(*args, **kwargs)

            return run

        for owner, name in ((Path, "rename"), (os, "replace"), (os, "fsync"), (shutil, "rmtree")):
            monkeypatch.setattr(owner, name, counted(getattr(owner, name)))

    return after


@pytest.mark.parametrize("calls", range(12))
@pytest.mark.parametrize("tag", ["global_step2", "global_step1"])  # another name, the same name
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(
    tmp_path: Path, killed: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, calls: int, tag: str
) -> None:
    write(tmp_path, "global_step1", "before")
    with monkeypatch.context():
        killed(calls)
        try:
            write(tmp_path, tag, "after")
            done = True
        except KeyboardInterrupt:
            done = False
    monkeypatch.undo()
    assert newest(tmp_path) == "after" if done else newest(tmp_path) in ("before", "after")
    write(tmp_path, tag, "again")
    assert newest(tmp_path) == "again"
    left = {"global_step1", tag, "latest"}
    assert {path.name for path in tmp_path.iterdir()} - {"latest.new"} == left


def test_the_newest_are_kept_and_the_one_that_latest_names(tmp_path: Path) -> None:
    for batches in (2, 10, 9, 1):
        write(tmp_path, f"global_step{batches}", str(batches))
    (tmp_path / "mine").mkdir()
    assert store.keep_newest(tmp_path, 2) == ["global_step2"]
    kept = {"global_step1", "global_step9", "global_step10", "mine", "latest"}
    assert {path.name for path in tmp_path.iterdir()} == kept


@contextmanager
def full_device() -> Iterator[None]:
    """No file may be longer than a kilobyte. Only around the call that is tested: pytest's own report may be a file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_device_is_one_sentence_and_nothing_is_lost(tmp_path: Path) -> None:
    pipeline = make()
    pipeline.save_checkpoint(tmp_path, "global_step1", files={"note.txt": "whole"})
    with full_device(), pytest.raises(CheckpointError, match="can't write the checkpoint .*global_step2"):
        pipeline.save_checkpoint(tmp_path, "global_step2")
    assert (tmp_path / "latest").read_text() == "global_step1" and not (tmp_path / "global_step2").exists()
    pipeline.load_checkpoint(tmp_path)
    assert (tmp_path / "global_step1" / "note.txt").read_text() == "whole"


def test_random_states_come_back(tmp_path: Path) -> None:
    store.save_random_state(tmp_path, 0)
    drawn = torch.rand(3)
    store.load_random_state(tmp_path, 0, 2)  # of another number of ranks
    assert not torch.equal(torch.rand(3), drawn)
    store.load_random_state(tmp_path, 0, 1)
    assert torch.equal(torch.rand(3), drawn)


def description(**changes: Any) -> Description:
    values: dict[str, Any] = {"model": {"model_type": "llama", "hidden_size": 8}, "bounds": [0, 2, 4]}
    values |= {"interlocking": {}, "sequence_length": 32, "data": "data"}
    return Description(**(values | changes))


def test_what_a_training_goes_on_from(tmp_path: Path) -> None:
    planned = description()
    assert checkpoint_to_resume(tmp_path, None, planned, 9) is None
    assert checkpoint_to_resume(tmp_path, "auto", planned, 9) is None
    write(tmp_path, "global_step4", "")
    for name, text in planned.files().items():
        (tmp_path / "global_step4" / name).write_text(text)
    for wanted in ("auto", "global_step4"):
        found = checkpoint_to_resume(tmp_path, wanted, planned, 9)
        assert found is not None and found.tag == "global_step4"
    for wanted, other, steps, said in (
        ("global_step3", planned, 9, "has no checkpoint global_step3, but global_step4"),
        ("auto", planned, 4, "has 4 batches of 4: all are trained, more with a larger --steps"),
        ("auto", description(sequence_length=64), 9, "trained with sequence-length 32, not 64"),
        ("auto", description(model={"model_type": "llama", "hidden_size": 9}), 9, "model's hidden_size 8, not 9"),
    ):
        with pytest.raises(ModelError, match=said):
            checkpoint_to_resume(tmp_path, wanted, other, steps)


def damaged(folder: Path, name: str, change: Callable[[Path], object]) -> Path:
    """A copy of the checkpoints with one file changed."""
    copy = folder.with_name("damaged")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    change(copy / "global_step1" / name)
    return copy


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def test_damage_is_named_before_anything_is_read(tmp_path: Path) -> None:
    pipeline, folder = make(), tmp_path / "whole"
    pipeline.save_checkpoint(folder, "global_step0", files={"tokenizer/tokenizer.json": "{}", **description().files()})
    pipeline.train_batch(iter(micro_batches(0, 1)))
    pipeline.save_checkpoint(folder, "global_step1", files={"tokenizer/tokenizer.json": "{}", **description().files()})
    layer, stage = "layer_02-model_states.pt", "mp_rank_01_model_states.pt"
    before = pipeline.train_batch(iter(micro_batches(1, 1)))
    for name, change, said in (
        (layer, halve, r"layer_02-model_states.pt has [\d,]+ bytes, it was written with [\d,]+"),
        (stage, Path.unlink, f"{stage} is missing. Resume from another checkpoint: complete are global_step0."),
        ("tokenizer/tokenizer.json", Path.unlink, "tokenizer/tokenizer.json is missing"),
        ("contents.json", halve, "contents.json is damaged: .* complete are global_step0"),
    ):
        copy = damaged(folder, name, change)
        for load in (
            lambda copy=copy: pipeline.load_checkpoint(copy),
            lambda copy=copy: checkpoint_to_resume(copy, "auto", description(), 9),
        ):
            with pytest.raises(CheckpointError, match=said) as caught:
                load()
            assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="has no checkpoints"):
        pipeline.load_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="there is no checkpoint .*global_step7"):
        pipeline.load_checkpoint(folder, "global_step7")
    pipeline.load_checkpoint(folder)  # all the failures have left it as it was
    assert torch.equal(pipeline.train_batch(iter(micro_batches(1, 1))), before)


def test_links_among_checkpoints_are_neither_followed_nor_removed_with_what_they_name(tmp_path: Path) -> None:
    """They may name another run's."""
    pipeline, other, folder = make(), tmp_path / "other", tmp_path / "mine"
    files = description().files()
    pipeline.save_checkpoint(other, "global_step1", files=files)
    folder.mkdir()
    (folder / "global_step1").symlink_to(other / "global_step1")
    (folder / "global_step2.partial").symlink_to(other / "global_step1")
    (folder / "global_step3.replaced").symlink_to(other / "global_step1")
    (folder / "global_step3").mkdir()
    (folder / "latest").write_text("global_step1")
    for load in (
        lambda: pipeline.load_checkpoint(folder),
        lambda: pipeline.load_checkpoint(folder, "global_step1"),
        lambda: checkpoint_to_resume(folder, "auto", description(), 9),
    ):
        with pytest.raises(CheckpointError, match="mine/global_step1 is a symbolic link, which is not followed"):
            load()
    for tag in ("global_step2", "global_step4", "global_step5"):
        pipeline.save_checkpoint(folder, tag, files=files)
    store.keep_newest(folder, 2)
    assert {path.name for path in folder.iterdir()} == {"global_step1", "global_step4", "global_step5", "latest"}
    pipeline.save_checkpoint(folder, "global_step1", files=files)  # takes the link's place
    assert not (folder / "global_step1").is_symlink() and not list(folder.glob("*.replaced"))
    pipeline.load_checkpoint(other, "global_step1")
    layer = folder / "global_step5" / "layer_02-model_states.pt"
    layer.unlink()
    layer.symlink_to(other / "global_step1" / layer.name)
    with pytest.raises(CheckpointError, match="'layer_02-model_states.pt' is a link that leads out"):
        pipeline.load_checkpoint(folder, "global_step5")
    (folder / "latest").unlink()
    (folder / "latest").symlink_to(other / "latest")
    with pytest.raises(CheckpointError, match="mine/latest is a symbolic link"):
        pipeline.load_checkpoint(folder)


def test_a_checkpoint_of_an_earlier_version_loads(tmp_path: Path) -> None:
    """Without a list of its contents nothing can be compared, and unreadable files are named when they are read."""
    pipeline = make()
    pipeline.save_checkpoint(tmp_path / "whole", "global_step1")
    old = damaged(tmp_path / "whole", "contents.json", Path.unlink)
    pipeline.load_checkpoint(old)
    halve(old / "global_step1" / "layer_02-model_states.pt")
    with pytest.raises(CheckpointError, match="layer_02-model_states.pt can't be read"):
        pipeline.load_checkpoint(old)
