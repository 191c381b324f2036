"""--document-masks: on where the data can, recorded with a checkpoint, and the same where it is evaluated."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ibp_deepspeed.commands.reporting.history import History
from ibp_deepspeed.commands.training.arguments import parse_arguments
from ibp_deepspeed.commands.training.plan import make_plan
from ibp_deepspeed.commands.training.sources import source_lines
from ibp_deepspeed.data import DataError, HeldOut, open_tokens
from ibp_deepspeed.data.packing import Packing
from ibp_deepspeed.models.errors import ModelError
from ibp_deepspeed.models.runs.description import Description
from tests.commands import script
from tests.forks import ROOT
from tests.scripts.settings import SMALL
from tests.scripts.test_resume import TAG, plan, words


@pytest.fixture
def earlier(data: Path, tmp_path: Path) -> Path:
    """The same data as an earlier version wrote them."""
    folder = Path(shutil.copytree(data, tmp_path / "earlier"))
    manifest = json.loads((folder / "manifest.json").read_text())
    for split in ("train", "heldout"):
        (folder / manifest[split].pop("bounds")["file"]).unlink()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def documents_line(given: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """What a run says of documents."""
    args = parse_arguments(None, [*given, "--stages", "2"])
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.chdir(ROOT)
    (line,) = [line for line in source_lines(make_plan(args), args) if line.startswith("documents:")]
    return line


def test_it_is_on_where_the_data_have_bounds_and_says_so_where_not(
    data: Path, earlier: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def line(folder: Path, *more: str) -> str:
        return documents_line(words(config, folder, tmp_path / "out", *more), monkeypatch)

    assert line(data) == "documents: packed whole into samples, and masked from each other (default)"
    assert line(data, "--no-document-masks").endswith("not masked (--no-document-masks)")
    assert line(earlier).endswith(f"({earlier} has no bounds of documents: it was prepared by an earlier version)")
    with pytest.raises(DataError, match="prepared by an earlier version, without the bounds .* leave --document-masks"):
        line(earlier, "--document-masks")


def test_a_run_goes_on_with_the_same_samples_only(
    trained: Path, data: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ("--steps", "9")
    assert plan(monkeypatch, words(config, data, trained, *more)).document_masks
    with pytest.raises(ModelError, match=r"document-masks on \(bounds of checksum \w{12}\), not off: resume with the"):
        plan(monkeypatch, words(config, data, trained, *more, "--no-document-masks"))
    allowed = plan(
        monkeypatch, words(config, data, trained, *more, "--no-document-masks", "--allow-changed", "document-masks")
    )
    assert allowed.changes is not None and allowed.changes.restarts_epoch


def test_the_run_and_its_evaluation_read_packed_windows(trained: Path, data: Path, tmp_path: Path) -> None:
    """Two stages × two replicas trained on them; one process evaluates the checkpoint the same."""
    assert Description.read(trained / "checkpoint" / TAG).document_masks is None
    held_out = HeldOut(open_tokens(data, "heldout"), 32, 2)
    assert held_out.describe().endswith(", documents apart")
    last = json.loads([row for row in (trained / "history.jsonl").read_text().splitlines() if "held_out" in row][-1])
    assert last["tokens"] == held_out.tokens
    done = script("evaluate_lm.py", "--checkpoint", trained / "checkpoint", "--json", tmp_path / "found.json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads((tmp_path / "found.json").read_text())
    assert "documents apart" in found["sample"]
    assert [row["loss"] for row in found["exits"]] == pytest.approx(last["held_out"], rel=1e-5)
    assert len(History.read(trained).train) > 0


def test_without_masks_it_trains_and_is_evaluated_as_before(earlier: Path, config: Path, tmp_path: Path) -> None:
    given = ("--deepspeed_config", config, "--data", earlier, "--output", tmp_path / "out", *SMALL, "--steps", 2)
    done = script("train_lm.py", "--one-process", "--stages", 2, *given)
    assert done.returncode == 0, done.stderr
    assert "documents: samples cross their ends" in done.stdout
    (checkpoint,) = (tmp_path / "out" / "checkpoint").glob("global_step*")
    description = Description.read(checkpoint)
    assert description.document_masks is False
    crossing = HeldOut(open_tokens(earlier, "heldout"), 32, 2, document_masks=description.document_masks)
    assert "documents apart" not in crossing.describe()


def test_preparing_says_the_share_of_padding(tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("\n\n".join(f"text {i} " + "word " * (i % 37) for i in range(80)))
    done = script("prepare_data.py", "--input", tmp_path / "texts.txt", "--out", tmp_path / "data", "--vocab-size", 300)
    assert done.returncode == 0, done.stderr
    bounds = open_tokens(tmp_path / "data", "train").bounds
    assert bounds is not None
    share = Packing.of(bounds, 256).padding
    assert f"train, padding where documents are packed whole into samples: {share:.2%} at 256 tokens, " in done.stdout
