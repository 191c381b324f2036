"""The launches of other tests: a rank that breaks, dies or hangs fails its test in the end, and says what it said."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.forks import end, fork
from tests.launch import launch


@pytest.mark.parametrize(("case", "code"), [("raises", 1), ("dies", 7), ("hangs", None)])
def test_a_rank_that_misbehaves_fails_the_test_with_its_output(case: str, code: int | None) -> None:
    run = launch("misbehaving", 2, [case], timeout=5 if case == "hangs" else 60, end_with_first_failure=True)
    assert run.codes[1] == code and run.reports == [None, None]
    with pytest.raises(AssertionError, match="--- rank 1, exit") as failed:
        run.check()
    assert "rank 1 was here" in str(failed.value)
    assert case != "raises" or "ValueError: this rank broke" in str(failed.value)


def _count_threads_of_the_server() -> None:
    print(len(os.listdir(f"/proc/{os.getppid()}/task")))


def test_what_is_forked_has_one_thread(tmp_path: Path) -> None:
    """Nothing that the server imports has begun to compute: its children would miss the threads."""
    path = tmp_path / "threads"
    process = fork(_count_threads_of_the_server, environment=os.environ, stdout=path, stderr=path)
    assert end([process], 60) == [0] and path.read_text() == "1\n"
