"""The acceptance on GPUs, on the CPU at tiny shapes: its parts measure, and its driver goes on whatever they do."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_acceptance
from benchmarks.gpu import against, heads, records, stages
from benchmarks.gpu.memory import estimated_peak
from benchmarks.gpu.parts import all_parts, chosen
from ibp_deepspeed import cli
from ibp_deepspeed.config.interlocking import AuxHeadConfig
from ibp_deepspeed.errors import ConfigError
from ibp_deepspeed.models import CausalLM, load_config
from ibp_deepspeed.models.profiling import specimen
from ibp_deepspeed.models.profiling.specimens import Specimens
from tests.commands import gpu_part, real


def measured(part: str, folder: Path) -> dict[str, Any]:
    """The record of a part that has ended well."""
    path = folder / f"{part}.json"
    done = gpu_part(part, "--out", path)
    assert path.exists(), done.stdout + done.stderr
    record: dict[str, Any] = json.loads(path.read_text())
    assert done.returncode == 0 and record["status"] == "done", (record["reason"], done.stderr)
    return record


def test_processes_train_as_one_process_does(tmp_path: Path) -> None:
    rows = measured("sharing-2", tmp_path)["rows"]
    assert [(row["dtype"], row["contender"]) for row in rows] == [
        (dtype, strategy) for dtype in ("fp32", "bf16") for strategy in ("local", "pairwise", "global")
    ]
    for row in rows:
        assert 0 <= row["difference"] <= row["tolerance"], row
        exits = 1 if row["contender"] == "global" else 2  # its preset has no heads
        assert row["compared"] == exits * (against.SMALL["batches"] + 1), row


def test_another_gradient_is_beyond_the_tolerances() -> None:
    """The same model trained pairwise is not what local training gives, in either precision."""
    for dtype in against.TOLERANCE:
        case = {"stages": 2, "dtype": dtype, "strategy": "local", **against.SMALL}
        expected, other = against.train_in_one(case), against.train_in_one({**case, "strategy": "pairwise"})
        assert "failed" not in against._row(case, expected, expected)
        assert "local, " + dtype in against._row(case, other, expected)["failed"]


def test_three_strategies_train_on_as_many_tokens(tmp_path: Path) -> None:
    rows = measured("study", tmp_path)["rows"]
    assert [row["contender"] for row in rows] == ["global", "local", "pairwise"]
    assert len({row["tokens"] for row in rows}) == 1 and rows[0]["tokens"] % rows[0]["batches"] == 0
    assert all(0 < row["held_out"][-1] < 10 and len(row["held_out"]) == 2 for row in rows)


def test_a_head_with_another_loss_fails_its_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a kernel that is not there is said not to have run."""
    row = {"vocabulary": 600, "loss": 6.0}
    made = [{**row, "contender": "naive"}, {**row, "contender": "chunks of 128", "loss": 6.1}]
    monkeypatch.setattr(heads.heads, "run", lambda args: made)
    rows = heads.run(small=True)
    assert records.outcome(rows)[0] == "failed" and "6.1" in rows[1]["failed"] and "failed" not in rows[0]
    assert rows[-1]["contender"] == "fused kernel" and rows[-1]["not_run"]


def test_a_layer_and_a_head_are_measured_with_an_estimate_of_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(specimen, "compile_layers", lambda *_: None)  # takes most of a minute, and is not ours
    rows = stages.run(small=True, shape="llama-tiny")
    assert [(row["piece"], row["compiled"]) for row in rows] == [
        ("decoder layer 1", False),
        ("auxiliary head", False),
        ("decoder layer 1", True),
    ]
    layer, head = (row["ms"]["forward"][0] + row["ms"]["backward"][0] for row in rows[:2])
    assert rows[1]["of_layer"] == pytest.approx(head / layer, abs=1e-3) and rows[0]["of_layer"] == 1
    assert rows[0]["ms"]["weight_gradient"][0] > 0 == rows[2]["ms"]["weight_gradient"][0]
    assert all(row["peak_bytes"] is None and row["estimated_bytes"] > 0 for row in rows)


def test_the_estimate_grows_by_what_a_layer_keeps_and_weighs() -> None:
    """Weights and their gradients, in bf16 fp32 sums too; what autograd saves doubles with the sequence."""

    def estimate(dtype: torch.dtype, tokens: int) -> tuple[int, int]:
        model = CausalLM(load_config("llama-tiny"), dtype=dtype)
        thing = Specimens(model, AuxHeadConfig(), samples=1, sequence_length=tokens).layer(1)
        with thing.on(torch.device("cpu")):
            kept = thing.kept()
        message = tokens * 128 * dtype.itemsize
        return estimated_peak(thing, kept, message) - 4 * message, kept

    weights = 4 * 128 * 128 + 3 * 128 * 352 + 2 * 128
    short, kept = estimate(torch.float32, 64)
    long, twice = estimate(torch.float32, 128)
    assert short - kept == long - twice == 2 * 4 * weights and twice == pytest.approx(2 * kept, rel=0.02)
    half, kept = estimate(torch.bfloat16, 64)
    assert half - kept == (2 + 2 + 4) * weights


def test_the_driver_runs_what_is_missing_in_processes_of_their_own(tmp_path: Path) -> None:
    command = (sys.executable, "benchmarks/gpu_acceptance.py", "--device", "cpu", "--small", "--out", tmp_path)
    done = real(*command, "--parts", "environment", "nccl-2")
    assert done.returncode == 0, done.stdout + done.stderr
    reason = "not enough GPUs: 2 needed, 0 there"
    assert f"nccl-2: not run: {reason}" in done.stdout
    page = (tmp_path / "table.md").read_text()
    assert f"| nccl-2 | not run: {reason} |" in page and "| heads | not run yet | |" in page
    assert f"| torch | {version('torch')} " in page and "| import ibp_deepspeed.models.hf.weights | works |" in page


