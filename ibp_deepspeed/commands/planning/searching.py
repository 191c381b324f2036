"""``plan.py --search``: the space from the command line, what was found, and the command that trains so."""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

from ibp_deepspeed.commands.planning.measured import profile_path
from ibp_deepspeed.commands.planning.subject import check_negatives
from ibp_deepspeed.errors import PlanError

if TYPE_CHECKING:
    from ibp_deepspeed.planner.search import Found, Result
    from ibp_deepspeed.planner.ways import Kind, Space

_GIB = 2**30
_NEGATIVES, _BESIDE_COPIES = 16_384, 4_096
"""Tokens drawn for private heads; for copies of the LM head, whose gradient then is within 3% of the exact one."""


def add_search(parser: argparse.ArgumentParser) -> None:
    """The options of --search."""
    text = "finds stages, micro-batches, strategy, partition, recomputation and heads for the same batch"
    add = parser.add_argument_group("instead of a given pipeline", text).add_argument
    add("--search", action="store_true", help="find the fastest pipeline that fits; --head fixes the kind of heads")
    add(
        "--devices-total",
        type=int,
        metavar="D",
        help="stages times pipelines side by side (default: none, needed with --search)",
    )
    add("--devices-a-host", type=int, metavar="N", help="pipelines are inside a host or fill hosts (default: one host)")
    add(
        "--batch-samples",
        type=int,
        metavar="N",
        help="samples of a batch, over all pipelines (default: none, needed with --search)",
    )
    add("--batch-tokens", type=int, metavar="N", help="the same in tokens (default: none)")


def find(args: argparse.Namespace) -> None:
    """Search, print, and write what --write and --json ask for."""
    from tqdm import tqdm

    from ibp_deepspeed.commands.planning.files import settings
    from ibp_deepspeed.planner.search import search

    found_for = space(args)
    progress = partial(tqdm, desc="search", leave=False, disable=None)
    result = search(found_for, args.tolerance / 100, progress=progress)
    show(found_for, result)
    if args.json is not None:
        args.json.write_text(as_json(result) + "\n", encoding="utf-8")
    if not result.best:
        raise PlanError(nothing(found_for, result))
    best = result.advised.way
    if args.write is not None:
        assert best.candidate.block is not None
        text = json.dumps(settings(best.job, best.candidate.block, best.samples, args), indent=2)
        args.write.write_text(text + "\n", encoding="utf-8")
        print(f"wrote {args.write}; train with\n\n    {command(best, args)}")


def space(args: argparse.Namespace) -> Space:
    """What --search looks at.

    Raises:
        InterlockingError: one sentence about the first thing that is wrong.
    """
    from ibp_deepspeed.commands.planning.job import check_optimizer, cluster
    from ibp_deepspeed.planner.ways import Space

    for name in args.given:
        option = f"--{name.replace('_', '-')}"
        raise PlanError(f"{option} is what --search finds, or can't search for: leave one of the two out.")
    if profile_path(args) is not None:
        raise PlanError(
            f"the profile {profile_path(args)} is of one micro-batch and one kind of head, --search tries others: "
            "leave one of the two out."
        )
    if args.devices_total is None:
        raise PlanError("--search needs --devices-total, the number of devices.")
    check_optimizer(args)
    hosts = args.devices_a_host or args.devices_total
    for name, value in (("devices_total", args.devices_total), ("devices_a_host", hosts)):
        if value < 1:
            raise PlanError(f"--{name.replace('_', '-')} is {value}: give at least 1.")
    return Space(args.devices_total, hosts, _samples(args), _kinds(args), cluster(args, None), args.zero)


