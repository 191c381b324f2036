"""The tokenizer, and the token files."""

import hashlib
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ibp_deepspeed.data import SplitRecord, open_tokens
from ibp_deepspeed.data.corpus import END_OF_TEXT, DocumentSplit
from ibp_deepspeed.data.token_file import (
    SplitName,
    check_target,
    read_manifest,
    unigram_entropy,
    write_tokens,
)
from ibp_deepspeed.data.tokenizer import TextTokenizer, load_tokenizer, train_tokenizer
from ibp_deepspeed.errors import DataError
from tests.prepared_data import DOCUMENTS, UNHURRIED, files, token_file


@pytest.fixture
def prepared(tmp_path: Path, tokenizer: TextTokenizer) -> Path:
    return _prepare(tmp_path / "data", tokenizer)


def _prepare(folder: Path, tokenizer: TextTokenizer, overwrite: bool = False) -> Path:
    split = DocumentSplit.of(DOCUMENTS, 0.2, seed=1)
    documents = ((split.side(text), text) for text in DOCUMENTS)
    write_tokens(folder, documents, tokenizer, source="test", seed=1, held_out_fraction=0.2, overwrite=overwrite)
    return folder


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
    assert files(one) == files(two)


def test_batches_do_not_change_the_files(
    prepared: Path, tmp_path: Path, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ibp_deepspeed.data.encoding._BATCH_DOCUMENTS", 7)
    assert files(_prepare(tmp_path / "sevens", tokenizer)) == files(prepared)
    monkeypatch.setattr("ibp_deepspeed.data.encoding._BATCH_CHARACTERS", 100)
    assert files(_prepare(tmp_path / "small", tokenizer)) == files(prepared)


def test_interrupted_run_leaves_nothing_and_keeps_old_data(
    prepared: Path, tmp_path: Path, tokenizer: TextTokenizer
) -> None:
    def documents() -> Iterator[Any]:
        yield from [("train", "a"), ("heldout", "b")] * 300
        raise KeyboardInterrupt

    before = files(prepared)
    for target in (tmp_path / "new", prepared):
        with pytest.raises(KeyboardInterrupt):
            write_tokens(target, documents(), tokenizer, source="t", seed=0, held_out_fraction=0.5, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == [prepared.name]
    assert files(prepared) == before


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
        (lambda text: text[:50], r"manifest\.json is not a manifest .*the file"),
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
    lying = token_file(np.arange(10), vocabulary_size=4)
    with pytest.raises(DataError, match=r"token ids up to 9 .* set the model's vocabulary size to 10 or more"):
        lying.check_vocabulary(9)
    lying.check_vocabulary(10)


def test_tokens_are_counted_on_all_of_a_split_or_evenly_over_it(prepared: Path) -> None:
    file = open_tokens(prepared, "train")
    size = file.manifest.vocabulary_size
    every = file.counts(size)
    assert every.shape == (size,) and every.sum() == len(file.tokens)
    assert all(every[token] == (file.tokens == token).sum() for token in set(file.tokens[:50].tolist()))
    part = file.counts(size, at_most=len(file.tokens) // 2)
    assert part.shape == (size,) and len(file.tokens) // 3 < part.sum() <= len(file.tokens) // 2
