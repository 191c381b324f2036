"""What tests of scripts share: a prepared corpus, a configuration, one tiny trained run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.commands import deepspeed, script
from tests.forks import ROOT
from tests.scripts.settings import SMALL
from tests.shared import Shared


@pytest.fixture(scope="session")
def data(shared: Shared) -> Path:
    """A small prepared corpus of real sources."""

    def make(folder: Path) -> None:
        done = script("prepare_data.py", "--out", folder / "data", "--vocab-size", "512", "--max-bytes", "400000")
        assert done.returncode == 0, done.stderr

    return shared.folder("prepared", make) / "data"


@pytest.fixture(scope="session")
def config(shared: Shared) -> Path:
    """The pairwise preset with smaller batches; TensorBoard's files are in the output of each run."""

    def make(folder: Path) -> None:
        settings = json.loads((ROOT / "ds_configs" / "pairwise_cpu.json").read_text())
        settings.update(train_micro_batch_size_per_gpu=2, gradient_accumulation_steps=2, steps_per_print=2)
        settings["interlocking"]["aux_head"] = {"readout": "shared", "blocks": 1, "refresh_interval": 2}
        settings["csv_monitor"] = {"enabled": True}
        (folder / "pairwise.json").write_text(json.dumps(settings))

    return shared.folder("config", make) / "pairwise.json"


@pytest.fixture(scope="session")
def trained(data: Path, config: Path, shared: Shared) -> Path:
    """Eight batches on two stages × two replicas through the deepspeed launcher."""

    def make(folder: Path) -> None:
        words = ("--deepspeed_config", config, "--data", data, "--steps", 8, "--eval-interval", 4, "--output", folder)
        done = deepspeed(4, "scripts/train_lm.py", "--stages", 2, *words, "--trace", "5:6", *SMALL)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "2 stages × 2 replicas" in done.stdout and "unigrams" in done.stdout
        assert "[INFO]" not in done.stdout and "[WARNING]" not in done.stdout, "nobody asked for DeepSpeed's log"
        used = r"LM head \([\d,]+ bytes\) goes to all heads every 2 batches and is used 2 batches"
        assert re.search(used, done.stdout)

    return shared.folder("trained", make)
