"""Text is encoded by any number of processes to the same bytes, and a process that dies ends it."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from ibp_deepspeed.data.encoding import Row
from ibp_deepspeed.data.token_file import write_tokens
from ibp_deepspeed.data.tokenizer import TextTokenizer
from ibp_deepspeed.errors import DataError
from tests.prepared_data import files

HERE = os.getpid()


class Letters:
    """A token for each letter, and 0 at the end; every second one counts."""

    vocabulary_size, eos_id = 300, 0

    def __init__(self, *, marked: bool = False, deadly: int | None = None) -> None:
        self.marked, self.deadly = marked, deadly

    def rows(self, documents: list[str]) -> list[Row]:
        if self.deadly is not None and os.getpid() != self.deadly:
            os._exit(1)
        ids = [[*map(ord, text), 0] for text in documents]
        return [Row(row, [i % 2 == 1 for i in range(len(row))] if self.marked else None) for row in ids]

    def save(self, folder: Path) -> None:
        folder.mkdir()


@pytest.fixture(autouse=True)
def short_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a little text is much: three documents a batch, one batch before the workers."""
    monkeypatch.setattr("ibp_deepspeed.data.encoding._BATCH_DOCUMENTS", 3)
    monkeypatch.setattr("ibp_deepspeed.data.encoding.BATCHES_ALONE", 1)


def write(folder: Path, encoder: Any, workers: int) -> dict[str, bytes]:
    documents: Any = (("heldout" if i % 5 == 2 else "train", f"{i} letters " * (i % 7 + 1)) for i in range(40))
    options: Any = {"source": "s", "seed": 0, "held_out_fraction": 0.2, "workers": workers}
    write_tokens(folder, documents, encoder, **options)
    return files(folder)


@pytest.mark.parametrize("marked", [False, True])
def test_the_bytes_do_not_depend_on_the_number_of_processes(marked: bool, tmp_path: Path) -> None:
    one = write(tmp_path / "one", Letters(marked=marked), 1)
    assert set(one) > {"train.bin", "train.marks.bin" if marked else "train.bounds.bin"}
    assert write(tmp_path / "three", Letters(marked=marked), 3) == one


def test_a_process_that_dies_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a process that encodes text has died.*give fewer --workers"):
        write(tmp_path / "data", Letters(deadly=os.getpid()), 2)
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_encodes_the_same_in_another_process(tokenizer: TextTokenizer) -> None:
    texts = ["plain", "forged <|endoftext|> end", "naïve ☃"]
    assert pickle.loads(pickle.dumps(tokenizer)).encode(texts) == tokenizer.encode(texts)
