"""Fine-tuning on dialogues with the scripts: what functions of the standard library do, from their signatures."""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import math
import re
import statistics
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from ibp_deepspeed.commands.training.start import open_data
from ibp_deepspeed.data import open_tokens
from ibp_deepspeed.data.token_file import COUNTS, FIRST, read_manifest
from ibp_deepspeed.data.tokenizer import train_tokenizer
from ibp_deepspeed.errors import DataError
from tests.commands import script
from tests.forks import ROOT
from tests.scripts.settings import SMALL

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}\n{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant\n{% endif %}"
)
SEQUENCE = int(SMALL[SMALL.index("--sequence-length") + 1])


def questions(count: int) -> list[dict[str, str]]:
    """Signatures and the first lines of the documentation."""
    rows = []
    for module in (statistics, textwrap, inspect, argparse):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)):
                rows.append({"prompt": f"{node.name}({ast.unparse(node.args)})", "response": text.splitlines()[0]})
    return rows[:count]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 rows, prepared with a tokenizer that has a chat template."""
    folder = tmp_path_factory.mktemp("dialogues")
    rows = questions(60)
    assert len(rows) == 60
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = train_tokenizer((" ".join(row.values()) for row in rows), 400)
    tokenizer._tokenizer.chat_template = TEMPLATE
    tokenizer.save(folder / "tokenizer")
    where: list[str | Path] = [
        "--input",
        folder / "rows.jsonl",
        "--tokenizer",
        folder / "tokenizer",
        "--out",
        folder / "data",
    ]
    done = script("prepare_data.py", "--dialogues", *where, "--held-out-fraction", "0.2")
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(folder / "data")
    assert manifest.train.documents + manifest.heldout.documents == 60
    for name, record in (("train", manifest.train), ("held-out", manifest.heldout)):
        assert record.marks is not None
        assert (
            f"{name}: {record.documents} rows, {record.tokens} tokens, {record.marks.counted_tokens} of them count in "
            f"the loss, the longest row has {record.marks.longest_row}\n"
        ) in done.stdout
    return folder / "data"


def labels_within(data: Path, length: int) -> tuple[int, int, int]:
    """Held-out tokens that count among the first length + 1 of their rows, rows without one, and longer rows."""
    held_out = open_tokens(data, "heldout")
    assert held_out.marks is not None
    rows = np.split(held_out.marks, np.flatnonzero(held_out.marks & FIRST)[1:])
    counted = [int(np.count_nonzero(row[: length + 1] & COUNTS)) for row in rows]
    longer = sum(len(row) > length + 1 and n > 0 for row, n in zip(rows, counted, strict=True))
    return sum(counted), counted.count(0), longer


def test_rows_are_prepared_trained_on_and_evaluated(data: Path, tmp_path: Path) -> None:
    settings = json.loads((ROOT / "ds_configs" / "pairwise_cpu.json").read_text())
    settings.update(train_micro_batch_size_per_gpu=4, gradient_accumulation_steps=2)
    settings["scheduler"]["params"].update(warmup_num_steps=2, total_num_steps=12)
    settings["tensorboard"]["enabled"] = False
    (tmp_path / "config.json").write_text(json.dumps(settings))
    words: list[str | Path] = [
        "--one-process",
        "--stages",
        "2",
        "--deepspeed_config",
        tmp_path / "config.json",
        "--data",
        data,
        *SMALL,
    ]
    words += ["--steps", "12", "--eval-interval", "4", "--output", tmp_path / "run"]
    done = script("train_lm.py", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    counted, left_out, cut = labels_within(data, SEQUENCE)
    assert cut > 0
    held_out = read_manifest(data).heldout.documents
    said = re.search(r"heldout\.bin: (\d+) of (\d+) rows left out, .* their first 33; (\d+) cut off there", done.stdout)
    assert said is not None and [int(n) for n in said.groups()] == [left_out, held_out, cut]
    rows = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    losses = [row["held_out"] for row in rows if "held_out" in row]
    assert len(losses) == 3 and all(math.isfinite(loss) for row in losses for loss in row)
    assert all(first > second > third for first, second, third in zip(*losses, strict=True)), losses

    table = tmp_path / "exits.json"
    words = ["--checkpoint", tmp_path / "run" / "checkpoint", "--batch-size", "1", "--json", table]
    done = script("evaluate_lm.py", *words)
    assert done.returncode == 0, done.stderr
    exits = json.loads(table.read_text())["exits"]
    assert [row["tokens"] for row in exits] == [counted] * 2
    assert all(math.isfinite(row["loss"]) for row in exits)


def test_too_few_rows_for_a_batch_are_counted_as_rows(data: Path) -> None:
    pipeline = SimpleNamespace(
        train_micro_batch_size_per_gpu=lambda: 4,
        gradient_accumulation_steps=lambda: 16,
        global_steps=0,
        data_parallel_rank=0,
    )
    plan = SimpleNamespace(
        train=open_tokens(data, "train"),
        held_out=open_tokens(data, "heldout"),
        replicas=1,
        resume=None,
        document_masks=False,
        mixture=None,
    )
    args = argparse.Namespace(sequence_length=SEQUENCE, seed=0)
    with pytest.raises(DataError, match=r"has \d+ rows with a response in their first 33 tokens, a batch needs 64: "):
        open_data(cast(Any, pipeline), cast(Any, plan), args)
