"""The page of a run: made of what a run leaves, whatever state it is in, and looked at in a real browser."""

from __future__ import annotations

import http.server
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from ibp_deepspeed import measures
from ibp_deepspeed.commands.reporting.history import History
from ibp_deepspeed.commands.reporting.prediction import compare
from ibp_deepspeed.commands.reporting.record import RunRecord
from ibp_deepspeed.commands.training import display
from ibp_deepspeed.commands.training.display import Lines, Terminal, stage_table
from ibp_deepspeed.commands.training.monitors import monitors_under
from tests.commands import assert_one_sentence, script

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVERY_STAGE = {measures.LOSS, measures.TRUNK_NORM, measures.LEARNING_RATE, measures.WAITING, measures.IN_FLIGHT}
EVERY_STAGE |= {measures.MEMORY, measures.PEAK_MEMORY, measures.TOKENS, measures.tokens_each("process")}


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of what the tiny run left, without its checkpoint."""
    for name in ("run.json", "history.jsonl"):
        shutil.copy(trained / name, tmp_path)
    return tmp_path


def test_a_run_leaves_its_record_its_values_and_its_page(trained: Path) -> None:
    record, history = RunRecord.read(trained), History.read(trained)
    assert record.ended is not None and record.last_step == 8 and record.stages == 2 and record.micro_batches == 2
    assert record.command[0] == "train_lm.py" and "--steps" in record.command and "torch" in record.versions
    assert [step for step, _ in history.stages] == [2, 4, 6, 8]
    for _, stages in history.stages:
        assert all(set(stage) >= EVERY_STAGE for stage in stages)
        assert measures.HEAD_NORM in stages[0] and measures.HEAD_NORM not in stages[1]
        for stage in stages:
            rate = stage[measures.TOKENS] * stage[measures.BATCH_TIME]
            assert rate == pytest.approx(record.tokens_per_batch) and record.tokens_per_batch == 2 * 2 * 2 * 32
    losses = dict(history.train)
    for step, stages in history.stages:
        if step in losses:
            assert [stage[measures.LOSS] for stage in stages] == pytest.approx(losses[step])
    page = (trained / "run_report.html").read_text()
    assert "finished after 8 batches" in page and page.count("<svg") == page.count("<figure") >= 6
    assert len(page.encode()) < 1_000_000


def test_the_page_takes_nothing_from_a_network_and_names_its_pictures(run: Path) -> None:
    assert script("report.py", run).returncode == 0
    page = (run / "run_report.html").read_text()
    links = re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?([^"\')\s>]+)', page)
    assert all(link.startswith(("#", "data:")) for link in links), links
    labels = re.findall(r'<figure role="img" aria-label="([^"]+)"', page)
    assert len(labels) == page.count("<svg") and any("stage 1 computes" in label for label in labels)


def test_predicted_waiting_stands_beside_the_measured(run: Path) -> None:
    """With the work of a perfect run the prediction is what was measured."""
    found = compare(RunRecord.read(run), History.read(run))
    assert found is not None and len(found.stages) == 2
    page = script("report.py", run)
    assert page.returncode == 0
    for row in found.stages:
        assert f"<td>{100 * row.measured:.1f}%</td>" in (run / "run_report.html").read_text()
    rows = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    waits = [found.stages[k].by_operations for k in range(2)]
    for row in rows:
        for stage, wait in zip(row.get("stages", ()), waits, strict=False):
            stage |= {measures.WAITING: wait, measures.BATCH_TIME: 0.25}
    (run / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    again = compare(RunRecord.read(run), History.read(run))
    assert again is not None and again.batch_time == pytest.approx(0.25, rel=1e-6)
    assert [row.by_measured_work for row in again.stages] == pytest.approx(waits, abs=1e-6)


def test_a_running_and_a_failed_run_have_a_page_too(run: Path) -> None:
    record = json.loads((run / "run.json").read_text())
    record["ended"] = None
    record["command"] += ["<script>alert(1)</script>"]
    (run / "run.json").write_text(json.dumps(record))
    lines = (run / "history.jsonl").read_text().splitlines()
    (run / "history.jsonl").write_text("\n".join(lines[:3]) + '\n{"step": 4, "tra')
    done = script("report.py", run)
    assert done.returncode == 0 and done.stdout == f"report in {run / 'run_report.html'}\n", done.stderr
    page = (run / "run_report.html").read_text()
    assert "of 8 batches reported" in page and "<script>" not in page and "&lt;script&gt;" in page
    (run / "history.jsonl").unlink()
    assert script("report.py", run).returncode == 0
    assert "Nothing was reported yet" in (run / "run_report.html").read_text()


def test_what_is_no_run_is_refused_in_a_sentence(run: Path, tmp_path: Path) -> None:
    assert_one_sentence(script("report.py", tmp_path / "nothing"), "Give the --output folder of a train_lm.py run.")
    (run / "history.jsonl").write_text("no row\n" + (run / "history.jsonl").read_text())
    assert_one_sentence(script("report.py", run), "line 1 is not a row of a run's history")
    (run / "run.json").write_text('{"command": []}')
    assert_one_sentence(script("report.py", run), "is not the record of a run")


class _Counting(http.server.SimpleHTTPRequestHandler):
    """Serves a folder and remembers what was asked for."""

    def do_GET(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        super().do_GET()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """A folder's address, and the paths that are asked for there."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *args: _Counting(*args, directory=str(folder)))
    server.asked = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server.asked  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)")
