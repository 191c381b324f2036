"""The data part: sources, split, tokenizer, token files, the command, and the loader."""

import hashlib
import importlib.util
import json
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ibp_deepspeed.data import DataError, Manifest, MicroBatchLoader, SplitRecord, TokenFile, open_tokens
from ibp_deepspeed.data.corpus import (
    END_OF_TEXT,
    Corpus,
    DocumentSplit,
    hub_corpus,
    open_corpus,
    standard_library,
)
from ibp_deepspeed.data.token_file import (
    SplitName,
    check_target,
    read_manifest,
    unigram_entropy,
    write_tokens,
)
from ibp_deepspeed.data.tokenizer import TextTokenizer, load_tokenizer, train_tokenizer

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "prepare_data.py"
DOCUMENTS = [f"document {i}: the number {i * i} is the square of {i}, naïve ☃ {'ab ' * i}\n" for i in range(60)]
# Other processes may keep the machine busy: time is no failure here.
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None)


@pytest.fixture(scope="session")
def tokenizer() -> TextTokenizer:
    return train_tokenizer(DOCUMENTS, 300)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder with one document a file."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, text in enumerate(DOCUMENTS):
        (folder / f"{number:02}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def prepared(tmp_path: Path, tokenizer: TextTokenizer) -> Path:
    return _prepare(tmp_path / "data", tokenizer)


def _prepare(folder: Path, tokenizer: TextTokenizer, overwrite: bool = False) -> Path:
    split = DocumentSplit.of(DOCUMENTS, 0.2, seed=1)
    documents = ((split.side(text), text) for text in DOCUMENTS)
    write_tokens(folder, documents, tokenizer, source="test", seed=1, held_out_fraction=0.2, overwrite=overwrite)
    return folder


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare_data", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Runs the command in this process, which saves the seconds of its imports."""
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", *map(str, arguments)])
    return int(_script().main())


def _run(*arguments: object, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=120)


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def _decoded(folder: Path, split: SplitName) -> list[str]:
    """The documents of a split, read back from its tokens."""
    data = open_tokens(folder, split)
    text = str(AutoTokenizer.from_pretrained(folder / "tokenizer").decode(data.tokens.tolist()))
    assert text.endswith(END_OF_TEXT)
    return text.split(END_OF_TEXT)[:-1]


# Sources


def test_folder_is_read_in_sorted_order_without_hidden_files(tmp_path: Path) -> None:
    for name, text in {
        "b.txt": "bee",
        "a/z.md": "zed",
        "a.txt": "aye",
        "c.bin": "no",
        ".h/x.txt": "no",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "d.jsonl").write_text('{"text": "dee"}\n')
    corpus = open_corpus(tmp_path)
    assert list(corpus) == ["aye", "zed", "bee", "dee"]
    assert list(corpus) == ["aye", "zed", "bee", "dee"], "a corpus can be read again"


def test_lone_text_file_is_divided_at_blank_lines_or_marks(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(b"one\r\ntwo\n\n\nthree\n")
    assert list(open_corpus(path)) == ["one\r\ntwo\n", "three\n"]
    path.write_text(f"one\n\ntwo\n{END_OF_TEXT}\nthree")
    assert list(open_corpus(path)) == ["one\n\ntwo\n", "three"]
    assert list(open_corpus(tmp_path)) == ["one\n\ntwo\n", "three"]
    path.write_text("one\n\ntwo\n")
    assert list(open_corpus(tmp_path)) == ["one\n\ntwo\n"], "a file of a folder is one document"


@pytest.mark.parametrize("field", ["text", "body"])
def test_jsonl_and_parquet_give_the_same_documents(tmp_path: Path, field: str) -> None:
    lines = [json.dumps({"id": i, field: text}) for i, text in enumerate(DOCUMENTS)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n\n")
    table = pyarrow.table({"id": range(len(DOCUMENTS)), field: DOCUMENTS})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    assert list(open_corpus(tmp_path / "a.jsonl", text_field=field)) == DOCUMENTS
    assert list(open_corpus(tmp_path / "a.parquet", text_field=field)) == DOCUMENTS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": ', r"a\.jsonl line 2 is not JSON"),
        ("a.jsonl", b"[1]\n", r"a\.jsonl line 1 is not a JSON object"),
        ("a.jsonl", b'{"body": "x"}\n', r'line 1 has no field "text" \(it has body\): .*--text-field'),
        ("a.jsonl", b'{"text": 3}\n', r'line 1 has a int in the field "text"'),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a\.jsonl has a document that is not valid Unicode"),
        ("a.txt", b"caf\xe9\n", r"a\.txt is not UTF-8"),
        ("a.parquet", b"PAR1", r"a\.parquet cannot be read as Parquet"),
        ("a.doc", b"x", r"a\.doc is or holds no file of a known type"),
    ],
)
def test_unreadable_source_is_one_sentence(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(open_corpus(tmp_path / name))


def test_parquet_without_the_field_names_the_fields(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r'has no field "text" \(it has body\)'):
        list(open_corpus(tmp_path / "a.parquet"))


def test_limits_end_the_corpus() -> None:
    texts = ["aa", "", "é", "bb", "c"]
    assert list(Corpus("t", lambda: iter(texts), max_documents=3)) == ["aa", "é", "bb"]
    assert list(Corpus("t", lambda: iter(texts), max_bytes=4)) == ["aa", "é"]
    assert list(Corpus("t", lambda: iter(texts), max_bytes=5)) == ["aa", "é"], "it does not skip to a shorter one"


def test_standard_library_is_sources_without_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = list(standard_library())
    assert len(texts) > 400
    assert texts[0].startswith('"""Record of phased-in incompatible language changes.')  # __future__.py
    wanted = ["a.py", "json/tool.py", "z.py"]
    left_out = ["test/a.py", "lib2to3/tests/b.py", "idlelib/idle_test/c.py", "site-packages/d/e.py"]
    left_out += ["_sysconfigdata__linux.py", "LICENSE.txt"]
    for name in wanted + left_out:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    assert list(standard_library()) == wanted


def test_hub_corpus_reads_rows_and_names_a_missing_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in DOCUMENTS))
    corpus = hub_corpus(str(tmp_path / "set"))
    assert list(corpus) == list(corpus) == DOCUMENTS
    with pytest.raises(DataError, match='has no field "body"'):
        hub_corpus(str(tmp_path / "set"), text_field="body")
    with pytest.raises(DataError, match=r"could not be loaded.*--input"):
        hub_corpus(str(tmp_path / "nothing" / "here" / "at all"))


