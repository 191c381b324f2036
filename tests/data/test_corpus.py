"""The sources of text, and the split of their documents."""

import json
import math
import re
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ibp_deepspeed.data.corpus import (
    END_OF_TEXT,
    Corpus,
    DocumentSplit,
    hub_corpus,
    open_corpus,
    standard_library,
)
from ibp_deepspeed.data.token_file import write_tokens
from ibp_deepspeed.data.tokenizer import TextTokenizer
from ibp_deepspeed.errors import DataError
from tests.prepared_data import DOCUMENTS, UNHURRIED, decoded

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


def library(folder: Path, monkeypatch: pytest.MonkeyPatch, texts: dict[str, str]) -> None:
    """A standard library of these files."""
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(folder)})


def test_standard_library_is_sources_without_tests_and_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = list(standard_library())
    assert len(texts) > 400
    assert texts[0].startswith('"""Record of phased-in incompatible language changes.')  # __future__.py
    wanted = ["a.py", "json/tool.py", "z.py"]
    tables = ["encodings/cp273.py", "html/entities.py", "pydoc_data/topics.py"]
    left_out = ["test/a.py", "lib2to3/tests/b.py", "idlelib/idle_test/c.py", "site-packages/d/e.py"]
    left_out += ["_sysconfigdata__linux.py", "LICENSE.txt"]
    library(tmp_path, monkeypatch, {name: name for name in wanted + tables + left_out})
    assert list(standard_library()) == wanted
    assert list(standard_library(whole=True)) == sorted(wanted + tables)


def test_standard_library_has_the_beginning_of_long_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long, line = "é = 1\n" * 4000, "x" * 20_001
    library(tmp_path, monkeypatch, {"a.py": long, "b.py": line, "c.py": "short"})
    assert list(standard_library()) == ["é = 1\n" * 3333, "short"], "whole lines, 20,000 characters at most"
    assert list(standard_library(whole=True)) == [long, line, "short"]
    assert "first 20,000 characters of each module, without tests and generated" in standard_library().description
    assert "first" not in standard_library(whole=True).description


def test_held_out_part_of_the_standard_library_looks_like_the_rest() -> None:
    """No module decides, and words are as frequent: 0.06 apart in Python 3.11.7; 0.16 with codec tables in 6 MB."""
    texts = list(standard_library())
    split = DocumentSplit.of(texts, 0.05, 0)
    held_out = [text for text in texts if split.side(text) == "heldout"]
    words = [Counter(re.findall(r"\w+|[^\w\s]", "".join(part))) for part in (held_out, texts)]
    assert max(map(len, held_out)) < 0.15 * sum(map(len, held_out))
    assert distance(*words) < 0.1


def distance(one: Counter[str], other: Counter[str]) -> float:
    """Total variation between the frequencies of the 500 commonest words of both."""
    common = [word for word, _ in (one + other).most_common(500)]
    return sum(abs(one[word] / one.total() - other[word] / other.total()) for word in common) / 2


def test_hub_corpus_reads_rows_and_names_a_missing_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in DOCUMENTS))
    corpus = hub_corpus(str(tmp_path / "set"))
    assert list(corpus) == list(corpus) == DOCUMENTS
    with pytest.raises(DataError, match='has no field "body"'):
        list(hub_corpus(str(tmp_path / "set"), text_field="body"))
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
    train, heldout = decoded(tmp_path / "d", "train"), decoded(tmp_path / "d", "heldout")
    assert not set(train) & set(heldout)
    assert Counter(train + heldout) == Counter(texts)
    assert (len(train), len(heldout)) == (manifest.train.documents, manifest.heldout.documents)
