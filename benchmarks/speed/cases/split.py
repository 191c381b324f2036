"""Real decoder layers, backward pass at once and in two: what B, W and both cost against autograd's one pass.

``fused``: autograd, at once. ``split``: the engine's, input gradient first, weight gradients of linear layers later.
``graph``: torch.distributed.pipelining's split of the autograd graph. ``twice``: the input gradient, then a whole
backward pass for the weights. One process, one thread; the memory is what a micro-batch holds between B and W.
"""

from __future__ import annotations

import argparse
import gc
import time
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from benchmarks.speed.harness import Row, Spread, interleaved
from ibp_deepspeed.stage.weight_gradients import WeightGradients, split_backward

KINDS = ("llama", "gpt2")
WAYS = ("fused", "split", "graph", "twice")


class Living(TorchDispatchMode):
    """Bytes of the storages that were made under it and are alive, but for some tensors'."""

    def __init__(self, ignored: list[Tensor]) -> None:
        super().__init__()
        self._ignored = {tensor.untyped_storage()._cdata for tensor in ignored}
        self._alive: dict[int, tuple[int, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(made):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                place = storage._cdata
                if place not in self._ignored and place not in self._alive:
                    gone = weakref.ref(storage, partial(self._forget, place))
                    self._alive[place] = (storage.nbytes(), gone)
        return made

    def _forget(self, place: int, gone: Any) -> None:
        self._alive.pop(place, None)

    def bytes(self, *without: Tensor) -> int:
        """Now."""
        places = {tensor.untyped_storage()._cdata for tensor in without}
        return sum(size for place, (size, _) in self._alive.items() if place not in places)


class Stage:
    """Layers with one of the ways to go back through them."""

    def __init__(self, kind: str, way: str, arguments: argparse.Namespace) -> None:
        self.layers = _layers(kind, arguments.width, arguments.layers).to(_dtype(arguments))
        self.way, self.parameters = way, list(self.layers.parameters())
        self._later, self._queue = WeightGradients(), list[Callable[[], None]]()
        self._rest: Any = None
        if way == "split":
            split_backward(self.layers, self._later)

    def input_gradient(self, outputs: Tensor, inputs: Tensor, gradient: Tensor) -> Tensor | None:
        """B, and whatever comes with it."""
        if self.way == "twice":
            self._rest = outputs, gradient
            return torch.autograd.grad(outputs, inputs, gradient, retain_graph=True)[0]
        if self.way == "graph":
            from torch.distributed.pipelining._backward import stage_backward_input

            found, self._rest = stage_backward_input([outputs], [gradient], [inputs], iter(self.parameters))
            return found[0]
        with self._later.put_off(self._queue) if self.way == "split" else self._later.left_out():
            torch.autograd.backward(outputs, gradient)
        return inputs.grad

    def weight_gradients(self) -> None:
        """W, what is left of it."""
        if self.way == "twice":
            outputs, gradient = self._rest
            self._rest = None
            torch.autograd.backward(outputs, gradient, inputs=self.parameters)
        elif self.way == "graph":
            from torch.distributed.pipelining._backward import stage_backward_weight

            stage_backward_weight(iter(self.parameters), self._rest)
            self._rest = None
        while self._queue:
            self._queue.pop(0)()


def _layers(kind: str, width: int, layers: int) -> nn.Sequential:
    from transformers import AutoConfig

    from ibp_deepspeed.models import CausalLM

    heads = max(1, width // 64)
    sizes: dict[str, Any] = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    if kind == "gpt2":
        sizes = {"n_embd": width, "n_layer": layers, "n_head": heads}
        sizes |= {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    else:
        sizes["intermediate_size"] = width * 8 // 3 // 8 * 8
    model = CausalLM(AutoConfig.for_model(kind, vocab_size=64, **sizes))
    return nn.Sequential(*map(model.build_layer, range(1, layers + 1)))


def _dtype(arguments: argparse.Namespace) -> torch.dtype:
    return torch.bfloat16 if arguments.dtype == "bf16" else torch.float32


def _data(arguments: argparse.Namespace) -> tuple[Tensor, Tensor]:
    shape = (1, arguments.tokens, arguments.width)
    return torch.randn(shape, dtype=_dtype(arguments), requires_grad=True), torch.randn(shape, dtype=_dtype(arguments))


def timed(stage: Stage, arguments: argparse.Namespace) -> tuple[float, float, float]:
    """Seconds of this thread for the forward pass, B, and W."""
    inputs, gradient = _data(arguments)
    began = time.thread_time()
    outputs = stage.layers(inputs)
    forward = time.thread_time()
    stage.input_gradient(outputs, inputs, gradient)
    del outputs
    between = time.thread_time()
    stage.weight_gradients()
    return forward - began, between - forward, time.thread_time() - between


def held(stage: Stage, arguments: argparse.Namespace) -> tuple[int, int]:
    """Bytes of a micro-batch before B, and between B and W."""
    inputs, gradient = _data(arguments)
    for parameter in stage.parameters:
        parameter.grad = torch.zeros_like(parameter)
    known = [*stage.parameters, *(p.grad for p in stage.parameters if p.grad is not None), inputs, gradient]
    with Living(known) as living:
        outputs = stage.layers(inputs)
        before = living.bytes(outputs)
        found = stage.input_gradient(outputs, inputs, gradient)
        del outputs
        gc.collect()
        between = living.bytes(*([] if found is None else [found]))
        stage.weight_gradients()
    return before, between


COLUMNS: dict[str, Callable[[Row], str]] = {
    "layers": lambda row: f"{row['layers']} × {row['kind']}, {row['dtype']}",
    "": lambda row: row["contender"],
    "forward": lambda row: f"{row['forward']:.2f}",
    "B": lambda row: f"{row['B']:.2f}",
    "W": lambda row: f"{row['W']:.2f}",
    "B and W": lambda row: f"{row['both']:.2f}",
    "held between, of what is held before": lambda row: f"{row['held']:.2f}",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The case's options."""
    parser.add_argument("--width", type=int, default=512, help="hidden size")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a micro-batch")
    parser.add_argument("--layers", type=int, default=2, help="decoder layers")
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="kinds of Hugging Face's decoder layers"
    )
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"], help="to compute in")
    parser.add_argument("--repeats", type=int, default=15, help="interleaved; medians of ratios within a round count")


def run(args: argparse.Namespace) -> list[Row]:
    """All kinds and types."""
    torch.set_num_threads(1)
    rows: list[Row] = []
    for kind, dtype in tqdm([(k, d) for k in args.kinds for d in args.dtypes], desc="split", unit="set-up"):
        given = argparse.Namespace(**{**vars(args), "dtype": dtype})
        stages = {way: Stage(kind, way, given) for way in WAYS}
        sizes = {way: held(stage, given) for way, stage in stages.items()}
        jobs = [partial(timed, stage, given) for stage in stages.values()]
        rounds = dict(zip(stages, interleaved(jobs, args.repeats + 1), strict=True))
        for way in WAYS:
            pairs = list(zip(rounds[way], rounds["fused"], strict=True))[1:]  # the first one warms up
            before, between = sizes[way]
            rows.append(
                {
                    "kind": kind,
                    "layers": args.layers,
                    "dtype": dtype,
                    "contender": way,
                    "forward": _ratio([(own[0], peer[0]) for own, peer in pairs]),
                    "B": _ratio([(own[1], peer[1] + peer[2]) for own, peer in pairs]),
                    "W": _ratio([(own[2], peer[1] + peer[2]) for own, peer in pairs]),
                    "both": _ratio([(own[1] + own[2], peer[1] + peer[2]) for own, peer in pairs]),
                    "held": round(between / before, 3),
                }
            )
    return rows


def _ratio(pairs: list[tuple[float, float]]) -> float:
    return round(Spread.of([own / peer for own, peer in pairs]).median, 3)


def draw(rows: list[Row], path: Any) -> None:
    """B and W of each way."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(7.2, 3.4))
    names = [f"{row['contender']}\n{row['kind']}\n{row['dtype']}" for row in rows]
    panel.bar(names, [row["B"] for row in rows], label="B")
    panel.bar(names, [row["W"] for row in rows], bottom=[row["B"] for row in rows], label="W")
    panel.set_ylabel("of autograd's backward pass")
    panel.tick_params(axis="x", labelsize=6)
    panel.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