# Split


def test_split_follows_the_fraction_and_the_seed() -> None:
    texts = [f"text {i}" for i in range(4000)]
    sides = {}
    for seed in (0, 1):
        split = DocumentSplit.of(texts, 0.1, seed)
        sides[seed] = {text for text in texts if split.side(text) == "heldout"}
        assert 300 < len(sides[seed]) < 500  # 400 expected, standard deviation 19
        assert split.documents == 4000
    assert len(sides[0] & sides[1]) < 100  # 40 expected of independent draws


@given(st.sets(st.text(max_size=5), min_size=2, max_size=6), st.floats(1e-6, 1 - 1e-6), st.integers(0, 9))
@UNHURRIED
def test_each_side_has_a_document_however_few(texts: set[str], fraction: float, seed: int) -> None:
    split = DocumentSplit.of(sorted(texts), fraction, seed)
    assert {split.side(text) for text in texts} == {"train", "heldout"}


@pytest.mark.parametrize("texts", [[], ["one"], ["same", "same"]])
def test_split_needs_two_different_documents(texts: list[str]) -> None:
    with pytest.raises(DataError, match=f"the source has {len(texts)} documents"):
        DocumentSplit.of(texts, 0.5, 0)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0, math.nan])
def test_fraction_out_of_range(fraction: float) -> None:
    with pytest.raises(DataError, match="must lie between 0 and 1"):
        DocumentSplit.of(["a", "b"], fraction, 0)


