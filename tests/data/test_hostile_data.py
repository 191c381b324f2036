"""Data that somebody else may have made: names, links, lengths, depths and compressed nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from ibp_deepspeed.config.deepspeed import load_ds_config
from ibp_deepspeed.data import open_tokens
from ibp_deepspeed.data.corpus import open_corpus
from ibp_deepspeed.data.dialogues import open_dialogues
from ibp_deepspeed.data.token_file import read_manifest, write_tokens
from ibp_deepspeed.data.tokenizer import TextTokenizer
from ibp_deepspeed.errors import ConfigError, DataError
from ibp_deepspeed.json_text import DEEPEST
from tests.bombs import little_memory


@pytest.fixture
def prepared(tmp_path: Path, tokenizer: TextTokenizer) -> Path:
    documents: Any = [("train", "a b c"), ("heldout", "d e f")] * 20
    write_tokens(tmp_path / "data", documents, tokenizer, source="t", seed=0, held_out_fraction=0.5)
    return tmp_path / "data"


def change(folder: Path, **values: Any) -> None:
    """In the manifest; a name with a dot in the train split's record."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, value in values.items():
        (manifest["train"] if name in manifest["train"] else manifest)[name] = value
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["../train.bin", "/etc/passwd", "tokenizer/../../train.bin", ".", "a\0b"])
@pytest.mark.parametrize("key", ["file", "tokenizer_file"])
def test_names_in_the_manifest_stay_inside(name: str, key: str, prepared: Path) -> None:
    (prepared / "train.bin").rename(prepared.parent / "train.bin")
    change(prepared, **{key: name})
    with pytest.raises(DataError, match=r"is no name of a file in this folder"):
        open_tokens(prepared, "train")


@pytest.mark.parametrize("linked", ["train.bin", "tokenizer/tokenizer.json", "manifest.json"])
def test_links_that_lead_out_are_not_followed(linked: str, prepared: Path) -> None:
    (prepared / linked).rename(prepared.parent / "outside")
    (prepared / linked).symlink_to(prepared.parent / "outside")
    with pytest.raises(DataError, match=f"'{linked}' is a link that leads out of"):
        open_tokens(prepared, "train")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"tokens": 5 * 2**30}, "its manifest says 10737418240: it is truncated"),
        ({"tokens": 10**30}, "it is truncated|manifest of this version"),
        ({"vocabulary_size": 10**12}, "uint16 holds token ids below 65536 only"),
        ({"max_token_id": 10**12}, "uint16 holds token ids below 65536 only"),
    ],
)
def test_lengths_that_are_not_there(values: dict[str, int], said: str, prepared: Path) -> None:
    change(prepared, **values)
    with pytest.raises(DataError, match=said):
        open_tokens(prepared, "train")


def test_token_ids_above_the_manifests_highest_are_found(prepared: Path) -> None:
    """A model would look up a row that it has not; the checksum is the sender's own."""
    import hashlib

    tokens = np.fromfile(prepared / "train.bin", dtype="<u2")
    tokens[3] = 60_000
    tokens.tofile(prepared / "train.bin")
    change(prepared, sha256=hashlib.sha256(tokens.tobytes()).hexdigest())
    with pytest.raises(DataError, match=r"train\.bin has the token id 60000, its manifest says at most"):
        open_tokens(prepared, "train")
    change(prepared, eos_id=60_000, max_token_id=60_000)
    with pytest.raises(DataError, match="set the model's vocabulary size to 60001 or more"):
        open_tokens(prepared, "heldout").check_vocabulary(read_manifest(prepared).vocabulary_size)


DEEP: list[tuple[str, Callable[[int], str]]] = [
    ("list", lambda depth: "[" * depth + "]" * depth),
    ("object", lambda depth: '{"a": ' * depth + "1" + "}" * depth),
]


@pytest.mark.parametrize("depth", [DEEPEST + 5, 100_000])
@pytest.mark.parametrize("nested", [each for _, each in DEEP], ids=[name for name, _ in DEEP])
def test_deep_nesting_is_one_sentence(depth: int, nested: Callable[[int], str], tmp_path: Path) -> None:
    message = f'{{"role": "assistant", "content": "c", "more": {nested(depth)}}}'
    (tmp_path / "rows.jsonl").write_text(f'{{"messages": [{message}]}}\n')
    with pytest.raises(DataError, match=f"line 1 is not JSON .it is nested more than {DEEPEST} deep"):
        list(map(str, open_dialogues(tmp_path / "rows.jsonl")))
    (tmp_path / "config.json").write_text(f'{{"optimizer": {nested(depth)}}}')
    with pytest.raises(ConfigError, match=f"config.json is no JSON: it is nested more than {DEEPEST} deep"):
        load_ds_config(tmp_path / "config.json")


def test_numbers_of_thousands_of_digits_and_lines_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(f'{{"text": {"1" * 5000}}}\n')
    with pytest.raises(DataError, match="a number in it has thousands of digits"):
        list(open_corpus(rows))
    monkeypatch.setattr("ibp_deepspeed.data.records.LONGEST_LINE", 1000)
    rows.write_text(json.dumps({"text": "a" * 2000}))
    with pytest.raises(DataError, match="has a line of more than 1,000 characters"):
        list(open_corpus(rows))


def test_a_value_that_is_repeated_is_in_memory_once(tmp_path: Path) -> None:
    """Ten gigabytes of text in a file of a thousand bytes, in a field and inside a list; rows come one by one."""
    number = 10_000
    texts = pyarrow.DictionaryArray.from_arrays(np.zeros(number, dtype=np.int32), pyarrow.array(["a" * 2**20]))
    messages = pyarrow.StructArray.from_arrays([pyarrow.array(["assistant"] * number), texts], ["role", "content"])
    nested = pyarrow.ListArray.from_arrays(pyarrow.array(range(number + 1), pyarrow.int32()), messages)
    path = tmp_path / "bomb.parquet"
    table = pyarrow.table({"text": texts, "messages": nested})
    pyarrow.parquet.write_table(table, path, compression="zstd", row_group_size=number)
    assert path.stat().st_size < 4096
    with little_memory():
        assert sum(len(row) for row in islice(open_corpus(path), 200)) == 200 * 2**20
        assert sum(1 for _ in islice(open_dialogues(path), 200)) == 200


def test_rows_that_decompress_a_thousandfold_come_a_few_at_a_time(tmp_path: Path) -> None:
    """Hundreds of megabytes in a few thousand bytes: a page is what is decompressed at once, here a third of them."""
    path = tmp_path / "bomb.parquet"
    schema = pyarrow.schema([("text", pyarrow.string())])
    with pyarrow.parquet.ParquetWriter(path, schema, compression="zstd", use_dictionary=False) as writer:
        for _ in range(3):
            writer.write_table(pyarrow.table({"text": ["a" * 2**21] * 64}))
    assert path.stat().st_size < 2**16
    with little_memory(2**28):
        assert sum(1 for _ in open_corpus(path)) == 192


def test_a_damaged_parquet_file_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [f"row {i}" for i in range(1000)]}), path)
    whole = path.read_bytes()
    for place in range(0, len(whole), len(whole) // 40):
        damaged = bytearray(whole)
        damaged[place : place + 8] = b"\xff" * 8
        path.write_bytes(damaged)
        try:
            list(open_corpus(path))
        except DataError as error:
            assert "\n" not in str(error)
