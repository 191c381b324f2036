"""Settings of all tests: CPU processes, one thread each; and the fixture that several files share."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from ibp_deepspeed.data.tokenizer import TextTokenizer

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The environment's own ninja: another one would build DeepSpeed's extension anew, and again for the next process.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


@pytest.fixture(scope="session")
def tokenizer() -> TextTokenizer:
    # Imported here: the settings above have to come first.
    from ibp_deepspeed.data.tokenizer import train_tokenizer
    from tests.prepared_data import DOCUMENTS

    return train_tokenizer(DOCUMENTS, 300)
