"""Checkpoints that somebody else may have made: nothing in them runs, and no name in them leads out."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ibp_deepspeed.checkpoint import store
from ibp_deepspeed.checkpoint.manifest import CheckpointManifest
from ibp_deepspeed.checkpoint.tensor_file import OF_DEEPSPEED, load, read
from ibp_deepspeed.config.deepspeed import check_ds_config
from ibp_deepspeed.errors import CheckpointError, ConfigError, InterlockingError
from ibp_deepspeed.models.exits.evaluation import evaluate
from ibp_deepspeed.models.exits.exits import Exits
from ibp_deepspeed.models.runs.checkpoint import Checkpoint
from ibp_deepspeed.models.runs.resume import checkpoint_to_resume
from ibp_deepspeed.models.runs.start import pretrained_start
from tests.bombs import Bomb, little_memory, put_bomb, rewritten
from tests.checkpoint.test_earlier_run import FOLDER, held_out
from tests.checkpoint.test_store import description
from tests.commands import assert_one_sentence, script
from tests.launch import launch
from tests.single_process.test_virtual_pipeline import make
from tests.toys import micro_batches

LOCAL = {"strategy": "pairwise", "mode": "window"}
FEW = {"layer": "layer_*", "stage": "mp_rank_*", "random": "random_states_*"}
"""Files that every rank reads."""
OPTIMIZER = {"optimizer": "*optim_states*"}


def kind(bounds: list[int], other: dict[str, Any], **more: Any) -> dict[str, Any]:
    doors = list({**FEW, **(OPTIMIZER if more.get("zero") or more.get("bf16") else {})}.values())
    return {"bounds": bounds, "other": other, "interlocking": LOCAL, "doors": doors, **more}


KINDS = {
    "zero": kind([0, 4, 8], {"bounds": [0, 3, 8]}, zero=1),
    "bf16, two replicas": kind([0, 8], {"bounds": [0, 4, 8], "replicas": 1}, replicas=2, zero=1, bf16=True),
    "plain": kind([0, 4, 8], {"bounds": [0, 3, 8]}),
    "bf16 without zero": kind([0, 4, 8], {"bounds": [0, 3, 8]}, bf16=True),
    "plain, two replicas": kind([0, 8], {"bounds": [0, 4, 8], "replicas": 1}, replicas=2),
}


def test_no_file_of_an_engine_runs_code(full: bool, tmp_path: Path) -> None:
    """In this shape and in another, each kind of file; and without bombs all load, with no class allowed in vain."""
    kinds = list(KINDS.values())[: None if full else 2]
    cases = [case | {"folder": str(tmp_path / str(number))} for number, case in enumerate(kinds)]
    rows = launch("hostile", 2, cases).check().reports
    for case, *reports in zip(cases, *rows, strict=True):
        for report in reports:
            assert not report["ran"] and len(report["said"]) == 2 * len(case["doors"])
            assert all("holds posix.mkdir, which could run any code" in said for said in report["said"]), report
    classes = {name for row in rows[0] for name in row["classes"]}
    assert classes == {f"{each.__module__}.{each.__name__}" for each in OF_DEEPSPEED}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of a run in one process, whose heads copy the last stage's."""
    folder = tmp_path_factory.mktemp("run") / "checkpoint"
    pipeline = make()
    pipeline.train_batch(iter(micro_batches(0, 1)))
    pipeline.save_checkpoint(folder, "global_step1", files={"tokenizer/tokenizer.json": "{}", **description().files()})
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """One to be changed."""
    return Path(shutil.copytree(whole, tmp_path / "given"))


def doors(folder: Path) -> Iterator[Callable[[], object]]:
    """What reads checkpoints: the pipeline, what a run resumes from, and evaluation, export and generation."""
    yield lambda: make().load_checkpoint(folder)
    yield lambda: checkpoint_to_resume(folder, "auto", description(), 9)
    yield lambda: Checkpoint(folder)


