"""The real evaluation harness, on a task from local files: what it finds for an exit is what the exit's logits say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ibp_deepspeed.data.tokenizer import train_tokenizer
from ibp_deepspeed.models import ModelError
from ibp_deepspeed.models.exits.exits import Exits
from ibp_deepspeed.models.exits.harness import ExitLM, check_tasks, exits_of, run_tasks
from ibp_deepspeed.models.tokenizer import load_tokenizer
from tests.commands import Done, assert_one_sentence, script
from tests.models.test_export import checkpoint
from tests.prepared_data import DOCUMENTS

CHOICES = [" the end", " def f", " 1 + 1", " of it all"]
QUESTIONS: list[dict[str, Any]] = [
    {"question": " ".join(text.split()[:4]), "choices": CHOICES, "answer": i % 4}
    for i, text in enumerate(DOCUMENTS[:8])
]
TASK = """task: continuations
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with a task of eight questions."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)) + "\n")
    (folder / "continuations.yaml").write_text(TASK.format(file=folder / "questions.jsonl"))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A checkpoint of two exits with a tokenizer."""
    folder = tmp_path / "run"
    checkpoint(folder, "llama", values={"vocab_size": 300, "max_position_embeddings": 128})
    train_tokenizer(DOCUMENTS, 300).save(folder / "tokenizer")
    return folder


def by_hand(folder: Path, exit_: int) -> float:
    """The share of questions whose answer has the largest sum of log-probabilities."""
    exits, right = Exits(folder), 0
    assert exits.checkpoint.tokenizer is not None
    tokenizer = load_tokenizer(exits.checkpoint.tokenizer)
    for row in QUESTIONS:
        sums = []
        for choice in row["choices"]:
            before = len(tokenizer(row["question"])["input_ids"])
            ids = torch.tensor([tokenizer(f"{row['question']}{choice}")["input_ids"]])
            logits = exits.lazy_logits(ids[:, :-1], exit_).materialize()[0].log_softmax(-1)
            sums.append(logits[before - 1 :].gather(1, ids[0, before:, None]).sum())
        right += int(torch.stack(sums).argmax() == row["answer"])
    return right / len(QUESTIONS)


def test_a_task_finds_what_each_exits_logits_say(run: Path, tasks: Path) -> None:
    manager = check_tasks(["continuations"], tasks)
    assert exits_of(run) == [1, 2]
    found = {k: run_tasks(ExitLM(run, k), ["continuations"], manager)["continuations"]["acc"] for k in (1, 2)}
    assert found == {k: by_hand(run, k) for k in (1, 2)}
    last = run_tasks(ExitLM(run), ["continuations"], manager, limit=4)["continuations"]
    assert last["acc"] * 4 == int(last["acc"] * 4) and last["acc_stderr"] >= 0


def evaluate(run: Path, tasks: Path, *words: object) -> Done:
    where = ("--checkpoint", run, "--include-path", tasks)
    return script("evaluate_tasks.py", *where, *words)


def test_the_command_shows_all_exits(run: Path, tasks: Path, tmp_path: Path) -> None:
    done = evaluate(run, tasks, "--tasks", "continuations", "--json", tmp_path / "found.json")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "found.json").read_text())
    values = [row["tasks"]["continuations"]["acc"] for row in rows]
    assert [row["exit"] for row in rows] == [1, 2]
    assert f"{'acc':>20} {values[0]:>10.4f} {values[1]:>10.4f}" in done.stdout, done.stdout
    assert_one_sentence(evaluate(run, tasks, "--tasks", "nothing"), "the harness has no task nothing nor in")
    assert_one_sentence(evaluate(run, tasks, "--tasks", "continuations", "--exits", 3), "has no exit 3: its exits are")
    (tasks / "questions.jsonl").unlink()
    assert_one_sentence(evaluate(run, tasks, "--tasks", "continuations"), "the tasks continuations can't be run: ")


def test_a_checkpoint_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path / "run", "llama")
    with pytest.raises(ModelError, match=r"run has no tokenizer, nor has the data it was trained on\."):
        ExitLM(tmp_path / "run")
