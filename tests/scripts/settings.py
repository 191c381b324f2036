"""A model that trains in seconds, and changes of a configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SMALL = ["--model", "llama-tiny", "--sequence-length", "32", "--set", "num_hidden_layers=4"]


def changed(config: Path, path: Path, **interlocking: Any) -> Path:
    """A configuration with other options of interlocking, written to ``path``."""
    settings = json.loads(config.read_text())
    settings["interlocking"].update(interlocking)
    path.write_text(json.dumps(settings))
    return path
