"""Stages of a real model that read packed windows: the engine against the reference made of the same layers."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import torch

from ibp_deepspeed import InterlockingConfig
from ibp_deepspeed.batches import position_ids
from ibp_deepspeed.data import MicroBatchLoader
from ibp_deepspeed.documents import Documents
from ibp_deepspeed.models.build import pipeline_module
from ibp_deepspeed.models.causal_lm import CausalLM
from tests.models.test_causal_lm import SEQUENCE, VOCAB, tiny
from tests.prepared_data import document_file
from tests.workers.parity import compare, stage_parameters
from tests.workers.readouts import COUNT, STAGES, engine_of, reference_of

BATCHES = 3


def loader() -> MicroBatchLoader:
    """Documents of 2 to 20 tokens."""
    lengths = np.random.default_rng(0).integers(2, 21, 12)
    file = document_file(lengths.tolist())
    file.tokens[:] = file.tokens % VOCAB
    return MicroBatchLoader(file, SEQUENCE, 4)


def sample(row: Any) -> tuple[Any, Any, Documents | None]:
    """As the reference takes it."""
    return row[0], row[1], Documents.of(position_ids(row), torch.device("cpu"))


def run_case(case: dict[str, Any]) -> dict[str, float]:
    config = InterlockingConfig.parse(case["interlocking"])
    dropout = dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.0) if case["model"] == "gpt2" else {}
    model = CausalLM(tiny(case["model"], num_hidden_layers=5, **dropout))
    module = pipeline_module(model, config, STAGES, token_counts=torch.arange(model.vocab_size))
    module.activation_checkpoint_interval = case.get("recompute", 0)
    engine = engine_of(case["interlocking"], module)
    reference = reference_of(model, config, module)
    optimizer = torch.optim.SGD([p for k in range(STAGES) for p in reference.parameters(k)], lr=0.3, momentum=0.9)
    rows = list(islice(loader(), BATCHES * COUNT))
    worst, stage = {"loss": 0.0, "difference": 0.0}, engine.stage_id
    reported = max(module.objectives, default=None)  # with borrowed layers the first stage has no head
    for batch in range(BATCHES):
        now = rows[batch * COUNT : (batch + 1) * COUNT]
        loss = engine.train_batch(iter(now))
        crossing, apart = reference.losses(now[0][0], now[0][1])[stage], reference.losses(*sample(now[0]))[stage]
        worst["difference"] = max(worst["difference"], abs(crossing.item() - apart.item()))
        losses = reference.accumulate([sample(row) for row in now])
        if reported is not None:
            worst["loss"] = max(worst["loss"], abs(loss.item() / losses[reported].item() - 1))
        optimizer.step()
        optimizer.zero_grad()
    want = reference.evaluate([sample(row) for row in rows])
    worst["eval"] = ((engine.eval_batch(iter(rows), len(rows)) - want).abs() / want).max().item()
    worst["parameter"] = compare(list(module.parameters()), stage_parameters(reference, stage))
    worst["recomputations"] = engine.recomputations
    engine.close()
    return worst
