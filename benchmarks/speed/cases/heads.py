"""One head's forward and backward pass: time and peak memory against full logits.

The vocabulary product on every stage is the price of the method. ``naive``: full logits, cross entropy, autograd.
Ours: chunks of tokens, at several sizes; a readout that is only read (``shared``); a part of the positions
(``aux_tokens``); a readout of low rank; a sample of the vocabulary (``negatives``: four times the width), trained and
only read. The losses show which of them compute the same.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.speed.harness import Row, Spread, interleaved
from ibp_deepspeed.objectives import fused_cross_entropy
from ibp_deepspeed.objectives.cross_entropy import CausalLMLoss, LazyLogits
from ibp_deepspeed.objectives.sampled_softmax import NegativeSample
from ibp_deepspeed.objectives.token_sampling import TokenSample

RANK, FRACTION = 64, 0.25


def give_memory_back() -> None:
    """Have the C library return a freed tensor's memory at once (else it keeps it, and no peak is seen)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 2**18)


_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h


class Memory:
    """Peak memory of this process, or of the accelerator, above what it holds before."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
            self._before = _status("VmRSS")

    def peak(self) -> int:
        """Bytes."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated() - self._before
        return _status("VmHWM") - self._before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{key}:")))


class Contenders:
    """Heads on the same hidden states, labels and weights.

    Args:
        tokens, width, vocabulary: sizes.
        device: where.
        dtype: of states and weights.
    """

    def __init__(self, tokens: int, width: int, vocabulary: int, device: torch.device, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(device, dtype)

        self.hidden = normal(tokens, width).requires_grad_()
        self.labels = torch.randint(vocabulary, (tokens,), generator=generator).to(device)
        self.weight = nn.Parameter(normal(vocabulary, width))
        self.negatives = NegativeSample(min(4 * width, vocabulary), 0)
        self.factors = nn.Parameter(normal(RANK, width)), nn.Parameter(normal(vocabulary, RANK))

    def all(self) -> dict[str, Callable[[], Tensor]]:
        """Name → its loss, with the graph."""
        full = (self.weight,)
        contenders: dict[str, Callable[[], Tensor]] = {"naive": self.naive}
        for chunk in (128, 512, None):
            contenders[f"chunks of {chunk or '64 MiB'}"] = partial(self.ours, full, chunk)
        linear = nn.Linear(self.weight.shape[1], self.weight.shape[0], bias=False, device="meta")
        linear.weight = self.weight
        if fused_cross_entropy.applies(linear, self.hidden):
            contenders["fused kernel"] = lambda: CausalLMLoss()(LazyLogits(self.hidden, linear, full), self.labels)
        contenders["shared readout"] = partial(self.ours, full, None, trained=False)
        contenders[f"aux_tokens {FRACTION}"] = partial(self.ours, full, None, sample=TokenSample(FRACTION, 0))
        contenders[f"rank {RANK}"] = partial(self.ours, self.factors, None)
        sampled = f"negatives {self.negatives.size}"
        contenders[sampled] = partial(self.over_negatives, linear, full)
        copied = nn.Linear(self.weight.shape[1], self.weight.shape[0], bias=False, device="meta")
        copied.weight = nn.Parameter(self.weight.detach(), requires_grad=False)
        contenders[f"shared readout, {sampled}"] = partial(self.over_negatives, copied, ())
        return contenders

    def over_negatives(self, readout: nn.Linear, trained: tuple[nn.Parameter, ...]) -> Tensor:
        """Over the labels and a draw of the vocabulary."""
        outputs = LazyLogits(self.hidden, readout, trained)
        return self.negatives.cross_entropy(outputs, self.labels, batch=0, micro_batch=0, loss=0)

    def naive(self) -> Tensor:
        """Full logits."""
        logits = self.hidden @ self.weight.T
        return nn.functional.cross_entropy(logits.float(), self.labels)

    def ours(
        self,
        weights: tuple[nn.Parameter, ...],
        chunk: int | None,
        *,
        trained: bool = True,
        sample: TokenSample | None = None,
    ) -> Tensor:
        """Lazy logits through these weights, one after the other."""

        def readout(rows: Tensor) -> Tensor:
            for weight in weights:
                rows = rows @ (weight if trained else weight.detach()).T
            return rows

        outputs = LazyLogits(self.hidden, readout, weights if trained else ())
        labels = self.labels
        if sample is not None:
            outputs, labels = sample.select(outputs, labels, 0, 0)
        return CausalLMLoss(chunk)(outputs, labels)

    def clear(self) -> None:
        """Forget all gradients."""
        for tensor in (self.hidden, self.weight, *self.factors):
            tensor.grad = None


def measure_once(contenders: Contenders, loss: Callable[[], Tensor]) -> tuple[float, int, float]:
    """Seconds, peak bytes and the loss of one forward and backward pass."""
    contenders.clear()
    device = contenders.hidden.device
    memory = Memory(device)
    start = time.perf_counter()
    value = loss()
    value.backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return seconds, memory.peak(), value.item()


COLUMNS: dict[str, Callable[[Row], str]] = {
    "vocabulary": lambda row: f"{row['vocabulary']:,}",
    "": lambda row: row["contender"],
    "ms": lambda row: "{:.0f} ({:.0f} … {:.0f})".format(*row["ms"]),
    "time against naive": lambda row: f"{row['time_ratio']:.2f}",
    "peak MiB": lambda row: f"{row['peak_bytes'] / 2**20:.0f}",
    "peak against naive": lambda row: f"{row['peak_ratio']:.2f}",
    "loss": lambda row: f"{row['loss']:.5f}",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The case's options."""
    parser.add_argument(
        "--vocabularies", type=int, nargs="+", default=[32_000, 128_000], help="V, tokens of the vocabulary"
    )
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of a micro-batch")
    parser.add_argument("--width", type=int, default=256, help="hidden size")
    parser.add_argument("--repeats", type=int, default=3, help="interleaved; medians count")


def run(args: argparse.Namespace) -> list[Row]:
    """All vocabularies, on the GPU in bf16 if there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    give_memory_back()
    rows: list[Row] = []
    for vocabulary in tqdm(args.vocabularies, desc="heads", unit="vocabulary"):
        contenders = Contenders(args.tokens, args.width, vocabulary, device, dtype)
        losses = contenders.all()
        for loss in losses.values():
            measure_once(contenders, loss)  # warm
        measured = interleaved([partial(measure_once, contenders, loss) for loss in losses.values()], args.repeats)
        for name, results in zip(losses, measured, strict=True):
            seconds, peaks, values = zip(*results, strict=True)
            rows.append(
                {
                    "contender": name,
                    "vocabulary": vocabulary,
                    "ms": Spread.of(seconds).scaled(1e3, 1),
                    "peak_bytes": int(Spread.of(peaks).median),
                    "loss": values[0],
                }
            )
        naive = rows[-len(losses)]
        for row in rows[-len(losses) :]:
            row["time_ratio"] = round(row["ms"][0] / naive["ms"][0], 3)
            row["peak_ratio"] = round(row["peak_bytes"] / max(1, naive["peak_bytes"]), 3)
    return rows


def draw(rows: list[Row], path: Any) -> None:
    """Time and peak memory against naive."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    vocabularies = sorted({row["vocabulary"] for row in rows})
    names = list(dict.fromkeys(row["contender"] for row in rows))
    for panel, key in zip(panels, ("time_ratio", "peak_ratio"), strict=True):
        for index, vocabulary in enumerate(vocabularies):
            values = [row[key] for row in rows if row["vocabulary"] == vocabulary]
            places = [place + 0.4 * index for place in range(len(names))]
            panel.barh(places, values, height=0.38, label=f"V = {vocabulary:,}")
        panel.set(yticks=range(len(names)), yticklabels=names, xlabel=key.replace("_ratio", " against naive"))
    panels[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
