"""A loss that jumps is told once, with the samples of its batch; noise is not."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ibp_deepspeed.commands.reporting.page import write_page
from ibp_deepspeed.commands.training.agreement import Agreement
from ibp_deepspeed.commands.training.callbacks import Callbacks
from ibp_deepspeed.commands.training.loop import Run
from ibp_deepspeed.commands.training.spikes import LEAST, Spike, SpikeWatch
from ibp_deepspeed.data import MicroBatchLoader, open_tokens

COUNT, EXITS = 3, 2


def noisy(batches: int, seed: int, noise: float) -> list[list[float]]:
    """Losses that fall from 10 to 3 as a language model's, with noise; the first exit has none."""
    generator = np.random.default_rng(seed)
    falling = 3 + 7 * np.exp(-np.arange(batches) / 50)
    return [[math.nan, *row] for row in falling[:, None] + noise * generator.standard_normal((batches, 3))]


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.3])
def test_noise_is_no_spike_and_a_spike_is_told_once(noise: float) -> None:
    losses = noisy(3000, 3, noise)
    watch = SpikeWatch()
    assert [spike for row in losses for spike in watch.add(row)] == []
    losses[1000][2] += 1 + 10 * noise
    watch = SpikeWatch()
    found = [(batch, spike) for batch, row in enumerate(losses) for spike in watch.add(row)]
    assert len(found) == 1 and found[0][0] == 1000 and found[0][1].stage == 2 and found[0][1].batches == 100
    assert found[0][1].loss == losses[1000][2] and found[0][1].median == pytest.approx(3, abs=0.2)


def test_of_a_loss_that_stays_up_the_first_batch_is_told() -> None:
    watch = SpikeWatch()
    told: dict[int, list[int]] = {}
    for batch, row in enumerate(noisy(600, 1, 0.02)):
        for spike in watch.add([loss + 2 * (400 <= batch < 420) + 2 * (batch >= 430) for loss in row]):
            told.setdefault(batch, []).append(spike.stage)
    assert told == {400: [1, 2, 3], 430: [1, 2, 3]}


def test_what_is_not_finite_and_the_first_batches_are_left_alone() -> None:
    watch = SpikeWatch()
    assert not any(watch.add([1.0 if batch != LEAST - 2 else 50.0]) for batch in range(LEAST))
    assert watch.add([math.inf]) == watch.add([math.nan]) == []
    assert watch.add([9.0]) == [Spike(0, 9.0, 1.0, LEAST)]


class Spiking:
    """A pipeline whose losses become known some batches later, and which remembers what it was trained with.

    Args:
        spike: the batch whose second loss is high, from 1.
        late: batches.
    """

    global_rank, monitor = 0, None

    def __init__(self, spike: int, late: int, global_steps: int = 0) -> None:
        self.spike, self.late, self.global_steps = spike, late, global_steps
        self.trained: dict[int, list[int]] = {}

    def gradient_accumulation_steps(self) -> int:
        return COUNT

    def train_batch(self, data: MicroBatchLoader) -> None:
        self.global_steps += 1
        self.trained[self.global_steps] = [int(i) for _ in range(COUNT) for i in next(data)[2]]

    def losses_after(self, batch: int) -> list[tuple[torch.Tensor, int]]:
        known = range(batch + 1, self.global_steps + 1 - self.late)
        return [
            (torch.tensor([2.0, 9.0 if b == self.spike else 3.0]) + 0.01 * (b % 5), b)
            for b in known
            if b in self.trained
        ]

    def new_reports(self, patience: float) -> list[Any]:
        self.late = 0 if patience else self.late
        return []


def run(pipeline: Spiking, train: MicroBatchLoader, output: Path, steps: int) -> None:
    args = Namespace(steps=steps, output=output, save_interval=0, eval_interval=0, eval_micro_batches=0)
    throughput: Any = Namespace(tokens_per_batch=1, counted="tokens")
    interruption: Any = Namespace(asked=False)
    given: Any = pipeline
    data: Any = Namespace(train=train)
    evaluate: Any = None
    callbacks = Callbacks([], args, given)
    Run(given, args, throughput, Agreement(None, 0), interruption, evaluate, callbacks).train(data, lambda: None)


@pytest.mark.parametrize(("spike", "late"), [(40, 0), (41, 3), (45, 3)])
def test_a_run_names_the_exit_the_batch_and_its_samples(
    spike: int, late: int, data: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of both replicas, also for losses that come late, at the end of the run, and from an epoch before."""
    tokens = open_tokens(data, "train", verify=False)
    length = len(tokens.tokens) // (41 * COUNT * 4)  # an epoch ends between batches 40 and 41
    first, second = (
        MicroBatchLoader(tokens, length, 2, data_parallel_rank=rank, data_parallel_size=2) for rank in range(2)
    )
    assert 40 * COUNT <= first.micro_batches_per_epoch < 42 * COUNT
    pipeline, other = Spiking(spike, late), Spiking(spike, late)
    run(pipeline, first, tmp_path, 45)
    for _ in range(45):
        other.train_batch(second)
    rows = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    (told,) = (row for row in rows if "spikes" in row)
    loss = 9 + 0.01 * (spike % 5)
    assert told["step"] == spike
    assert told["spikes"] == [{"exit": 2, "loss": pytest.approx(loss), "median": pytest.approx(3.02)}]
    assert sorted(told["samples"]) == sorted(pipeline.trained[spike] + other.trained[spike])
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "jumped" in line)
    assert line.startswith(f"batch {spike}: the loss of exit 2 jumped to {loss:.3f} (median of the {spike - 1} batches")
    assert line.endswith(f"its samples are {', '.join(map(str, told['samples']))}")
    (tmp_path / "run.json").write_text((trained / "run.json").read_text())
    page = write_page(tmp_path).read_text()
    assert page.count(f"<td>2</td><td>{loss:.3f}</td><td>3.020</td>") == 1 and "Losses that jumped" in page


def test_a_run_that_goes_on_knows_the_losses_before(data: Path, tmp_path: Path) -> None:
    rows = ({"step": batch, "train": [2.0, 3.0 + 0.01 * (batch % 5)]} for batch in range(1, 41))
    (tmp_path / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = MicroBatchLoader(open_tokens(data, "train", verify=False), 32, 2, start=40 * COUNT)
    pipeline = Spiking(42, 0, 40)
    run(pipeline, train, tmp_path, 44)
    rows_now = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    (told,) = (row for row in rows_now if "spikes" in row)
    assert told["step"] == 42 and told["samples"] == pipeline.trained[42]