def test_no_file_of_one_process_runs_code(copy: Path, tmp_path: Path) -> None:
    folder, mark = copy / "global_step1", tmp_path / "ran"
    names = [path.name for path in folder.glob("*.pt")]
    assert len(names) >= 8
    manifest = CheckpointManifest.read(folder)
    assert manifest is not None
    for name in names:
        before = (folder / name).read_bytes()
        put_bomb(folder / name, mark)
        CheckpointManifest.write(folder, manifest.shape)
        with pytest.raises(CheckpointError, match=f"{name} holds posix.mkdir, which could run any code"):
            make().load_checkpoint(copy)
        (folder / name).write_bytes(before)
    assert not mark.exists()


def test_evaluation_export_and_generation_run_no_code(tmp_path: Path) -> None:
    """They read layers and heads one by one; so does a training that begins with a checkpoint's weights."""
    given = shutil.copytree(FOLDER / "checkpoint", tmp_path / "given")
    for path in (given / "global_step3").glob("*.pt"):
        put_bomb(path, tmp_path / "ran")
    exits = Exits(given)
    for read_it in (
        lambda: evaluate(exits, held_out(8)),
        lambda: exits.to_hugging_face(1),
        lambda: exits.to_hugging_face(),
        lambda: exits.checkpoint.head_state(2),
        lambda: pretrained_start(str(given), {}, None).weights.layer(1, ["layer.self_attn.q_proj.weight"]),  # type: ignore[union-attr]
    ):
        with pytest.raises(CheckpointError, match="holds posix.mkdir, which could run any code, so it is not read"):
            read_it()
    assert_one_sentence(script("generate.py", "--checkpoint", given), "could run any code, so it is not read")
    assert not (tmp_path / "ran").exists()


def test_a_class_is_trusted_by_name(tmp_path: Path) -> None:
    """The way out that the sentence names."""
    torch.save({"mine": Path("some/where")}, tmp_path / "mine.pt")
    with pytest.raises(CheckpointError, match=r"holds pathlib\.PosixPath, .* torch\.serialization\.add_safe_globals"):
        load(tmp_path / "mine.pt")
    with torch.serialization.safe_globals([type(Path())]):
        assert load(tmp_path / "mine.pt") == {"mine": Path("some/where")}


