"""All exits of a run as a folder: a Hugging Face model each, one card, and an index that says what they share.

``exits.json`` is a list with an object for each exit: ``exit`` (1 … K), ``folder`` (inside the family's),
``shared_layers`` (decoder layers with the weights of the last exit's first ones), and what was measured. A few lines
of transformers read it: ``from_pretrained(family, subfolder=row["folder"])``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers import AutoModelForCausalLM, PreTrainedModel

from ibp_deepspeed.errors import first_line
from ibp_deepspeed.json_text import parsed, small_text
from ibp_deepspeed.models.errors import ModelError

INDEX = "exits.json"


def folder_of(exit_: int) -> str:
    """An exit's, in the family's."""
    return f"exit-{exit_}"


class Family:
    """An exported family of exits.

    Args:
        folder: with its index.

    Raises:
        ModelError: no index there, or one that says something else.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            rows = parsed(small_text(folder / INDEX))
            self._rows = {int(row["exit"]): row for row in rows}
            self._shared = {exit_: int(row["shared_layers"]) for exit_, row in self._rows.items()}
            self.last = max(self._rows)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ModelError(f"{folder} is no family of exits: {INDEX} can't be read ({first_line(error)}).") from None

    @staticmethod
    def is_one(folder: Path) -> bool:
        """Whether a folder is a family's, and no model's own."""
        return (folder / INDEX).exists() and not (folder / "config.json").exists()

    @property
    def exits(self) -> list[int]:
        """Those that there are, the model last."""
        return sorted(self._rows)

    def path(self, exit_: int) -> Path:
        """The folder of an exit's model.

        Raises:
            ModelError: there is no such exit.
        """
        if exit_ not in self._rows:
            there = ", ".join(map(str, self._rows))
            raise ModelError(f"{self.folder} has no exit {exit_}: its exits are {there} (the last one is the model).")
        return self.folder / folder_of(exit_)

    def shared_layers(self, exit_: int) -> int:
        """Decoder layers of an exit that are the model's first ones."""
        self.path(exit_)
        return self._shared[exit_]

    def load(self, exit_: int) -> PreTrainedModel:
        """An exit's model.

        Raises:
            ModelError: there is none, or it is damaged.
        """
        path = self.path(exit_)
        try:
            return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False)
        except Exception as error:  # damaged files raise many kinds
            raise ModelError(f"no model in {path}: {first_line(error)}") from error


def write_index(folder: Path, rows: Sequence[Mapping[str, Any]], table: str, trained: str) -> None:
    """The index and the card of a family whose exits are written.

    Args:
        folder: the family's.
        rows: of the index, without ``folder``.
        table: the same as Markdown.
        trained: how, in a sentence or two.
    """
    named = [{**row, "folder": folder_of(row["exit"])} for row in rows]
    (folder / INDEX).write_text(json.dumps(named, indent=1) + "\n", encoding="utf-8")
    _card(table, trained, folder_of(rows[0]["exit"])).save(folder / "README.md")


def _card(table: str, trained: str, smallest: str) -> ModelCard:
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["interlocking-backpropagation", "ibp_deepspeed", "early-exit"],
    )
    return ModelCard(f"""---
{data.to_yaml()}
---

# A family of language models that share their first layers

{trained} Each folder here is one exit: the first layers of the largest model with a head of their own, which predicts
the same tokens.

{table}
`{INDEX}` lists them. `shared_layers` are the decoder layers that an exit has in common with the largest model.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", subfolder="{smallest}")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder/{smallest}")
```
""")
