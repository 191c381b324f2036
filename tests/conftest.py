"""Settings of all tests: CPU processes, one thread each; and the fixture that several files share."""

from __future__ import annotations

import os
import sys
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from ibp_deepspeed.data.tokenizer import TextTokenizer
    from tests.scheduling import Scheduling
    from tests.shared import Shared

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# torch's store asks a name server who connects, and holds a job up for 5 s where that drops a packet.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")
# The environment's own ninja, and a place for DeepSpeed's extension that is this path's alone: another ninja, or the
# same environment under another path, would build it anew, and again for the next process.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
os.environ.setdefault("TORCH_EXTENSIONS_DIR", f"{sys.prefix}/torch_extensions/{zlib.crc32(sys.prefix.encode()):08x}")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


@pytest.fixture(scope="session")
def tokenizer() -> TextTokenizer:
    # Imported here: the settings above have to come first.
    from ibp_deepspeed.data.tokenizer import train_tokenizer
    from tests.prepared_data import DOCUMENTS

    return train_tokenizer(DOCUMENTS, 300)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    """Folders that are made once in a run, whichever of pytest-xdist's workers needs them first."""
    from tests.shared import Shared

    own = tmp_path_factory.getbasetemp()
    return Shared(own.parent if "PYTEST_XDIST_WORKER" in os.environ else own)


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """Whether each matrix is to run whole (``--full``) or thinned (see :mod:`tests.covering`)."""
    return bool(request.config.getoption("--full"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the whole of each matrix of cases")
    parser.addoption("--full-if-changed", action="store_true", help="--full if its files are not those of the last")


def pytest_configure(config: pytest.Config) -> None:
    from tests import full_run

    if config.option.full_if_changed and full_run.is_due():
        config.option.full = True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    from tests.scheduling import longest_first

    longest_first(items)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduling:
    from tests.scheduling import Scheduling

    return Scheduling(config, log)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    how = "whole" if config.option.full else "thinned to all pairs of values (--full runs them whole)"
    terminalreporter.write_line(f"Matrices of cases: {how}.")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    from tests import full_run

    config = session.config
    everything = config.args_source is config.ArgsSource.TESTPATHS and not (
        config.option.keyword or config.option.markexpr or config.option.deselect or config.option.lf
    )
    if config.option.full and everything and exitstatus == 0 and not hasattr(config, "workerinput"):
        full_run.was_green()