def test_no_held_out_document_is_in_train(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    texts = DOCUMENTS + DOCUMENTS[::-1]  # each twice: copies must stay together
    split = DocumentSplit.of(texts, 0.3, 0)
    pairs = ((split.side(text), text) for text in texts)
    manifest = write_tokens(tmp_path / "d", pairs, tokenizer, source="t", seed=0, held_out_fraction=0.3)
    train, heldout = _decoded(tmp_path / "d", "train"), _decoded(tmp_path / "d", "heldout")
    assert not set(train) & set(heldout)
    assert Counter(train + heldout) == Counter(texts)
    assert (len(train), len(heldout)) == (manifest.train.documents, manifest.heldout.documents)


# Tokenizer


@given(st.lists(st.text(), min_size=1, max_size=4))
@UNHURRIED
def test_decode_of_encode_is_the_text(tokenizer: TextTokenizer, texts: list[str]) -> None:
    encoded = tokenizer.encode(texts)
    assert len(encoded) == len(texts)
    for ids, text in zip(encoded, texts, strict=True):
        assert ids[-1] == tokenizer.eos_id
        assert tokenizer.decode(ids[:-1]) == text
        assert max(ids) < tokenizer.vocabulary_size


def test_a_text_cannot_forge_the_separator(tokenizer: TextTokenizer) -> None:
    (ids,) = tokenizer.encode([f"a{END_OF_TEXT}b"])
    assert ids.count(tokenizer.eos_id) == 1
    assert tokenizer.decode(ids[:-1]) == f"a{END_OF_TEXT}b"


def test_trained_vocabulary_size() -> None:
    texts = [chr(97 + i % 26) * 3 + f" word{i} number{i}" for i in range(2000)] * 2
    assert train_tokenizer(texts, 500).vocabulary_size == 500
    assert train_tokenizer(["xy"], 500).vocabulary_size == 257, "fewer when the text is small"
    with pytest.raises(DataError, match="vocabulary size is 256, at least 257"):
        train_tokenizer(texts, 256)


def test_saved_tokenizer_is_read_back(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    tokenizer.save(tmp_path / "t")
    for path in (tmp_path / "t", tmp_path / "t" / "tokenizer.json"):
        again = load_tokenizer(path)
        assert again.encode(DOCUMENTS) == tokenizer.encode(DOCUMENTS)
        assert (again.eos_id, again.vocabulary_size) == (tokenizer.eos_id, tokenizer.vocabulary_size)


def test_foreign_tokenizer_is_not_cut_padded_or_started(tmp_path: Path) -> None:
    """A tokenizer.json with truncation, padding, a start token, and a gap in its ids."""
    words = Tokenizer(models.WordLevel({"</s>": 5, "<s>": 1, "a": 2, "b": 40}, unk_token="</s>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens(["</s>", "<s>"])
    words.enable_truncation(3)
    words.enable_padding(length=8)
    words.save(str(tmp_path / "words.json"))
    loaded = load_tokenizer(tmp_path / "words.json")
    assert loaded.encode(["a b a b a", "b"]) == [[2, 40, 2, 40, 2, 5], [40, 5]]
    assert (loaded.eos_id, loaded.vocabulary_size) == (5, 41)


def test_unusable_tokenizers(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none does not exist: give a tokenizer\.json"):
        load_tokenizer(tmp_path / "none")
    (tmp_path / "broken.json").write_text("{")
    for path in (tmp_path / "broken.json", tmp_path):
        with pytest.raises(DataError, match="cannot be read as a tokenizer"):
            load_tokenizer(path)
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "endless.json"))
    with pytest.raises(DataError, match=r"endless\.json names no end-of-text token"):
        load_tokenizer(tmp_path / "endless.json")


# Token files


def test_manifest_says_what_is_in_the_files(prepared: Path, tokenizer: TextTokenizer) -> None:
    manifest = read_manifest(prepared)
    assert manifest.dtype == "uint16" and manifest.vocabulary_size == tokenizer.vocabulary_size
    assert (prepared / manifest.tokenizer_file).is_file()
    for split in get_args(SplitName):
        record: SplitRecord = getattr(manifest, split)
        raw = (prepared / record.file).read_bytes()
        tokens = np.frombuffer(raw, dtype="<u2")
        assert record.sha256 == hashlib.sha256(raw).hexdigest()
        assert record.tokens == len(tokens) and record.max_token_id == tokens.max()
        assert record.documents == np.count_nonzero(tokens == manifest.eos_id)
        opened = open_tokens(prepared, split)
        assert isinstance(opened.tokens, np.memmap)
        assert np.array_equal(opened.tokens, tokens)


def test_large_vocabulary_takes_four_bytes(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({END_OF_TEXT: 0, "a": 1, "b": 70_000}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=END_OF_TEXT)
    documents: list[tuple[SplitName, str]] = [("train", "a b"), ("heldout", "b")]
    write_tokens(
        tmp_path / "d",
        documents,
        TextTokenizer(fast, "words"),
        source="t",
        seed=0,
        held_out_fraction=0.5,
    )
    train = open_tokens(tmp_path / "d", "train")
    assert train.manifest.dtype == "uint32" and train.tokens.tolist() == [1, 70_000, 0]


def test_unigram_entropy_against_a_direct_computation(prepared: Path) -> None:
    train, heldout = (open_tokens(prepared, split).tokens.tolist() for split in get_args(SplitName))
    manifest = read_manifest(prepared)
    counts = Counter(train)
    total = len(train) + manifest.vocabulary_size
    direct = sum(-math.log((counts[token] + 1) / total) for token in heldout) / len(heldout)
    assert manifest.unigram_entropy_nats == pytest.approx(direct, rel=1e-12)
    assert unigram_entropy(np.zeros(8, np.int64), np.arange(8)) == pytest.approx(math.log(8))


def test_preparing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    one, two = (_prepare(tmp_path / name, train_tokenizer(DOCUMENTS, 300)) for name in ("one", "two"))
    assert _files(one) == _files(two)


def test_batches_do_not_change_the_files(
    prepared: Path, tmp_path: Path, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ibp_deepspeed.data.token_file._BATCH_DOCUMENTS", 7)
    assert _files(_prepare(tmp_path / "sevens", tokenizer)) == _files(prepared)
    monkeypatch.setattr("ibp_deepspeed.data.token_file._BATCH_CHARACTERS", 100)
    assert _files(_prepare(tmp_path / "small", tokenizer)) == _files(prepared)


def test_interrupted_run_leaves_nothing_and_keeps_old_data(
    prepared: Path, tmp_path: Path, tokenizer: TextTokenizer
) -> None:
    def documents() -> Iterator[Any]:
        yield from [("train", "a"), ("heldout", "b")] * 300
        raise KeyboardInterrupt

    before = _files(prepared)
    for target in (tmp_path / "new", prepared):
        with pytest.raises(KeyboardInterrupt):
            write_tokens(target, documents(), tokenizer, source="t", seed=0, held_out_fraction=0.5, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == [prepared.name]
    assert _files(prepared) == before


def test_existing_folders_are_not_overwritten(prepared: Path, tmp_path: Path, tokenizer: TextTokenizer) -> None:
    with pytest.raises(DataError, match=r"data holds prepared data already: .*--overwrite"):
        check_target(prepared, overwrite=False)
    (prepared / "stale").touch()
    _prepare(prepared, tokenizer, overwrite=True)
    assert not (prepared / "stale").exists()
    assert [path.name for path in tmp_path.iterdir()] == [prepared.name]
    other = tmp_path / "other"
    other.mkdir()
    check_target(other, overwrite=False)
    (other / "thesis.txt").touch()
    for path in (other, other / "thesis.txt"):
        with pytest.raises(DataError, match="is not a folder of prepared data: choose another --out"):
            check_target(path, overwrite=True)


def test_split_without_documents_is_refused(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    with pytest.raises(DataError, match='no document is in the split "heldout"'):
        write_tokens(tmp_path / "d", [("train", "a")], tokenizer, source="t", seed=0, held_out_fraction=0.5)
    assert not list(tmp_path.iterdir())


def test_missing_parts_are_named(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere is not a folder: make it with scripts/prepare_data\.py --out"):
        open_tokens(tmp_path / "nowhere", "train")
    with pytest.raises(DataError, match=r"has no manifest\.json"):
        open_tokens(tmp_path, "train")
    with pytest.raises(DataError, match='has no split "test": use train or heldout'):
        open_tokens(prepared, "test")  # type: ignore[arg-type]
    (prepared / "heldout.bin").unlink()
    open_tokens(prepared, "train")
    with pytest.raises(DataError, match=r"heldout\.bin does not exist"):
        open_tokens(prepared, "heldout")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:50], r"manifest\.json is not a manifest .*the whole file"),
        (
            lambda text: text.replace('"format_version": 1', '"format_version": 2'),
            "format_version: Input should be 1",
        ),
        (lambda text: text.replace('"seed": 1', '"seed": 1, "colour": 1'), "colour: Extra inputs"),
        (lambda text: text.replace('"uint16"', '"int8"'), "dtype"),
    ],
)
def test_broken_manifest(prepared: Path, change: Any, message: str) -> None:
    path = prepared / "manifest.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(DataError, match=message):
        open_tokens(prepared, "train")


@pytest.mark.parametrize("verify", [True, False])
def test_truncated_or_longer_file(prepared: Path, verify: bool) -> None:
    path = prepared / "train.bin"
    data = path.read_bytes()
    path.write_bytes(data[:-2])
    size = len(data)
    with pytest.raises(DataError, match=f"has {size - 2} bytes, its manifest says {size}: it is truncated; run"):
        open_tokens(prepared, "train", verify=verify)
    path.write_bytes(data + b"\0")
    with pytest.raises(DataError, match=f"has {size + 1} bytes, its manifest says {size}: something was added"):
        open_tokens(prepared, "train", verify=verify)


def test_changed_content_is_found_by_the_checksum(prepared: Path) -> None:
    path = prepared / "train.bin"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"its content changed; run scripts/prepare_data\.py again with --overwrite"):
        open_tokens(prepared, "train")
    open_tokens(prepared, "train", verify=False)


def test_check_vocabulary(prepared: Path) -> None:
    data = open_tokens(prepared, "train")
    size = data.manifest.vocabulary_size
    data.check_vocabulary(size)
    with pytest.raises(DataError, match=f"vocabulary of {size}, the model's vocabulary size is {size - 1}"):
        data.check_vocabulary(size - 1)
    lying = _token_file(np.arange(10), vocabulary_size=4)
    with pytest.raises(DataError, match=r"token ids up to 9 .* set the model's vocabulary size to 10 or more"):
        lying.check_vocabulary(9)
    lying.check_vocabulary(10)


# The command


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
    assert _files(tmp_path / "one") == _files(tmp_path / "two")
    manifest = read_manifest(tmp_path / "two")
    assert manifest.source == "texts" and manifest.vocabulary_size == 300
    for expected in (
        f"train: {manifest.train.documents} documents, {manifest.train.tokens} tokens",
        f"held-out: {manifest.heldout.documents} documents, {manifest.heldout.tokens} tokens",
        "vocabulary: 300 (uint16)",
        f"{manifest.unigram_entropy_nats:.4f} nats per token",
    ):
        assert expected in printed
    texts = _decoded(tmp_path / "two", "train") + _decoded(tmp_path / "two", "heldout")
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
    assert sorted(_decoded(out, "train") + _decoded(out, "heldout")) == sorted(DOCUMENTS[:20])
    assert (out / "tokenizer" / "tokenizer.json").read_bytes() == (tmp_path / "tok" / "tokenizer.json").read_bytes()
    before = _files(out)
    assert _main(monkeypatch, *arguments, "--seed", 5) == 1
    assert "give --overwrite" in capsys.readouterr().err and _files(out) == before
    assert _main(monkeypatch, *arguments, "--seed", 5, "--overwrite") == 0
    assert read_manifest(out).seed == 5


def test_command_takes_the_standard_library_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = ("--max-bytes", 60_000, "--vocab-size", 300)
    assert _main(monkeypatch, *limits, "--out", tmp_path / "out") == 0
    texts = _decoded(tmp_path / "out", "train") + _decoded(tmp_path / "out", "heldout")
    assert sorted(texts) == sorted(standard_library(max_bytes=60_000))


def test_command_trains_the_tokenizer_without_held_out_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"{word} " * 50 for word in ("alphabet", "bananas", "cauldron", "daffodil")]
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    out = tmp_path / "out"
    assert _main(monkeypatch, "--input", tmp_path / "in.jsonl", "--held-out-fraction", 0.01, "--out", out) == 0
    (held_out,) = _decoded(out, "heldout")
    vocabulary = AutoTokenizer.from_pretrained(out / "tokenizer").get_vocab()
    learnt = {word for word in ("alphabet", "bananas", "cauldron", "daffodil") if "Ġ" + word in vocabulary}
    assert learnt == {"alphabet", "bananas", "cauldron", "daffodil"} - {held_out.split()[0]}


def test_command_says_a_user_error_in_one_line(tmp_path: Path) -> None:
    run = _run("--input", tmp_path / "absent", "--out", tmp_path / "out")
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith(f"error: {tmp_path / 'absent'} does not exist: give")
    assert "Traceback" not in run.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ("--vocab-size", "many"),
        ("--input", "a", "--dataset", "b"),
        ("--dataset-config", "c"),
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
    assert text.count("(default: ") == 12


# Loader


def _token_file(tokens: Any, vocabulary_size: int = 1 << 16) -> TokenFile:
    tokens = np.asarray(tokens, dtype="<u2")
    record = SplitRecord(file="train.bin", documents=1, tokens=len(tokens), max_token_id=int(tokens.max()), sha256="0")
    manifest = Manifest(
        source="test", seed=0, held_out_fraction=0.5, dtype="uint16", vocabulary_size=vocabulary_size,
        eos_id=0, tokenizer_file="none", unigram_entropy_nats=0.0, train=record, heldout=record,
    )  # fmt: skip
    return TokenFile(path=Path("data/train.bin"), split="train", tokens=tokens, manifest=manifest)


def _same(one: Any, two: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@st.composite
def _shapes(draw: st.DrawFn) -> dict[str, int]:
    """A loader's shape and a token count of at least one global micro-batch."""
    shape = {name: draw(st.integers(1, 4)) for name in ("sequence_length", "micro_batch_size", "data_parallel_size")}
    smallest = math.prod(shape.values()) + 1
    return {**shape, "tokens": draw(st.integers(smallest, smallest + 120)), "seed": draw(st.integers(0, 3))}


def _ranks(shape: dict[str, Any], **options: Any) -> list[MicroBatchLoader]:
    shape = dict(shape)
    data = _token_file(np.arange(shape.pop("tokens")))
    ranks = range(shape["data_parallel_size"])
    return [MicroBatchLoader(data, data_parallel_rank=rank, **shape, **options) for rank in ranks]


@given(_shapes(), st.booleans())
@UNHURRIED
def test_micro_batch_holds_the_windows_of_its_samples(shape: dict[str, int], shuffle: bool) -> None:
    loader = _ranks(shape, shuffle=shuffle)[-1]
    length, size = shape["sequence_length"], shape["micro_batch_size"]
    for inputs, labels, samples in islice(loader, 2 * loader.micro_batches_per_epoch):
        assert inputs.shape == labels.shape == (size, length) and samples.shape == (size,)
        assert {inputs.dtype, labels.dtype, samples.dtype} == {torch.int64}
        assert inputs.is_contiguous() and labels.is_contiguous()
        expected = samples[:, None] * length + torch.arange(length)  # token t of the file is t
        assert torch.equal(inputs, expected) and torch.equal(labels, expected + 1)


@given(_shapes(), st.booleans(), st.integers(0, 2))
@UNHURRIED
def test_epoch_covers_each_sample_at_most_once_over_all_ranks(shape: dict[str, int], shuffle: bool, epoch: int) -> None:
    loaders = _ranks(shape, shuffle=shuffle)
    per_epoch = loaders[0].micro_batches_per_epoch
    seen: list[int] = []
    for loader in loaders:
        loader.load_state_dict({"next_micro_batch": epoch * per_epoch})
        seen += torch.cat([samples for _, _, samples in islice(loader, per_epoch)]).tolist()
    samples = (shape["tokens"] - 1) // shape["sequence_length"]
    global_size = shape["micro_batch_size"] * shape["data_parallel_size"]
    assert len(seen) == len(set(seen)) == samples - samples % global_size
    assert set(seen) <= set(range(samples))


@given(_shapes(), st.booleans(), st.integers(0, 100))
@UNHURRIED
def test_restart_is_continuation_across_epochs(shape: dict[str, int], shuffle: bool, start: int) -> None:
    whole = _ranks(shape, shuffle=shuffle)[0]
    for _ in range(start):
        next(whole)
    restarted = _ranks(shape, shuffle=shuffle, start=start)[0]
    loaded = _ranks(shape, shuffle=shuffle)[0]
    next(loaded)
    loaded.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    count = whole.micro_batches_per_epoch + 2
    for one, two, three in islice(zip(whole, restarted, loaded, strict=True), count):
        assert _same(one, two) and _same(one, three)
    assert whole.state_dict() == restarted.state_dict() == loaded.state_dict() == {"next_micro_batch": start + count}


@given(st.integers(1, 3), st.integers(0, 40), st.integers(0, 3))
@UNHURRIED
def test_global_micro_batch_does_not_depend_on_data_parallel_size(length: int, start: int, seed: int) -> None:
    def stream(data_parallel_size: int) -> list[list[int]]:
        shape = {
            "sequence_length": length, "micro_batch_size": 12 // data_parallel_size,
            "data_parallel_size": data_parallel_size, "tokens": 150, "seed": seed,
        }  # fmt: skip
        micro_batches = zip(*_ranks(shape, start=start), strict=True)
        return [torch.cat([s for _, _, s in ranks]).tolist() for ranks in islice(micro_batches, 6)]

    assert stream(1) == stream(2) == stream(3) == stream(12)


def test_order_differs_by_epoch_and_seed_and_is_in_file_order_without_shuffle() -> None:
    data = _token_file(np.arange(201))

    def epochs(**options: Any) -> list[list[int]]:
        loader = MicroBatchLoader(data, 2, 10, **options)
        return [torch.cat([s for _, _, s in islice(loader, 10)]).tolist() for _ in range(2)]

    first, second = epochs(seed=1)
    other, _ = epochs(seed=2)
    assert len({tuple(first), tuple(second), tuple(other)}) == 3
    assert sorted(first) == sorted(second) == sorted(other) == list(range(100))
    assert epochs(shuffle=False) == [list(range(100))] * 2


@pytest.mark.parametrize("shuffle", [True, False])
def test_held_out_is_one_pass_that_does_not_move_the_stream(shuffle: bool) -> None:
    data = _token_file(np.arange(100))
    loader, untouched = (MicroBatchLoader(data, 4, 3, shuffle=shuffle, start=11) for _ in range(2))
    passes = [list(loader.held_out()) for _ in range(2)]
    assert len(passes[0]) == loader.micro_batches_per_epoch == 8  # 24 samples of 4 tokens
    assert all(_same(one, two) for one, two in zip(*passes, strict=True))
    assert len({int(i) for _, _, samples in passes[0] for i in samples}) == 24
    assert [int(s[0]) for _, _, s in loader.held_out(2)] == [int(s[0]) for _, _, s in passes[0][:2]]
    assert len(list(loader.held_out(99))) == 8
    assert _same(next(loader), next(untouched))


def test_loader_needs_one_global_micro_batch() -> None:
    options: dict[str, Any] = {"sequence_length": 5, "micro_batch_size": 2, "data_parallel_size": 3}
    assert MicroBatchLoader(_token_file(np.arange(31)), **options).micro_batches_per_epoch == 1
    with pytest.raises(DataError, match=r"data/train\.bin has 30 tokens, .* 6 windows of 5 needs 31: "):
        MicroBatchLoader(_token_file(np.arange(30)), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence_length": 0}, "sequence_length is 0: give 1 or more"),
        ({"micro_batch_size": -1}, "micro_batch_size is -1"),
        ({"data_parallel_size": 0}, "data_parallel_size is 0"),
        ({"data_parallel_rank": 2, "data_parallel_size": 2}, "give a rank from 0 to 1"),
        ({"data_parallel_rank": -1}, "data_parallel_rank is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"start": -1}, "next_micro_batch is -1"),
    ],
)
def test_loader_arguments_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        MicroBatchLoader(_token_file(np.arange(100)), **{"sequence_length": 4, "micro_batch_size": 2, **options})
