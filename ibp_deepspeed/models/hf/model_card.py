"""The README.md of an exported model: what it is, how it was trained, how to load it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ibp_deepspeed.checkpoint import layout
from ibp_deepspeed.config.interlocking import InterlockingConfig
from ibp_deepspeed.models.exits.exits import Exits


def model_card(exits: Exits, exit_: int, parameters: int, results: Mapping[str, Any]) -> ModelCard:
    """A card for the hub.

    Args:
        exits: of the checkpoint.
        exit_: which one is exported, 1 … K.
        parameters: of the exported model.
        results: names and values to list, such as its perplexity.
    """
    description = exits.description
    trained = description.data is not None
    base = [description.init_from] if description.init_from else None
    tags = ["interlocking-backpropagation", "ibp_deepspeed"] if trained else ["ibp_deepspeed"]
    data = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=tags, base_model=base)
    rows = {"architecture": exits.hf_config.model_type, "parameters": f"{parameters:,}"}
    rows |= _training(exits) if trained else {}
    rows |= {name: str(value) for name, value in results.items()}
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    text = f"""---
{data.to_yaml()}
---

# {_title(exits, exit_)}

{_what(exits, exit_)}

| | |
|---|---|
{table}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```
"""
    settings = json.dumps({**description.settings, "interlocking": description.interlocking}, indent=1)
    return ModelCard(
        text + (f"\nThe configuration it was trained with:\n\n```json\n{settings}\n```\n" if trained else "")
    )


def _title(exits: Exits, exit_: int) -> str:
    part = "" if exit_ == len(exits) else f", exit {exit_} of {len(exits)}"
    return f"A {exits.hf_config.model_type} language model{part}"


def story(exits: Exits) -> str:
    """How a checkpoint was trained, in a sentence."""
    if exits.description.data is None:
        return f"The weights of {exits.description.init_from}, unchanged."
    if len(exits.placement.losses) == 1:
        return f"Trained with backpropagation in {len(exits)} pipeline stages."
    who = "each stage has" if len(exits.placement.losses) == len(exits) else f"exits {_numbers(exits)} have"
    return (
        f"Trained with interlocking backpropagation in {len(exits)} pipeline stages: {who} a loss, and layers are "
        "trained by the losses of the next exits."
    )


def _what(exits: Exits, exit_: int) -> str:
    if exit_ == len(exits):
        return story(exits)
    layers = exits.boundary(exit_) - 1
    blocks = exits.depth(exit_) - layers
    more = f", its {blocks} blocks as decoder layers" if blocks else ""
    return f"{story(exits)} This is a smaller model: the first {layers} decoder layers and the head behind them{more}."


def _training(exits: Exits) -> dict[str, str]:
    description = exits.description
    interlocking, stages = InterlockingConfig.parse(description.interlocking), len(exits)
    batches = layout.batches_of(exits.folder.name)
    rows = {
        "strategy": f"{interlocking.strategy}, width {interlocking.width_for(stages)} of {stages} stages",
        "exits": _numbers(exits),
        "mode": interlocking.mode,
        "layers of the stages": str(description.bounds),
        "batches": "unknown" if batches is None else f"{batches:,}",
        "sequence length": str(description.sequence_length),
    }
    extra = {"text": description.source, "began with the weights of": description.init_from}
    return rows | {name: value for name, value in extra.items() if value}


def _numbers(exits: Exits) -> str:
    """Of the exits that have a loss."""
    return ", ".join(str(loss + 1) for loss in exits.placement.losses)
