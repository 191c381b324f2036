"""What train_lm.py says of the machine: at the start what it trains on, at the end memory, speed and MFU."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ibp_deepspeed.commands.training.plan import Plan

_GIB = 2**30
_WINDOW = 20  # batches


@dataclass(frozen=True)
class Machine:
    """What a run trains on, as its rank 0 sees it.

    Attributes:
        processes: of the job, on all hosts.
        backend: that the processes communicate over.
        groups: (ranks, backend) of each process group that rank 0 is in.
        card: name of the GPU, None on CPU.
        card_memory: its bytes.
        cards: GPUs of the job, fewer than processes where some share one.
    """

    processes: int
    backend: str
    groups: Sequence[tuple[int, str]] = ()
    card: str | None = None
    card_memory: int = 0
    cards: int = 0

    @classmethod
    def here(cls, gpu: bool) -> Machine:
        """The machine of this process, after the processes have met."""
        import torch
        import torch.distributed as dist

        processes, backend = dist.get_world_size(), dist.get_backend()
        # torch has no public list of groups; those that this rank is not in are not among them
        made = dist.distributed_c10d._world.pg_map
        groups = [(dist.get_world_size(group), dist.get_backend(group)) for group in made]
        if not gpu:
            return cls(processes, backend, groups)
        device = torch.cuda.get_device_properties(torch.cuda.current_device())
        local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
        cards = processes * min(local, torch.cuda.device_count()) // local
        return cls(processes, backend, groups, device.name, device.total_memory, cards)

    @property
    def units(self) -> int:
        """What throughput is divided by: GPUs, or CPU processes."""
        return self.cards if self.card else self.processes


def start_lines(machine: Machine) -> list[str]:
    """Card and memory, backend, process groups."""
    what = _counted(machine.processes, "CPU process", "CPU processes")
    if machine.card:
        share = "" if machine.cards == machine.processes else f", shared by {machine.processes} processes"
        what = f"{machine.cards} × {machine.card} with {machine.card_memory / _GIB:.1f} GiB{share}"
    lines = [f"{what} over {machine.backend}"]
    if machine.processes > 1:
        kinds = Counter(machine.groups)
        each = [f"{n} of {_counted(size, 'rank')} over {name}" for (size, name), n in sorted(kinds.items())]
        lines.append(f"process groups of rank 0: {', '.join(each)}")
    return lines


@dataclass
class Speed:
    """Times of a run's batches on rank 0; what lies between them, evaluations and checkpoints, does not count.

    The first batch warms up (kernels are loaded, buffers made) and is left out where there are others. The first stage
    may be some batches ahead of the last, and of its own device: short runs show more than lasts.
    """

    tokens_per_batch: int
    seconds: list[float] = field(default_factory=list)

    def recent(self) -> float:
        """Mean seconds of the newest batches; of the first one only while there is no other."""
        counted = self.seconds[1:][-_WINDOW:] or self.seconds
        return sum(counted) / len(counted)

    def tokens_per_second(self) -> float | None:
        """Of all GPUs or processes together; None before the first batch."""
        counted = self.seconds[1:] or self.seconds
        return self.tokens_per_batch * len(counted) / sum(counted) if counted else None


def mfu(tokens_per_second: float, flops_per_token: float, peak: float) -> float:
    """Model FLOPs utilisation of one GPU: what its tokens need (``models.costs.training_flops``) of what it can do."""
    return tokens_per_second * flops_per_token / peak


def end_line(
    machine: Machine, speed: Speed, flops_per_token: float, peaks: Sequence[int], counted: str = "tokens"
) -> str:
    """Peak memory of rank 0 and of the rank with most, tokens a second and MFU.

    Args:
        machine: of rank 0; MFU is left out where its peak is not known.
        speed: of rank 0.
        flops_per_token: of the training.
        peaks: peak memory in bytes by rank.
        counted: what speed is of.
    """
    from ibp_deepspeed.models.devices import peak_flops

    memory = f"peak memory {peaks[0] / _GIB:.2f} GiB on rank 0"
    if len(peaks) > 1:
        memory += f", {max(peaks) / _GIB:.2f} GiB at most on a rank"
    total = speed.tokens_per_second()
    if total is None:
        return memory
    each = total / machine.units
    words = f"{memory}; {each:,.0f} {counted}/s a {'GPU' if machine.card else 'process'}"
    peak = peak_flops(machine.card) if machine.card else None
    return words if peak is None else f"{words}, MFU {mfu(each, flops_per_token, peak):.1%}"


def flops_per_token(plan: Plan, sequence_length: int) -> float:
    """Of a run's model, with the heads that it trains."""
    from ibp_deepspeed.models.costs import training_flops

    heads = len(plan.interlocking.exits_for(plan.num_stages)) - 1
    return training_flops(plan.model, plan.interlocking.aux_head, heads, sequence_length)


def on_gpu() -> bool:
    """Whether DeepSpeed trains on a GPU."""
    from deepspeed.accelerator import get_accelerator

    return bool(get_accelerator().device_name() == "cuda")


def peak_memory() -> int:
    """Bytes: of tensors on the GPU at most, or of this process at most."""
    from ibp_deepspeed.engine.reporting import memory
    from ibp_deepspeed.measures import PEAK_MEMORY

    return round(memory()[PEAK_MEMORY] * 2**30)


def gathered_peaks(peak: int) -> list[int]:
    """Peak memory of all ranks on rank 0, ``[]`` on the others; all ranks call it."""
    import torch.distributed as dist

    if dist.get_rank() > 0:
        dist.gather_object(peak)
        return []
    peaks = [0] * dist.get_world_size()
    dist.gather_object(peak, peaks)
    return peaks


def _counted(number: int, one: str, several: str | None = None) -> str:
    return f"{number} {one if number == 1 else several or one + 's'}"
