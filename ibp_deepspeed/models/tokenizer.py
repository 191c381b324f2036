"""Tokenizers of Hugging Face folders, by transformers' own classes alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from ibp_deepspeed.errors import first_line
from ibp_deepspeed.models.errors import ModelError


def load_tokenizer(path_or_name: str | Path) -> Any:
    """The tokenizer in a folder, or of a name on the hub.

    Raises:
        ModelError: there is none, it is damaged, or needs Python code of its own, which is never run.
    """
    try:
        return AutoTokenizer.from_pretrained(str(path_or_name), trust_remote_code=False)
    except Exception as error:  # each kind of tokenizer has its own
        raise ModelError(f"the tokenizer in {path_or_name} can't be read: {first_line(error)}") from error
