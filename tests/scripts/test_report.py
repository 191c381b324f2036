"""What train_lm.py says of the machine, on cards that are not here."""

from __future__ import annotations

import re

import pytest

from ibp_deepspeed.commands.training.report import Machine, Speed, end_line, start_lines
from tests.commands import ranks, script
from tests.scripts.settings import SMALL

H100 = "NVIDIA H100 80GB HBM3"
GIB = 2**30


def test_the_start_names_cards_memory_backend_and_groups() -> None:
    groups = [(4, "nccl"), (4, "nccl"), (1, "nccl"), (4, "gloo")]
    machine = Machine(4, "nccl", groups, card=H100, card_memory=80 * GIB, cards=4)
    assert start_lines(machine) == [
        f"4 × {H100} with 80.0 GiB over nccl",
        "process groups of rank 0: 1 of 1 rank over nccl, 1 of 4 ranks over gloo, 2 of 4 ranks over nccl",
    ]


def test_the_newest_batches_say_how_fast_it_is() -> None:
    """Twenty of them, and never the first, which warms up, if there is another."""
    assert Speed(1, [9.0]).recent() == 9.0
    assert Speed(1, [9.0, 1.0, 2.0]).recent() == 1.5
    assert Speed(1, [9.0] * 30 + [1.0] * 20).recent() == 1.0


def test_processes_that_share_a_card_are_counted_and_its_throughput_is_theirs_together() -> None:
    machine = Machine(4, "gloo", card=H100, card_memory=80 * GIB, cards=1)
    assert start_lines(machine)[0] == f"1 × {H100} with 80.0 GiB, shared by 4 processes over gloo"
    assert "800 tokens/s a GPU" in end_line(machine, Speed(400, [0.5]), 1.0, [GIB])


def test_the_end_has_memory_throughput_and_mfu() -> None:
    """989e12 · 0.4 operations a second, spread over what a token needs, on each of two GPUs."""
    machine = Machine(2, "nccl", card=H100, card_memory=80 * GIB, cards=2)
    speed = Speed(2000, [9.0, 1.0, 1.0])  # the first batch warms up
    needed = 0.4 * 989e12 / 1000
    assert end_line(machine, speed, needed, [3 * GIB, 5 * GIB]) == (
        "peak memory 3.00 GiB on rank 0, 5.00 GiB at most on a rank; 1,000 tokens/s a GPU, MFU 40.0%"
    )


@pytest.mark.parametrize("card", [None, "NVIDIA GeForce RTX 2080"])
def test_without_a_known_peak_there_is_no_mfu(card: str | None) -> None:
    line = end_line(Machine(1, "gloo", card=card, cards=1), Speed(100, [2.0]), 1e6, [GIB])
    assert line == f"peak memory 1.00 GiB on rank 0; 50 tokens/s a {'GPU' if card else 'process'}"


def test_a_run_that_trained_nothing_has_no_throughput() -> None:
    assert end_line(Machine(1, "gloo"), Speed(100), 1.0, [GIB]) == "peak memory 1.00 GiB on rank 0"


def test_training_says_it_on_cpu_processes(data: object, config: object, tmp_path: object) -> None:
    words = ("--deepspeed_config", config, "--data", data, "--steps", 2, "--eval-micro-batches", 1, *SMALL)
    done = ranks(2, "train_lm.py", *words, "--output", f"{tmp_path}/two")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\n2 CPU processes over gloo\nprocess groups of rank 0: " in done.stdout, done.stdout
    assert re.search(
        r"^peak memory [\d.]+ GiB on rank 0, [\d.]+ GiB at most on a rank; [\d,]+ tokens/s a process$",
        done.stdout,
        re.MULTILINE,
    ), done.stdout
    assert "MFU" not in done.stdout
    done = script("train_lm.py", "--one-process", "--stages", 2, *words, "--output", f"{tmp_path}/one")
    assert done.returncode == 0 and "\n1 CPU process over gloo\n2 stages" in done.stdout, done.stdout
