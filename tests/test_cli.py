"""What a script keeps from its user."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from ibp_deepspeed import cli
from tests.forks import ROOT


@pytest.mark.parametrize("quiet", [True, False])
def test_deepspeeds_search_for_a_gpu_is_not_shown(quiet: bool) -> None:
    """In a process of its own: DeepSpeed looks once, as it is imported."""
    begin = "from ibp_deepspeed import cli; cli.quiet()" if quiet else ""
    code = f"{begin}\nimport deepspeed; deepspeed.utils.logger.warning('mine')"
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 0 and "mine" in said, said
    there_is_a_gpu = torch.cuda.is_available()
    assert ("Setting accelerator to CPU" in said) == (not quiet and not there_is_a_gpu), said


def test_options_are_given_by_their_whole_names(capsys: pytest.CaptureFixture[str]) -> None:
    parser = cli.parser("Words.\n\n    as they are")
    parser.add_argument("--steps")
    assert parser.parse_args(["--steps", "3"]).steps == "3" and "\n    as they are" in parser.format_help()
    with pytest.raises(SystemExit):
        parser.parse_args(["--step", "3"])
    assert "unrecognized arguments: --step" in capsys.readouterr().err


def test_a_process_outlives_who_reads_it() -> None:
    """A launcher goes first, or a connection: what is printed then is lost, what is saved is not."""
    code = (
        "import sys; from ibp_deepspeed import cli; cli.outlive_readers()\n"
        "print('hears', flush=True); sys.stdin.read()\n"
        "for stream in (sys.stdout, sys.stderr):\n"
        "    for line in ('lost', 'too'): print(line, file=stream, flush=True)\n"
        "open(sys.argv[1], 'w').write('saved')"
    )
    with tempfile.NamedTemporaryFile() as file:
        words = [sys.executable, "-c", code, file.name]
        end = subprocess.PIPE
        process = subprocess.Popen(words, cwd=ROOT, stdin=end, stdout=end, stderr=end)
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == b"hears\n"
        for pipe in (process.stdout, process.stderr, process.stdin):
            pipe.close()
        assert process.wait(timeout=60) == 0 and file.read() == b"saved"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            "OSError(errno.ENOSPC, 'No space left on device', 'history')",
            "can't write history: No space left on device.",
        ),
        ("OSError(errno.EDQUOT, 'Disk quota exceeded')", "can't write a file: Disk quota exceeded."),
    ],
)
def test_a_full_device_is_one_sentence_whatever_is_written(error: str, said: str) -> None:
    code = f"import errno; from ibp_deepspeed import cli\ndef main(phase): raise {error}\ncli.run(main)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == f"error: rank 0 {said}\n"


def test_one_rank_of_a_job_speaks() -> None:
    """Whoever asks first; also where the store has ended."""
    store = HashStore()
    assert cli.speaks_first(store) and not cli.speaks_first(store)

    class Gone:
        def add(self, key: str, amount: int) -> int:
            raise RuntimeError("Broken pipe")

    gone: Any = Gone()
    assert cli.speaks_first(gone) and cli.speaks_first(gone)