@pytest.mark.parametrize("width", [1280, 500])
def test_a_browser_renders_it_without_errors_and_asks_for_nothing_else(run: Path, tmp_path: Path, width: int) -> None:
    """Headless Chromium: all pictures have a size, nothing is wider than the window, the console is empty, and of a
    server nothing is asked but the page."""
    assert script("report.py", run).returncode == 0
    probe = (
        "<script>const f=[...document.querySelectorAll('figure svg')].map(s=>s.getBoundingClientRect());"
        "document.title=JSON.stringify({pictures:f.length,small:f.filter(r=>r.width<200||r.height<100).length,"
        "wide:document.documentElement.scrollWidth-innerWidth})</script>"
    )
    page = (run / "run_report.html").read_text()
    (run / "probed.html").write_text(page.replace("</body>", f"{probe}</body>"))
    with served(run) as (address, asked):
        done = subprocess.run(
            [
                str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom",
                f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900",
                "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", f"{address}/probed.html",
            ],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert asked == ["/probed.html"], asked
    assert done.returncode == 0 and "CONSOLE" not in done.stderr, done.stderr[-2000:]
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None, done.stdout[:500]
    seen = json.loads(title[1])
    assert seen["pictures"] == page.count("<figure") >= 6 and seen["small"] == 0 and seen["wide"] <= 0, seen


STAGES = [
    {measures.LOSS: 5.25, measures.TRUNK_NORM: 0.5, measures.WAITING: 0.125, measures.TOKENS: 1234.5},
    {measures.LOSS: 5.5, measures.TRUNK_NORM: 0.25, measures.WAITING: 0.5, measures.TOKENS: 1200.0},
]


def test_a_terminal_shows_a_live_table_and_a_bar() -> None:
    console = Console(force_terminal=True, width=100, record=True, color_system=None)
    shown = Terminal(40, 8, console)
    shown.advance("losses 5.250 5.500")
    shown.report(9, STAGES, "")
    shown.say("batch 9: held-out losses")
    shown.close()
    text = console.export_text()
    assert "stages at batch 9" in text and "waiting" in text and "batch 9: held-out losses" in text, text
    for cell in ("5.250", "12%", "1,234", "50%", "9/40"):
        assert cell in text, (cell, text)


def test_many_stages_are_shown_from_both_ends() -> None:
    console = Console(width=100, record=True)
    console.print(stage_table(1, [{measures.LOSS: float(k)} for k in range(100)]))
    text = console.export_text()
    assert "0.000" in text and "99.000" in text and "50.000" not in text and "…" in text


def test_without_a_terminal_a_report_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines(40, 8)
    lines.advance("nothing")
    lines.report(9, STAGES, "losses of the exits 5.250 5.500 (batch 9)")
    words = "batch 9/40: losses of the exits 5.250 5.500 (batch 9); grad norm 0.5 0.25; waiting 12% 50%\n"
    assert capsys.readouterr().out == words


def test_without_a_terminal_there_is_a_line_a_minute(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of batches that take 25 seconds, reports of which are far away."""
    now = iter(range(0, 10_000, 25))
    monkeypatch.setattr(display, "time", SimpleNamespace(monotonic=lambda: float(next(now))))
    lines = Lines(40, 8)
    for text in ("", "", "", "losses", "losses", "losses"):
        lines.advance(text)
    said = capsys.readouterr().out.splitlines()
    assert said == ["batch 11/40 is trained", "batch 14/40: losses"]


def test_monitors_write_under_the_run_unless_the_configuration_names_a_path(tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "tensorboard": {"enabled": True},
        "csv_monitor": {"enabled": True, "output_path": "there"},
        "wandb": {},
    }
    made = monitors_under(tmp_path, given)
    assert made["tensorboard"]["output_path"] == str(tmp_path / "tensorboard")
    assert made["csv_monitor"] == given["csv_monitor"] and made["wandb"] == {}
    assert given["tensorboard"] == {"enabled": True}
