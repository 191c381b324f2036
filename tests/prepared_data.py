"""Documents, and what reads or makes prepared data, for the tests of the data part."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings
from transformers import AutoTokenizer

from ibp_deepspeed.data import Manifest, SplitRecord, TokenFile, open_tokens
from ibp_deepspeed.data.corpus import END_OF_TEXT
from ibp_deepspeed.data.token_file import SplitName

DOCUMENTS = [f"document {i}: the number {i * i} is the square of {i}, naïve ☃ {'ab ' * i}\n" for i in range(60)]
# Other processes may keep the machine busy: time is no failure here.
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def decoded(folder: Path, split: SplitName) -> list[str]:
    """The documents of a split, read back from its tokens."""
    data = open_tokens(folder, split)
    text = str(AutoTokenizer.from_pretrained(folder / "tokenizer").decode(data.tokens.tolist()))
    assert text.endswith(END_OF_TEXT)
    return text.split(END_OF_TEXT)[:-1]


def token_file(tokens: Any, vocabulary_size: int = 1 << 16) -> TokenFile:
    tokens = np.asarray(tokens, dtype="<u2")
    record = SplitRecord(file="train.bin", documents=1, tokens=len(tokens), max_token_id=int(tokens.max()), sha256="0")
    manifest = Manifest(
        source="test", seed=0, held_out_fraction=0.5, dtype="uint16", vocabulary_size=vocabulary_size,
        eos_id=0, tokenizer_file="none", unigram_entropy_nats=0.0, train=record, heldout=record,
    )  # fmt: skip
    return TokenFile(path=Path("data/train.bin"), split="train", tokens=tokens, manifest=manifest)


def document_file(lengths: list[int]) -> TokenFile:
    """Documents of so many tokens; token t of the file is t."""
    bounds = np.append(0, np.cumsum(lengths)).astype("<u8")
    return dataclasses.replace(token_file(np.arange(bounds[-1])), bounds=bounds)