def _samples(args: argparse.Namespace) -> int:
    samples, tokens, length = args.batch_samples, args.batch_tokens, args.sequence_length
    if length < 1:
        raise PlanError(f"--sequence-length is {length}: give at least 1.")
    if (samples is None) == (tokens is None):
        raise PlanError("--search needs the size of a batch: give one of --batch-samples and --batch-tokens.")
    if tokens is not None and (tokens < length or tokens % length):
        near = max(1, round(tokens / length)) * length
        raise PlanError(f"--batch-tokens {tokens} is no number of samples of {length} tokens: {near} would be.")
    count = int(samples if samples is not None else tokens // length)
    if count < 1:
        raise PlanError(f"--batch-samples is {count}: give at least 1.")
    return count


def _kinds(args: argparse.Namespace) -> list[Kind]:
    """That of --head, or private heads, a shared LM head, that over sampled tokens, and private heads over these."""
    from ibp_deepspeed.commands.training.arguments import parse_overrides
    from ibp_deepspeed.config.interlocking import InterlockingConfig
    from ibp_deepspeed.models import CausalLM
    from ibp_deepspeed.models.config import load_config
    from ibp_deepspeed.models.workload import with_muon, workload
    from ibp_deepspeed.planner.ways import Kind

    model = CausalLM(load_config(args.model, **parse_overrides(args.set)))
    given = parse_overrides(args.head, "--head")
    sampled = {"negatives": min(_NEGATIVES, model.vocab_size // 8)}
    copied_and_sampled = {"readout": "shared", "negatives": min(_BESIDE_COPIES, model.vocab_size // 4)}
    options: list[dict[str, Any]] = [given] if given else [{}, {"readout": "shared"}, copied_and_sampled, sampled]
    kinds = []
    for each in options:
        head = InterlockingConfig.parse({"aux_head": each}).aux_head
        assert head is not None
        if head.borrow:
            raise PlanError(f"--head borrow={head.borrow}: --search tries heads behind a borrowed layer by itself.")
        check_negatives(head, model)
        name = ", ".join(f"{key} = {value}" for key, value in each.items()) or "private"
        work = workload(
            model, head, samples=1, sequence_length=args.sequence_length, weight_bytes=4 if args.fp32 else 2
        )
        if args.optimizer == "Muon":
            work = with_muon(work, model, head)
        kinds.append(Kind(name, each, work))
    return kinds


def show(space: Space, result: Result) -> None:
    """The best, why each is what it is, and what was left out."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    work, where = space.kinds[0].workload, space.cluster.device
    hosts = space.devices // space.devices_a_host
    console.print(
        f"{work.name}: {space.devices} × {where.name} on {hosts} host{'s' if hosts > 1 else ''}, "
        f"batches of {space.samples:,} samples, {space.samples * work.tokens:,} tokens\n"
        f"{where.name}: {where.source}",
        soft_wrap=True,
    )
    table = Table("", "K", "replicas", "M", "samples", "strategy", "heads", "ms a batch", "tokens/s", "GiB", "loss")
    for number, found in enumerate(result.best, 1):
        table.add_row(str(number), *cells(space, found), style="bold" if found is result.advised else None)
    if result.best:
        console.print(table)
    for number, found in enumerate(result.best, 1):
        console.print(f"{number}: {why(found)}", soft_wrap=True)
    console.print(f"\n{result.looked_at:,} ways looked at, {result.simulated:,} simulated. Left out:", soft_wrap=True)
    for reason, count in sorted(result.excluded.items(), key=lambda item: -item[1]):
        console.print(f"  {count:,}: {reason}", soft_wrap=True)
    unmeasured = {f.way.kind for f in result.best if f.row.learned is not None and f.row.learned.head is None}
    for kind in sorted(unmeasured - {"private"}):
        console.print(f"With {kind} losses are those that were measured with private heads.", soft_wrap=True)
    if result.best:
        console.print(f"\nAdvice: {advice(result)}", soft_wrap=True)


def advice(result: Result) -> str:
    """What to do, and why."""
    first, advised, exact = result.preferred, result.advised, result.exact
    what = f"{advised.way.job.stages} stages, {advised.way.candidate.name}"
    if advised is exact and first is not exact:
        part = first.row.batch_time / exact.row.batch_time
        return (
            f"do not interlock here: {first.way.candidate.name} takes {part:.2f} of the time of what is exact, which "
            f"is not worth another loss. {what}."
        )
    if exact is None or advised is exact:
        return f"{what}, the fastest{' and exact' if advised is exact else ''}."
    learned = advised.known.learned
    said = f"; {learned.sentence()}" if learned is not None else "."
    return f"{what}, in {advised.row.batch_time / exact.row.batch_time:.2f} of the time of what is exact{said}"


def cells(space: Space, found: Found) -> list[str]:
    """A row of the table."""
    way, row = found.way, found.row
    slack = f", slack {way.slack}" if way.slack else ""
    tokens = space.samples * space.kinds[0].workload.tokens / row.batch_time
    return [
        str(way.job.stages),
        str(way.job.replicas),
        str(way.job.micro_batches),
        str(way.samples),
        way.candidate.name + slack,
        way.kind or "none",
        f"{1e3 * row.batch_time:.4g}",
        f"{tokens:,.0f}",
        f"{row.most_memory / _GIB:.1f}",
        "same" if row.exact else f"{row.learned.mean:+.1%}" if row.learned else "not measured",
    ]


def why(found: Found) -> str:
    """Where its time goes, and what it would not fit without."""
    way, row, known = found.way, found.row, found.known
    work = (known.least_time - known.reduction) / row.batch_time
    reduction = known.reduction / row.batch_time
    waits = max(0.0, 1 - work - reduction)
    layers = ",".join(str(n) for n in decoder_layers(way.job.bounds)) if way.job.stages <= 16 else "by " + way.cut
    parts = [f"{work:.0%} is the busiest stage's work", f"{waits:.0%} waiting"]
    if way.job.replicas > 1:
        parts.append(f"{reduction:.0%} summing gradients over replicas")
    text = f"{', '.join(parts)}; decoder layers {layers}, balanced by {way.cut}"
    if found.without_recompute is not None:
        text += f"; recomputes, without it {found.without_recompute / _GIB:.1f} GiB"
    return text + "."


def decoder_layers(bounds: Any) -> list[int]:
    """How many each stage has."""
    last = len(bounds) - 2
    return [bounds[k + 1] - bounds[k] - (k == 0) - (k == last) for k in range(last + 1)]


def nothing(space: Space, result: Result) -> str:
    """One sentence if no way is left, with the way out."""
    (reason, count), name = result.excluded.most_common(1)[0], space.cluster.device.name
    return (
        f"none of {result.looked_at:,} ways fits on {space.devices} × {name}; of most ({count:,}), {reason}: take more "
        "devices, --zero 1, shorter samples, or a smaller model."
    )


def command(way: Any, args: argparse.Namespace) -> str:
    """How to train so; micro-batches are in the JSON."""
    several = args.devices_a_host is not None and args.devices_a_host < args.devices_total
    launcher = "deepspeed --hostfile HOSTS" if several else f"deepspeed --num_accelerators {args.devices_total}"
    words = [
        launcher,
        "scripts/train_lm.py",
        f"--deepspeed_config {args.write}",
        "--data DATA",
        f"--model {args.model}",
        *([f"--set {' '.join(args.set)}"] if args.set else []),
        f"--stages {way.job.stages}",
        f"--partition {','.join(map(str, decoder_layers(way.job.bounds)))}",
        f"--sequence-length {args.sequence_length}",
    ]
    return " ".join(words)


def as_json(result: Result) -> str:
    """All numbers of the best, in seconds and bytes."""
    return json.dumps(
        {
            "looked_at": result.looked_at,
            "simulated": result.simulated,
            "complete": result.complete,
            "advice": advice(result) if result.best else "nothing fits",
            "excluded": dict(result.excluded),
            "advised": _as_json(result.advised) if result.best else None,
            "best": [_as_json(found) for found in result.best],
        },
        indent=1,
    )


def _as_json(found: Found) -> dict[str, Any]:
    from dataclasses import asdict

    job = found.way.job
    return {
        "stages": job.stages,
        "bounds": list(job.bounds),
        "replicas": job.replicas,
        "micro_batches": job.micro_batches,
        "samples": found.way.samples,
        "recompute": job.recompute,
        "heads": found.way.kind,
        "reason": why(found),
        "row": asdict(found.row),
    }