Start = Callable[..., str]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Start:
    """Start the driver on parts that end as told (a record's status, or an exit code without one); what it says."""

    def run(endings: dict[str, str | int | None], *words: str, code: int = 0) -> str:
        def group(command: list[str], limit: float, environment: object, output: int) -> int | None:
            part, path = command[3], Path(command[5])
            os.write(output, b"last words\n")
            ending = endings[part]
            if not isinstance(ending, str):
                return ending
            reason = None if ending == "done" else "as told"
            small = "--small" in command
            record: dict[str, Any] = {
                "status": ending,
                "reason": reason,
                "seconds": 1.0,
                "small": small,
                "machine": {},
                "rows": [],
            }
            records.write(path, record)
            return int(ending == "failed")

        monkeypatch.setattr(gpu_acceptance, "run_group", group)
        always = ["gpu_acceptance.py", "--device", "cpu", "--small", "--out", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", [*always, *words])
        try:
            gpu_acceptance.main(cli.SameOnAllRanks())
        except SystemExit as end:
            assert end.code == code
        else:
            assert code == 0
        return capsys.readouterr().out

    return run


def test_a_part_that_fails_says_why_and_the_others_go_on(start: Start, tmp_path: Path) -> None:
    endings = {"environment": "failed", "heads": None, "study": 3, "nccl-2": "done"}
    said = start(endings, "--parts", *endings, code=1)
    assert "environment: failed: as told" in said and "nccl-2: done" in said
    assert "heads: failed: ran past its limit of 360 s" in said and "study: failed: ended with code 3" in said
    record = json.loads((tmp_path / "heads.json").read_text())
    assert (
        record["log"] == ["last words"]
        and "| study | failed: ended with code 3 |" in (tmp_path / "table.md").read_text()
    )


def test_a_second_start_runs_what_failed_and_what_it_is_told_to(start: Start, tmp_path: Path) -> None:
    start(
        {"environment": "done", "heads": "failed", "nccl-2": "not run"},
        "--parts",
        "environment",
        "heads",
        "nccl-2",
        code=1,
    )
    said = start({"heads": "done"}, "--parts", "environment", "heads", "nccl-2")
    assert "heads …" in said and "environment …" not in said and "nccl-2 …" not in said
    assert "heads …" not in start({"environment": "done"}, "--parts", "heads", "--again", "environment")
    other = json.loads((tmp_path / "heads.json").read_text()) | {"small": False}
    records.write(tmp_path / "heads.json", other)
    assert "heads …" in start({"heads": "done"}, "--parts", "heads"), "a record of other shapes is not this part's"


def test_a_rerun_without_a_result_leaves_what_was_measured(start: Start, tmp_path: Path) -> None:
    path, page = tmp_path / "heads.json", tmp_path / "table.md"
    start({"heads": "done"}, "--parts", "heads")
    measured = path.read_text()
    for ending, said in {None: "ran past its limit of 360 s", 3: "ended with code 3", "failed": "as told"}.items():
        words = f"done; run again: failed: {said}"
        assert f"heads: {words}" in start({"heads": ending}, "--parts", "heads", "--again", "heads", code=1)
        record = json.loads(path.read_text())
        assert record.pop("rerun")["log"] == ["last words"] and record == json.loads(measured)
        assert f"| heads | {words} | 1 |" in page.read_text()
    assert "heads …" in start({"heads": "not run"}, "--parts", "heads"), "its last run has failed"
    assert "heads …" not in start({}, "--parts", "heads")
    assert "| heads | done; run again: not run: as told | 1 |" in page.read_text()
    start({"heads": "done"}, "--parts", "heads", "--again", "heads")
    assert path.read_text() == measured
    assert sorted(path.name for path in tmp_path.iterdir()) == ["heads.json", "table.md"]


def test_a_rerun_that_is_broken_off_leaves_what_was_measured(start: Start, tmp_path: Path) -> None:
    start({"heads": "done"}, "--parts", "heads")
    measured = (tmp_path / "heads.json").read_text()
    with pytest.raises(KeyError):  # where it would run
        start({}, "--parts", "heads", "--again", "heads")
    assert (tmp_path / "heads.json").read_text() == measured


def test_nothing_that_a_part_starts_outlives_it(tmp_path: Path) -> None:
    child = "import subprocess, sys, time; print(subprocess.Popen(['sleep', '300']).pid, flush=True); time.sleep(300)"
    with (tmp_path / "out").open("w+") as output:
        ended = gpu_acceptance.run_group([sys.executable, "-c", child], 5, os.environ, output.fileno())
        output.seek(0)
        pid = int(output.read())
    assert ended is None
    while Path(f"/proc/{pid}").exists():  # killed, and soon collected by init; the test's time-out is the limit
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.05)


def test_parts_are_chosen_by_beginnings_of_their_names() -> None:
    parts = all_parts(small=False)
    assert list(chosen(parts, ["sharing", "heads"])) == ["sharing-2", "sharing-4", "heads"]
    assert [part for part in parts if part.startswith("profile")] == [
        "profile-gpt2-124m", "profile-llama3-1b", "profile-llama2-7b", "profile-llama3-8b",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="there is no part speed: there are environment"):
        chosen(parts, ["speed"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match="--device cpu --small"):
        gpu_acceptance.folder_name("cuda", small=False)
    assert gpu_acceptance.folder_name("cpu", small=True) == "cpu-small"
