"""The command that prepares data."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from ibp_deepspeed.commands import prepare_data
from ibp_deepspeed.data.corpus import standard_library
from ibp_deepspeed.data.token_file import read_manifest
from ibp_deepspeed.data.tokenizer import TextTokenizer
from tests.commands import script
from tests.prepared_data import DOCUMENTS, decoded, files

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "prepare_data.py"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder with one document a file."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, text in enumerate(DOCUMENTS):
        (folder / f"{number:02}.txt").write_text(text, encoding="utf-8")
    return folder


def _main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Runs the command in this process, which saves the seconds of its imports."""
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", *map(str, arguments)])
    return int(prepare_data.main())


def _run(*arguments: object, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=120)


def test_command_prepares_a_folder_the_same_in_every_process(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--input", source, "--vocab-size", 300, "--held-out-fraction", 0.2, "--seed", 3)
    assert _main(monkeypatch, *arguments, "--out", tmp_path / "one") == 0
    printed = capsys.readouterr().out
    other = {"PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = _run(*arguments, "--out", tmp_path / "two", **other)
    assert run.returncode == 0, run.stderr
    assert run.stdout.endswith(printed.replace(str(tmp_path / "one"), str(tmp_path / "two")))
    assert files(tmp_path / "one") == files(tmp_path / "two")
    manifest = read_manifest(tmp_path / "two")
    assert manifest.source == "texts" and manifest.vocabulary_size == 300
    for expected in (
        f"train: {manifest.train.documents} documents, {manifest.train.tokens} tokens",
        f"held-out: {manifest.heldout.documents} documents, {manifest.heldout.tokens} tokens",
        "vocabulary: 300 (uint16)",
        f"{manifest.unigram_entropy_nats:.4f} nats per token",
    ):
        assert expected in printed
    texts = decoded(tmp_path / "two", "train") + decoded(tmp_path / "two", "heldout")
    assert sorted(texts) == sorted(DOCUMENTS)


def test_command_reuses_a_tokenizer_and_overwrites_when_told(
    source: Path,
    tmp_path: Path,
    tokenizer: TextTokenizer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tokenizer.save(tmp_path / "tok")
    out = tmp_path / "out"
    arguments = ("--input", source, "--tokenizer", tmp_path / "tok", "--out", out, "--max-documents", 20)
    assert _main(monkeypatch, *arguments) == 0
    assert sorted(decoded(out, "train") + decoded(out, "heldout")) == sorted(DOCUMENTS[:20])
    assert (out / "tokenizer" / "tokenizer.json").read_bytes() == (tmp_path / "tok" / "tokenizer.json").read_bytes()
    before = files(out)
    assert _main(monkeypatch, *arguments, "--seed", 5) == 1
    assert "give --overwrite" in capsys.readouterr().err and files(out) == before
    assert _main(monkeypatch, *arguments, "--seed", 5, "--overwrite") == 0
    assert read_manifest(out).seed == 5


@pytest.mark.parametrize("whole", [False, True])
def test_command_takes_the_standard_library_by_default(
    whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says what part of it, where it prints and in the manifest."""
    limits = ("--max-bytes", 60_000, "--vocab-size", 300, *["--whole-library"] * whole)
    assert _main(monkeypatch, *limits, "--out", tmp_path / "out") == 0
    texts = decoded(tmp_path / "out", "train") + decoded(tmp_path / "out", "heldout")
    corpus = standard_library(whole=whole, max_bytes=60_000)
    assert sorted(texts) == sorted(corpus)
    assert capsys.readouterr().out.splitlines()[0] == f"{tmp_path / 'out'}: {corpus.description}"
    assert read_manifest(tmp_path / "out").source == corpus.description


def test_command_trains_the_tokenizer_without_held_out_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"{word} " * 50 for word in ("alphabet", "bananas", "cauldron", "daffodil")]
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    out = tmp_path / "out"
    assert _main(monkeypatch, "--input", tmp_path / "in.jsonl", "--held-out-fraction", 0.01, "--out", out) == 0
    (held_out,) = decoded(out, "heldout")
    vocabulary = AutoTokenizer.from_pretrained(out / "tokenizer").get_vocab()
    learnt = {word for word in ("alphabet", "bananas", "cauldron", "daffodil") if "Ġ" + word in vocabulary}
    assert learnt == {"alphabet", "bananas", "cauldron", "daffodil"} - {held_out.split()[0]}


def test_command_says_a_user_error_in_one_line(tmp_path: Path) -> None:
    run = script("prepare_data.py", "--input", tmp_path / "absent", "--out", tmp_path / "out")
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith(f"error: {tmp_path / 'absent'} does not exist: give")
    assert "Traceback" not in run.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ("--vocab-size", "many"),
        ("--input", "a", "--dataset", "b"),
        ("--input", "a", "--whole-library"),
        ("--split", "c"),
        ("--workers", "0"),
        ("--dialogues", "--input", "a.jsonl"),
        ("--dialogues", "--tokenizer", "t"),
        ("--nonsense",),
    ],
)
def test_command_refuses_wrong_options(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        _main(monkeypatch, *arguments)
    assert stopped.value.code == 2 and "error: " in capsys.readouterr().err


def test_help_gives_each_default(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        _main(monkeypatch, "--help")
    text = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    assert text.count("(default: ") == 15


def test_command_streams_a_split_of_a_data_set(
    tmp_path: Path, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder that the datasets library reads itself, with two splits; the column of the text has another name."""
    (tmp_path / "set").mkdir()
    for split, documents in (("train", DOCUMENTS[:20]), ("validation", DOCUMENTS[20:])):
        rows = (json.dumps({"body": text, "n": n}) for n, text in enumerate(documents))
        (tmp_path / "set" / f"{split}.jsonl").write_text("\n".join(rows))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.arrow_dataset.Dataset.__getitem__", None)  # nothing but streams
    tokenizer.save(tmp_path / "tok")
    out = tmp_path / "deep" / "out"
    given = ("--dataset", tmp_path / "set", "--split", "validation", "--tokenizer", tmp_path / "tok", "--out", out)
    assert _main(monkeypatch, *given, "--text-column", "body", "--max-documents", 15, "--workers", 1) == 0
    assert sorted(decoded(out, "train") + decoded(out, "heldout")) == sorted(DOCUMENTS[20:35])
    assert capsys.readouterr().out.splitlines()[0] == f"{out}: {tmp_path / 'set'}, split validation"
    assert [path.name for path in out.parent.iterdir()] == ["out"], "what was kept of the stream is gone"
    assert _main(monkeypatch, *given, "--overwrite") == 1
    assert 'has no field "text" (it has body, n): name the field of the text with' in capsys.readouterr().err
    assert _main(monkeypatch, *given[:3], "test", *given[4:], "--overwrite") == 1
    assert "split test) could not be loaded" in capsys.readouterr().err
