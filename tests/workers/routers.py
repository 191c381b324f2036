"""Train a model with experts by the engine and by plain autograd, with and without the loss of its routers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ibp_deepspeed import initialize
from ibp_deepspeed.config.interlocking import InterlockingConfig
from ibp_deepspeed.models import CausalLM
from ibp_deepspeed.models.build import pipeline_module, virtual_pipeline
from ibp_deepspeed.models.routers import ROUTER_LOSS
from ibp_deepspeed.models.tuning import Tuning, parse_freeze
from tests.models.test_causal_lm import VOCAB, shifted, tiny
from tests.workers.parity import compare, stage_parameters

STAGES, LAYERS, COUNT, BATCHES = 3, 6, 2, 5


def model(case: dict[str, Any], balances: bool) -> CausalLM:
    config = tiny(
        "mixtral",
        num_hidden_layers=LAYERS,
        output_router_logits=balances,
        router_aux_loss_coef=1.0,
        attention_dropout=0.0,
    )
    frozen = parse_freeze(case["freeze"], LAYERS) if "freeze" in case else ()
    return CausalLM(config, tuning=Tuning(frozen=frozen))


def micro_batches(batch: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(batch)
    rows = [torch.randint(3, VOCAB, (2, 8), generator=generator) for _ in range(COUNT)]
    return [(ids, shifted(ids)) for ids in rows]


def run_case(case: dict[str, Any]) -> dict[str, float]:
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": COUNT,
        "optimizer": {"type": "SGD", "params": {"lr": 0.2}},
        "steps_per_print": BATCHES,
        "gradient_clipping": 0.0,
        "pipeline": {"activation_checkpoint_interval": int(case.get("checkpoint", False))},
        "interlocking": case["interlocking"],
    }
    interlocking = InterlockingConfig.parse(case["interlocking"])
    module = pipeline_module(model(case, True), interlocking, STAGES, [2, 2, 2])
    engine = initialize(model=module, config=config)[0]
    alike = {balances: virtual_pipeline(model(case, balances), config, STAGES, [2, 2, 2]) for balances in (True, False)}
    for batch in range(BATCHES):
        engine.train_batch(iter(micro_batches(batch)))
        for pipeline in alike.values():
            pipeline.train_batch(iter(micro_batches(batch)))
    own = [p for p in engine.module.parameters() if p.dim() > 1 or p.numel() > 1]
    found = {
        "parameter": compare(own, stage_parameters(alike[True].reference, engine.stage_id)),
        "without": compare(own, stage_parameters(alike[False].reference, engine.stage_id)),
        "expected": alike[True].reference.side_means[0][ROUTER_LOSS],
        "reported": alike[True].reference.side_means[0][ROUTER_LOSS],
    }
    reports = engine.new_reports(20.0)
    if engine.global_rank == 0:
        found["reported"] = reports[-1].stages[0][ROUTER_LOSS]
    engine.close()
    return found
