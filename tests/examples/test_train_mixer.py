"""The example of a model of one's own, with the launcher that its first lines start it with."""

from __future__ import annotations

import json
import re

from tests.commands import deepspeed
from tests.forks import ROOT

EXAMPLE = ROOT / "examples" / "train_mixer.py"


def test_modules_heads_loss_data_and_optimizer_of_ones_own_learn_to_read() -> None:
    """Guessing is right in a tenth; both stages say the same of both exits. It fits a page."""
    done = deepspeed(2, EXAMPLE)
    assert done.returncode == 0, done.stdout + done.stderr
    # not by lines: unbuffered, print writes a line and its end apart, and the other process may write between
    said = re.findall(r"stage (\d): loss [\d.]+, held-out accuracy of the exits (\[[\d., ]+\])", done.stdout)
    assert {stage for stage, _ in said} == {"0", "1"} and len({found for _, found in said}) == 1, done.stdout
    assert min(json.loads(said[0][1])) > 0.8
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) <= 40
