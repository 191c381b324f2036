"""One stage on one device, in one process: the time of each piece of its work, for a planner to read.

Pieces of one micro-batch: ``forward``; ``input_product``, the input gradient (B), which keeps
the graph; ``backward``, the update's pass to weights and input; ``head``, an auxiliary head forward and backward. In
bf16 on a GPU, in fp32 at small shapes without one. MFU: the floating-point operations that the piece needs (2 a weight
and token forward, as many for each of B and W) divided by its time and the device's peak.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.speed.harness import Row, Spread, interleaved
from ibp_deepspeed.config.interlocking import AuxHeadConfig
from ibp_deepspeed.objectives.cross_entropy import CausalLMLoss
from models.devices import peak_flops

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"model_type": "llama", "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4},
    "gpt2-124m": {"model_type": "gpt2", "n_embd": 768, "n_head": 12, "vocab_size": 50257, "n_positions": 2048},
    "llama-1b": {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
    },
    "llama-7b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "vocab_size": 32_000,
    },
    "llama-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
    },
}
PIECES = ("forward", "input_product", "backward", "head")


@dataclass
class Stage:
    """Decoder layers of one shape with an auxiliary head, and a micro-batch.

    Attributes:
        trunk, head: modules.
        inputs: hidden states [B, S, H], a leaf.
        labels: next tokens [B, S].
        layers: their number.
        weights: of a layer's and of the head's matrices, for counting operations.
    """

    trunk: nn.Module
    head: nn.Module
    inputs: Tensor
    labels: Tensor
    weights: dict[str, int]
    layers: int

    @classmethod
    def make(
        cls, shape: str, layers: int, batch: int, tokens: int, device: torch.device, dtype: torch.dtype, compiled: bool
    ) -> Stage:
        """Built on the CPU, layer by layer, then moved."""
        from transformers import AutoConfig

        from models import CausalLM

        values = dict(SHAPES[shape])
        kind = values.pop("model_type")
        count = "n_layer" if kind == "gpt2" else "num_hidden_layers"
        model = CausalLM(AutoConfig.for_model(kind, **{count: layers, **values}), dtype=dtype)
        trunk: Any = nn.Sequential(*(model.build_layer(index) for index in range(1, layers + 1))).to(device)
        head: Any = model.aux_head(0, AuxHeadConfig()).to(device)
        weights = {"trunk": _matrices(trunk), "head": _matrices(head)}
        if compiled:
            trunk = torch.compile(trunk)
        inputs = torch.randn(batch, tokens, model.hidden_size, device=device, dtype=dtype, requires_grad=True)
        labels = torch.randint(model.vocab_size, (batch, tokens), device=device)
        return cls(trunk, head, inputs, labels, weights, layers)

    def micro_batch(self) -> dict[str, float]:
        """Seconds of each piece of one micro-batch."""
        self.inputs.grad = None
        for parameter in (*self.trunk.parameters(), *self.head.parameters()):
            parameter.grad = None
        seconds: dict[str, float] = {}
        clock = partial(_timed, seconds, self.inputs.device)
        outputs: Tensor = clock("forward", lambda: self.trunk(self.inputs))
        output_gradient = torch.randn_like(outputs)
        input_gradient = partial(torch.autograd.grad, outputs, self.inputs, output_gradient, retain_graph=True)
        clock("input_product", input_gradient)
        clock("head", partial(self._head, outputs.detach().requires_grad_()))
        clock("backward", partial(torch.autograd.backward, outputs, output_gradient))
        return seconds

    def _head(self, hidden: Tensor) -> None:
        CausalLMLoss()(self.head(hidden), self.labels).backward()

    def operations(self, piece: str) -> float:
        """Floating-point operations of a piece's matrix products, attention's scores included."""
        count = self.labels.numel()
        if piece == "head":
            return 6.0 * count * self.weights["head"]
        attention = 2.0 * self.labels.shape[1] * self.inputs.shape[-1] * self.layers  # causal: half of 4·S·H a token
        forward = count * (2.0 * self.weights["trunk"] + attention)
        return forward * (2 if piece == "backward" else 1)


def _matrices(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.dim() > 1)


def _timed(seconds: dict[str, float], device: torch.device, name: str, work: Callable[[], Any]) -> Any:
    _synchronise(device)
    start = time.perf_counter()
    result = work()
    _synchronise(device)
    seconds[name] = time.perf_counter() - start
    return result


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


COLUMNS: dict[str, Callable[[Row], str]] = {
    "shape": lambda row: row["contender"],
    "layers": lambda row: str(row["layers"]),
    "tokens": lambda row: f"{row['tokens']:,}",
    "": lambda row: "compiled" if row["compiled"] else "eager",
    **{f"{piece}, ms": partial(lambda piece, row: f"{row['ms'][piece][0]:.2f}", piece) for piece in PIECES},
    "MFU forward / backward": lambda row: "{} / {}".format(*(_percent(row["mfu"][p]) for p in ("forward", "backward"))),
    "peak MiB": lambda row: "–" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.0f}",
}


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.0%}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The case's options."""
    gpu = torch.cuda.is_available()
    shapes = ["gpt2-124m", "llama-1b", "llama-7b", "llama-8b"] if gpu else ["tiny"]
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=shapes, help="of a decoder layer")
    parser.add_argument("--layers", type=int, default=4 if gpu else 2, help="of the stage")
    parser.add_argument("--batch", type=int, default=4 if gpu else 1, help="sequences of a micro-batch")
    parser.add_argument("--tokens", type=int, default=2048 if gpu else 64, help="of a sequence")
    parser.add_argument("--repeats", type=int, default=10, help="interleaved; medians count")
    parser.add_argument("--eager-only", action="store_true", help="without torch.compile")


def run(args: argparse.Namespace) -> list[Row]:
    """A row for each shape, eager and compiled."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows: list[Row] = []
    for shape in tqdm(args.shapes, desc="profile", unit="shape"):
        for compiled in (False,) if args.eager_only else (False, True):
            stage = Stage.make(shape, args.layers, args.batch, args.tokens, device, dtype, compiled)
            rows.append({"contender": shape, "compiled": compiled, **measure(stage, args.repeats)})
    return rows


def measure(stage: Stage, repeats: int) -> Row:
    """Times, MFU and peak memory (of a GPU) of a stage's micro-batches."""
    device = stage.inputs.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        stage.micro_batch()  # warm, and compile
    (measured,) = interleaved([stage.micro_batch], repeats)
    spreads = {piece: Spread.of([each[piece] for each in measured]) for piece in PIECES}
    return {
        "layers": stage.layers,
        "batch": stage.labels.shape[0],
        "tokens": stage.labels.numel(),
        "dtype": str(stage.inputs.dtype).removeprefix("torch."),
        "ms": {piece: spread.scaled(1e3) for piece, spread in spreads.items()},
        "mfu": {piece: _mfu(stage.operations(piece), spreads[piece].median) for piece in PIECES},
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
    }


def _mfu(operations: float, seconds: float) -> float | None:
    peak = peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    return None if peak is None else round(operations / seconds / peak, 4)


def draw(rows: list[Row], path: Any) -> None:
    """The pieces of each row, stacked."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(7, 0.6 * len(rows) + 1.6))
    names = [f"{row['contender']}, {'compiled' if row['compiled'] else 'eager'}" for row in rows]
    left = [0.0] * len(rows)
    for piece in PIECES:
        values = [row["ms"][piece][0] for row in rows]
        panel.barh(names, values, left=left, label=piece)
        left = [a + b for a, b in zip(left, values, strict=True)]
    panel.set(xlabel="ms a micro-batch")
    panel.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
