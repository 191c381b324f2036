"""What a strategy costs at K stages: work, and the time a batch that its schedule predicts, against 1F1B; or a head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

from ibp_deepspeed.config.interlocking import AuxHeadConfig, InterlockingConfig
from ibp_deepspeed.models import CausalLM, load_config
from ibp_deepspeed.models.costs import head_operations, layer_operations
from ibp_deepspeed.models.layers import copied_layers
from ibp_deepspeed.schedule.predict import Prediction, predict_timeline
from ibp_deepspeed.schedule.simulator import Costs
from ibp_deepspeed.strategy.timeline import Timeline

HEAD = 0.1  # forward, B and W of a private LM head, where a stage's forward is 1
MICRO_BATCHES = 4
REAL = {"llama2-7b": "32,000 tokens", "llama3-8b": "128,256 tokens"}
"""Models at whose size a head's price is said, and their vocabularies."""
STAGE_OF_LAYERS, SEQUENCE = 4, 4096


@dataclass(frozen=True)
class Price:
    """Ratios to backpropagation (1F1B without heads) at the same K and M.

    Attributes:
        work: of all stages together.
        time: a batch.
    """

    work: float
    time: float


def price(
    interlocking: Mapping[str, Any],
    stages: int,
    layers_per_stage: float,
    steps: int,
    *,
    micro_batches: int = MICRO_BATCHES,
    backward: str = "fused",
) -> Price:
    """The price of a training of ``steps`` batches, phases of its ``schedule`` by their length.

    M micro-batches, no latency; a layer's forward pass, B and W cost the same. A head that copies its LM head saves its
    W; a block in a head is a layer that is computed forward and backward, a copy of a layer has no W, a borrowed layer
    is one B.

    Args:
        interlocking: the block.
        stages: K.
        layers_per_stage: of the model.
        steps: batches.
        micro_batches: M.
        backward: whether B comes before W ("split") or both are one piece ("fused").
    """
    block = {**interlocking, "backward": backward}
    phases = block.pop("schedule", [])
    starts = [0, *(phase["from_step"] for phase in phases), steps]
    blocks = [block]
    for phase in phases:
        named = {"strategy": "nwise", "width": phase["width"], "mode": phase.get("mode", block.get("mode"))}
        blocks.append({**block, **named})
    size = stages, layers_per_stage, micro_batches
    prices = [_price(InterlockingConfig.parse(each), *size) for each in blocks]
    shares = [(end - start) / steps for start, end in pairwise(starts)]
    return Price(
        work=sum(share * p.work for share, p in zip(shares, prices, strict=True)),
        time=sum(share * p.time for share, p in zip(shares, prices, strict=True)),
    )


def asynchronous_price(stages: int, micro_batches: int = MICRO_BATCHES, *, heads: int = 0) -> Price:
    """Of a 1F1B pipeline that never drains: the same work, no bubble; all wait for a stage with a private head."""
    head = HEAD / 3
    longest = 1 + head * bool(heads)
    return Price(work=1 + head * heads / stages, time=longest * micro_batches / (micro_batches + stages - 1))


def _price(config: InterlockingConfig, stages: int, layers_per_stage: float, micro_batches: int) -> Price:
    options = config.aux_head
    head = borrowed = 0.0
    if options is not None:
        head = HEAD * (1.0 if options.readout == "private" else 2 / 3)
        head += (3 * options.blocks + 2 * copied_layers(options)) / layers_per_stage
        borrowed = options.borrow / layers_per_stage
    if config.width_for(stages) >= len(config.exits_for(stages)) and config.mode == "furthest":
        head = 0.0  # its heads only watch
    own = _predict(config, stages, micro_batches, Costs(head=head, borrowed_gradient=borrowed))
    without = InterlockingConfig(strategy="global", aux_head=None, backward="fused")
    baseline = _predict(without, stages, micro_batches, Costs(head=0.0))
    return Price(work=_work(own) / _work(baseline), time=own.batch_time / baseline.batch_time)


@cache
def _predict(config: InterlockingConfig, stages: int, micro_batches: int, costs: Costs) -> Prediction:
    timeline = Timeline(config, stages, micro_batches, aux_heads=config.aux_head is not None)
    return predict_timeline(timeline, costs)


def _work(prediction: Prediction) -> float:
    return sum((1 - idle) * prediction.batch_time for idle in prediction.idle)


def head_price(options: Mapping[str, Any], vocabulary: int, width: int, model: str) -> float:
    """Operations of a head (F, B and W), as a share of those of a stage of four decoder layers.

    Args:
        options: of ``aux_head``; ``negatives`` and ``rank`` are scaled to the model: the same part of its vocabulary
            and of its width. Beside a copied LM head it is the same number of ``negatives``, which is what matters
            there (``sampling.py``).
        vocabulary, width: of the model that the options were for.
        model: the name of a config of ours.
    """
    of = _real_model(model)
    sizes = {"negatives": of.vocab_size / vocabulary, "rank": of.hidden_size / width}
    if options.get("readout") == "shared":
        del sizes["negatives"]
    scaled = {key: round(value * sizes[key]) if key in sizes else value for key, value in options.items()}
    layer = layer_operations(of, SEQUENCE)[1]
    return head_operations(of, AuxHeadConfig(**scaled), SEQUENCE).total / (STAGE_OF_LAYERS * layer.total)


@cache
def _real_model(name: str) -> CausalLM:
    return CausalLM(load_config(name), seed=0)