def test_a_bare_pickle_and_an_old_format_run_no_code_either(tmp_path: Path) -> None:
    path, mark = tmp_path / "state.pt", tmp_path / "ran"
    path.write_bytes(pickle.dumps({"bomb": Bomb(mark)}))
    with pytest.raises(CheckpointError, match="can't be read"):
        read(path)
    torch.save({"bomb": Bomb(mark)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="can't be read"):
        read(path)
    assert not mark.exists()
    torch.save({"weight": torch.ones(3)}, path, _use_new_zipfile_serialization=False)  # as DeepSpeed can be told to
    assert torch.equal(read(path)["weight"], torch.ones(3))
    torch.save([torch.ones(3)], path)
    with pytest.raises(CheckpointError, match="holds a list, not a state dict"):
        read(path)


def test_lengths_that_are_not_there_take_no_memory(tmp_path: Path) -> None:
    """Ten gigabytes: of a tensor that is said to have them, of records that are compressed, of a zeroed byte array."""
    path = tmp_path / "state.pt"

    def longer(name: str, content: bytes) -> bytes:
        return content.replace((2**20).to_bytes(4, "little"), (2**31 - 1).to_bytes(4, "little"))

    for change, zipped, said in (
        (longer, {}, "can't be read"),
        (lambda name, content: content, {"compression": zipfile.ZIP_DEFLATED}, "its records are compressed"),
    ):
        torch.save({"weight": torch.zeros(2**20)}, path)
        rewritten(path, change, **zipped)
        with little_memory(), pytest.raises(CheckpointError, match=said):
            read(path)
        with little_memory(), pytest.raises(CheckpointError, match=said):
            load(path)
    torch.save({"bytes": Zeros()}, path)
    with little_memory(), pytest.raises(CheckpointError, match="can't be read"):
        load(path)


class Zeros:
    """A pickle of a few bytes, of a kind that is allowed."""

    def __reduce__(self) -> Any:
        return bytearray, (10 * 2**30,)


def rename(folder: Path, name: str) -> None:
    """In the manifest, of a file that has another name there."""
    path = folder / "global_step1" / "contents.json"
    contents = json.loads(path.read_text())
    contents["files"][name] = contents["files"].pop("tokenizer/tokenizer.json")
    path.write_text(json.dumps(contents))


NAMES = ["../secret", "/etc/passwd", "tokenizer/../../secret", "..", "", "a\nb", "\ud800"]


@pytest.mark.parametrize("name", NAMES)
def test_names_in_the_manifest_and_in_latest_stay_inside(name: str, copy: Path) -> None:
    (copy.parent / "secret").mkdir()
    rename(copy, name)
    for read_it in list(doors(copy))[:2]:
        with pytest.raises(CheckpointError, match="contents.json is damaged"):
            read_it()
    rename_back = copy / "global_step1" / "contents.json"
    rename_back.unlink()
    (copy / "latest").write_text(name, errors="surrogatepass")
    for read_it in doors(copy):
        with pytest.raises(CheckpointError, match=r"latest can't be read: ('.*' is no name of a file|it is no UTF-8)"):
            read_it()


def test_links_that_lead_out_are_not_followed(copy: Path, tmp_path: Path) -> None:
    folder, secret = copy / "global_step1", tmp_path / "secret.json"
    secret.write_text("mine")
    (folder / "tokenizer" / "more.json").symlink_to(secret)
    for read_it in doors(copy):
        with pytest.raises(CheckpointError, match=r"'tokenizer/more.json' is a link that leads out of .*secret\.json"):
            read_it()
    (folder / "tokenizer" / "more.json").unlink()
    os.mkfifo(folder / "tokenizer" / "waits.json")
    for read_it in doors(copy):
        with pytest.raises(CheckpointError, match="tokenizer/waits.json in .* is neither a file nor a folder"):
            read_it()
    (folder / "tokenizer" / "waits.json").unlink()
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    for read_it in doors(copy):
        with pytest.raises(CheckpointError, match="global_step1 is a symbolic link, which is not followed"):
            read_it()
    (copy / "latest").unlink()
    assert store.keep_newest(copy, 1) == [] and (tmp_path / "elsewhere" / "contents.json").exists()


def test_a_linked_folder_of_runs_is_the_users_own(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "linked").symlink_to(copy)
    make().load_checkpoint(tmp_path / "linked")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            {"checkpoint": {"load_universal": True}},
            "checkpoint.load_universal reads files that can run code: remove it",
        ),
        ({"datastates_ckpt": {"enabled": True}}, "datastates_ckpt is not supported"),
    ],
)
def test_kinds_of_checkpoints_that_deepspeed_reads_by_itself_are_refused(files: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_ds_config(files)
    assert issubclass(ConfigError, InterlockingError)


def test_an_export_copies_no_link_of_the_tokenizer_beside_a_checkpoint(tmp_path: Path) -> None:
    """Checkpoints of before have none of their own: the folder that they name has it."""
    given = shutil.copytree(FOLDER / "checkpoint", tmp_path / "given")
    (tmp_path / "data").mkdir()
    (given / "global_step3" / "tokenizer").rename(tmp_path / "data" / "tokenizer")
    path = given / "global_step3" / "interlocked_model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"data": str(tmp_path / "data")}))
    assert Checkpoint(given).tokenizer == tmp_path / "data" / "tokenizer"
    (tmp_path / "data" / "tokenizer" / "secret.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(CheckpointError, match="'secret.json' is a link that leads out of"):
        _ = Checkpoint(given).tokenizer
