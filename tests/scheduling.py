"""Which testing process runs what: tests that share something dear stay together, and long ones come first."""

from __future__ import annotations

import pytest
from xdist.scheduler import LoadScopeScheduling

# Their tests wait for one launch, or one run, that a fixture makes for all of them. (pytest-xdist's own groups are
# suffixes of names, which its release 3.8 no longer gets into those of pytest 9.2.)
_TOGETHER = (
    "engine/test_shared_readout.py",
    "engine/test_engine.py",
    "scripts/test_scripts.py",
    "scripts/test_dialogue_data.py",
    "scripts/test_fine_tuning.py",
)
# Longest first, so that no process ends with a long one alone; everything else takes seconds.
_FIRST = (
    "engine/test_parity.py",
    *_TOGETHER,
    "engine/",
    "scripts/",
    "checkpoint/",
    "benchmarks/",
    "docs/",
    "schedule/",
)


class Scheduling(LoadScopeScheduling):
    """pytest-xdist's units of work: a file whose tests stay together, or one test."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return file if file.removeprefix("tests/") in _TOGETHER else nodeid


def longest_first(items: list[pytest.Item]) -> None:
    """Put tests into the order in which they should start."""
    items.sort(key=lambda item: _place(item.nodeid.removeprefix("tests/")))


def _place(name: str) -> int:
    return next((place for place, start in enumerate(_FIRST) if name.startswith(start)), len(_FIRST))
