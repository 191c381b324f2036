"""N = K in mode furthest beside DeepSpeed's own PipelineEngine: same model, same data, step by step."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from deepspeed.pipe import PipelineModule, TiedLayerSpec

from ibp_deepspeed import InterlockedPipelineModule, initialize
from tests.toys import Layer, layer_specs, loss_fn, micro_batches
from tests.workers.parity import OPTIMIZERS, compare


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    stages, count = case["stages"], case["micro_batches"]
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": count,
        "optimizer": OPTIMIZERS[case["optimizer"]],
        "gradient_clipping": 0.0,
        "steps_per_print": None,
    }
    specs: list[Any] = layer_specs(stages, torch.float32)
    if case.get("tied"):
        specs[0] = specs[-1] = TiedLayerSpec("ends", Layer, 0)
    options: dict[str, Any] = {"num_stages": stages, "loss_fn": loss_fn, "partition_method": "uniform"}
    theirs_module = PipelineModule(specs, **options)
    theirs = deepspeed.initialize(model=theirs_module, config=config)[0]
    block = {"strategy": "global", "aux_head": None, "decay": "all"}  # as DeepSpeed's, of one group
    ours = initialize(
        model=InterlockedPipelineModule(specs, aux_head=None, **options), config={**config, "interlocking": block}
    )[0]
    rows = []
    for step in range(case["steps"]):
        data = micro_batches(step, count)
        their_loss = theirs.train_batch(iter(data)).item()
        our_loss = ours.train_batch(iter(data)).item()
        row = {"parameter": compare(list(ours.module.parameters()), list(theirs.module.parameters()))}
        if ours.is_last_stage():
            row["loss"] = abs(our_loss - their_loss) / their_loss
        rows.append(row)
    ours.close()
    return {"worst": {key: max(r.get(key, 0.0) for r in rows) for key in ("parameter", "loss")}}
