"""What a strategy costs at K stages: work, and the time a batch that its schedule predicts, against 1F1B."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

from ibp_deepspeed.config.interlocking import InterlockingConfig
from ibp_deepspeed.schedule.predict import Prediction, predict_timeline
from ibp_deepspeed.schedule.simulator import Costs
from ibp_deepspeed.strategy.timeline import Timeline

HEAD = 0.1  # forward, B and W of a private LM head, where a stage's forward is 1
MICRO_BATCHES = 4


@dataclass(frozen=True)
class Price:
    """Ratios to backpropagation (1F1B without heads) at the same K and M.

    Attributes:
        work: of all stages together.
        time: a batch.
    """

    work: float
    time: float


def price(interlocking: Mapping[str, Any], stages: int, layers_per_stage: float, steps: int) -> Price:
    """The price of a training of ``steps`` batches, phases of its ``schedule`` by their length (see :func:`_price`)."""
    block = dict(interlocking)
    phases = block.pop("schedule", [])
    starts = [0, *(phase["from_step"] for phase in phases), steps]
    blocks = [block]
    for phase in phases:
        named = {"strategy": "nwise", "width": phase["width"], "mode": phase.get("mode", block.get("mode"))}
        blocks.append({**block, **named})
    prices = [_price(each, stages, layers_per_stage) for each in blocks]
    shares = [(end - start) / steps for start, end in pairwise(starts)]
    return Price(
        work=sum(share * p.work for share, p in zip(shares, prices, strict=True)),
        time=sum(share * p.time for share, p in zip(shares, prices, strict=True)),
    )


def _price(interlocking: Mapping[str, Any], stages: int, layers_per_stage: float) -> Price:
    """The price of an interlocking block, M = 4, no latency; B and W cost a forward pass each, and are one piece.

    A head that copies its LM head saves its W; a block in a head is a layer that is computed
    forward and backward, a borrowed layer one B.
    """
    config = InterlockingConfig.parse({"backward": "fused", **interlocking})
    options = config.aux_head
    head = borrowed = 0.0
    if options is not None:
        head = HEAD * (1.0 if options.readout == "private" else 2 / 3) + 3 * options.blocks / layers_per_stage
        borrowed = options.borrow / layers_per_stage
    if config.width_for(stages) == stages and config.mode == "furthest":
        head = 0.0  # its heads only watch
    own = _predict(config, stages, Costs(head=head, borrowed_gradient=borrowed))
    baseline = _predict(InterlockingConfig(strategy="global", aux_head=None, backward="fused"), stages, Costs(head=0.0))
    return Price(work=_work(own) / _work(baseline), time=own.batch_time / baseline.batch_time)


@cache
def _predict(config: InterlockingConfig, stages: int, costs: Costs) -> Prediction:
    timeline = Timeline(config, stages, MICRO_BATCHES, aux_heads=config.aux_head is not None)
    return predict_timeline(timeline, costs)


def _work(prediction: Prediction) -> float:
    return sum((1 - idle) * prediction.batch_time for idle in prediction.idle)
