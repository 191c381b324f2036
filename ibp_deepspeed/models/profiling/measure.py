"""A profile: all specimens of a model in interleaved rounds, and a message."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException
from tqdm import tqdm

from ibp_deepspeed.comm.message_time import message_seconds
from ibp_deepspeed.config.interlocking import AuxHeadConfig
from ibp_deepspeed.models.causal_lm import CausalLM
from ibp_deepspeed.models.devices import processor
from ibp_deepspeed.models.profiling.specimen import Specimen, Times
from ibp_deepspeed.models.profiling.specimens import Specimens
from ibp_deepspeed.models.profiling.subject import subject_of
from ibp_deepspeed.planner.profile import Message, Piece, Profile, Spread, checksum

WARM_UP = 2
MESSAGES = 50
"""The least that are sent: each takes little time."""
_ONE_NUMBER = 8  # bytes


def make_profile(
    model: CausalLM,
    name: str,
    options: AuxHeadConfig,
    *,
    dtype: torch.dtype,
    samples: int,
    sequence_length: int,
    repeats: int,
    compiled: bool = False,
    device: torch.device | None = None,
    messages: bool = True,
) -> Profile:
    """Measure a model's layers, head and messages on the device at hand.

    One layer at a time is on the device, so a model may be larger than its memory.

    Args:
        model: cut, its parameters of ``dtype``.
        name: of the model, for the reader.
        options: of the auxiliary head.
        dtype: fp32 or bf16.
        samples, sequence_length: of a micro-batch.
        repeats: rounds; medians count.
        compiled: layers as with ``"compile": true``.
        device: None: the GPU if there is one, else the CPU.
        messages: measure them too.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = samples * sequence_length * model.hidden_size * dtype.itemsize
    make = Specimens(model, options, samples=samples, sequence_length=sequence_length, compiled=compiled)
    pieces = measure(make.every(), device, repeats)
    message = measure_message(size, repeats) if messages else "it was not asked for"
    subject = subject_of(
        model,
        options,
        dtype="float32" if dtype == torch.float32 else "bfloat16",
        sequence_length=sequence_length,
        samples=samples,
        compiled=compiled,
    )
    return Profile(
        model=name,
        config_checksum=checksum(subject.config),
        subject=subject,
        message_bytes=size,
        torch=torch.__version__,
        repeats=repeats,
        layers=model.num_layers,
        pieces=pieces[:-1],
        head=pieces[-1],
        message=None if isinstance(message, str) else message,
        no_message=message if isinstance(message, str) else None,
        **_machine(device),
    )


def measure(things: Sequence[Specimen], device: torch.device, repeats: int) -> list[Piece]:
    """Rounds in which each is measured once: what disturbs the machine disturbs all alike."""
    times: list[list[tuple[Times, Times]]] = [[] for _ in things]
    about: list[dict[str, Any]] = [{} for _ in things]
    with tqdm(total=repeats * len(things), desc="profile", unit="piece", leave=False, disable=None) as bar:
        for round_ in range(repeats):
            for thing, found, extra in zip(things, times, about, strict=True):
                bar.set_postfix_str(thing.name)
                with thing.on(device):
                    for _ in range(WARM_UP if round_ == 0 else 1):  # its weights have just come, gradients don't exist
                        thing.micro_batch()
                    found.append(thing.micro_batch())
                    if round_ == 0:
                        extra.update(kept=thing.kept(), peak=_peak(thing, device))
                bar.update()
    return [_piece(*each) for each in zip(things, times, about, strict=True)]


def _piece(thing: Specimen, times: Iterable[tuple[Times, Times]], about: dict[str, Any]) -> Piece:
    whole, split = zip(*times, strict=True)
    return Piece(
        name=thing.name,
        layers=thing.layers,
        parameters=sum(p.numel() for p in thing.parameters),
        trained=sum(p.numel() for p in thing.parameters if p.requires_grad),
        forward=_spread([one.forward for one in (*whole, *split)]),
        input_gradient=_spread([one.input_gradient for one in split]),
        weight_gradient=_spread([one.weight_gradient for one in split]),
        backward=_spread([one.backward for one in whole]),
        **about,
    )


def measure_message(size: int, repeats: int) -> Message | str:
    """A message of ``size`` bytes between two processes, from the CPU over gloo or between two GPUs over NCCL.

    Returns:
        the times, or why there are none.
    """
    gpus = torch.cuda.device_count()
    if gpus == 1:
        return "there is one GPU, and a copy on it is no message"
    backend: Literal["gloo", "nccl"] = "nccl" if gpus else "gloo"
    try:
        small, large = message_seconds([_ONE_NUMBER, size], max(repeats, MESSAGES), backend)
    except (ProcessExitedException, ProcessRaisedException) as error:
        last = str(error).strip().splitlines()[-1]
        return f"the two processes failed over {backend}: {last}"
    return Message(backend=backend, size=size, seconds=_spread(large), latency=_spread(small))


def _spread(values: Sequence[float]) -> Spread:
    return Spread(median=statistics.median(values), low=min(values), high=max(values))


def _peak(thing: Specimen, device: torch.device) -> int | None:
    """Most bytes on a GPU in a micro-batch."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    thing.whole()
    return torch.cuda.max_memory_allocated(device)


def _machine(device: torch.device) -> dict[str, Any]:
    """Name, memory and threads of the device."""
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        return {"device": card.name, "memory": card.total_memory, "threads": None}
    return {"device": processor(), "memory": None, "threads": torch.get_num_threads()}
