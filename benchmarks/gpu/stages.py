"""A decoder layer, eager and compiled, and a head: time, MFU, head against layer, peak memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.gpu.memory import estimated_peak
from benchmarks.speed.harness import Row
from ibp_deepspeed.config.interlocking import AuxHeadConfig
from ibp_deepspeed.models import CausalLM, load_config
from ibp_deepspeed.models.costs import head_operations, layer_operations
from ibp_deepspeed.models.devices import peak_flops
from ibp_deepspeed.models.profiling.measure import measure
from ibp_deepspeed.models.profiling.specimens import Specimens
from ibp_deepspeed.planner.profile import Piece

BATCH, TOKENS = 4, 2048
PIECES = {"forward": "F", "input_gradient": "B", "weight_gradient": "W", "backward": "B and W at once"}
COLUMNS: dict[str, Callable[[Row], str]] = {
    "model": lambda row: row["contender"],
    "piece": lambda row: row["piece"],
    "tokens": lambda row: f"{row['tokens']:,}",
    "": lambda row: "compiled" if row["compiled"] else "eager",
    **{
        f"{name}, ms": partial(lambda piece, row: f"{row['ms'][piece][0]:.2f}", piece) for piece, name in PIECES.items()
    },
    "MFU": lambda row: "–" if row["mfu"] is None else f"{row['mfu']:.0%}",
    "of an eager layer": lambda row: f"{row['of_layer']:.2f}",
    "peak MiB": lambda row: "–" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.0f}",
    "estimated MiB": lambda row: f"{row['estimated_bytes'] / 2**20:,.0f}",
}


def run(small: bool, shape: str) -> list[Row]:
    """A decoder layer and a private head eager, the layer compiled; what is compiled of a head is no more than that."""
    gpu = torch.cuda.is_available()
    device, dtype = (torch.device("cuda"), torch.bfloat16) if gpu else (torch.device("cpu"), torch.float32)
    batch, tokens = (1, 64) if small else (BATCH, TOKENS)
    model, size = CausalLM(load_config(shape), dtype=dtype), batch * tokens
    make = partial(Specimens, model, AuxHeadConfig(), samples=batch, sequence_length=tokens)
    things = [make().layer(1), make().head(), make(compiled=True).layer(1)]
    pieces = measure(things, device, 3 if small else 10)
    operations = [layer_operations(model, tokens)[1].total, head_operations(model, AuxHeadConfig(), tokens).total]
    message = size * model.hidden_size * dtype.itemsize
    return [
        {
            "contender": shape,
            "piece": piece.name,
            "compiled": thing.compiled,
            "tokens": size,
            "dtype": str(dtype).removeprefix("torch."),
            "ms": {name: [1e3 * value for value in getattr(piece, name).model_dump().values()] for name in PIECES},
            "mfu": _mfu(2 * size * needed, seconds(piece)),
            "of_layer": round(seconds(piece) / seconds(pieces[0]), 3),
            "peak_bytes": piece.peak,
            "estimated_bytes": estimated_peak(thing, piece.kept, message),
        }
        for thing, piece, needed in zip(things, pieces, [*operations, operations[0]], strict=True)
    ]


def seconds(piece: Piece) -> float:
    """There and back, at once."""
    return piece.forward.median + piece.backward.median


def _mfu(operations: float, seconds: float) -> float | None:
    peak = peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    return None if peak is None else round(operations / seconds / peak, 4)
