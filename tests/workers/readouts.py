"""Stages whose heads follow the last one: as the reference, late messages, a stop and a new start, a real model."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec
from torch import Tensor, nn

from ibp_deepspeed import (
    InterlockedPipelineModule,
    InterlockedReference,
    InterlockingConfig,
    InterlockingError,
    initialize,
)
from ibp_deepspeed.checkpoint import layout
from ibp_deepspeed.models.build import pipeline_module, stage_objective
from ibp_deepspeed.models.causal_lm import CausalLM
from ibp_deepspeed.objectives.cross_entropy import CausalLMLoss
from tests.models.test_causal_lm import SEQUENCE, shifted, tiny
from tests.toys import FollowingHead, Head, Layer, loss_fn, make_module, micro_batches
from tests.workers import parity
from tests.workers.parity import OPTIMIZERS, compare, stage_parameters

STAGES, COUNT = 3, 2
EXACT = CausalLMLoss()


def engine_of(interlocking: dict[str, Any], module: Any = None, optimizer: str = "sgd", *, bf16: bool = False) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": COUNT,
        "optimizer": OPTIMIZERS[optimizer],
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": bf16},
        "interlocking": interlocking,
    }
    return initialize(model=module or make_module(STAGES, follow=True), config=config)[0]


def train(engine: Any, steps: range) -> list[Tensor]:
    for step in steps:
        engine.train_batch(iter(micro_batches(step, COUNT)))
    return [p.detach().clone() for p in engine.module.parameters()]


def late(case: dict[str, Any]) -> dict[str, Any]:
    """Whether a slow last stage, and slow messages, leave the numbers as they are."""
    results = []
    for slow in (None, "stage", "messages"):
        engine = engine_of(case["interlocking"])
        if slow == "stage" and engine.is_last_stage():
            engine.module.forward_funcs[0].register_forward_hook(lambda *_: time.sleep(0.03))
        elif slow == "messages":
            engine._readouts._relay._pass_on = sleeping(engine._readouts._relay._pass_on)
        results.append(train(engine, range(12)))
        engine.close()
    return {"same": [all(map(torch.equal, results[0], other)) for other in results[1:]]}


def sleeping(function: Callable[..., None]) -> Callable[..., None]:
    def late(*args: Any) -> None:
        time.sleep(0.1)
        function(*args)

    return late


def resume(case: dict[str, Any]) -> dict[str, Any]:
    """Save after six batches; go on in another engine, and in the same one after it has gone further."""
    engine, folder = engine_of(case["interlocking"], optimizer="adamw"), case["folder"]
    train(engine, range(6))
    engine.save_checkpoint(folder, tag="middle")
    path = os.path.join(f"{folder}/middle", layout.SHARED_READOUT)
    pending = sorted(torch.load(path)["taken"])
    want = train(engine, range(6, 15))
    other = engine_of(case["interlocking"], optimizer="adamw")
    with torch.no_grad():
        for parameter in other.module.parameters():
            parameter.zero_()
    other.load_checkpoint(folder, tag="middle")
    engine.load_checkpoint(folder, tag="middle")
    same = [all(map(torch.equal, want, train(e, range(6, 15)))) for e in (other, engine)]
    dist.barrier()
    if dist.get_rank() == 0:
        os.remove(path)
        os.remove(os.path.join(os.path.dirname(path), "contents.json"))  # which would name the file first
    dist.barrier()
    refusal = said(lambda: other.load_checkpoint(folder, tag="middle"))
    for each in (engine, other):
        each.close()
    return {"pending": pending, "same": same, "refusal": refusal}


def average(case: dict[str, Any]) -> list[bool]:
    """Whether a bf16 head has the rounded average of the readouts so far, in every batch (R = 1, delay = 0)."""
    engine = engine_of(case["interlocking"], optimizer="adamw", bf16=True)
    weight = engine.module.aux_head.readout.weight if engine.module.aux_head else engine.module.forward_funcs[-1].weight
    beta, exact, same = case["interlocking"]["aux_head"]["average"], torch.empty(0), []
    for step in range(12):
        newest = weight.detach().float()
        dist.broadcast(newest, STAGES - 1)
        exact = torch.lerp(exact, newest, 1 - beta) if step else newest
        train(engine, range(step, step + 1))
        same.append(engine.is_last_stage() or torch.equal(weight, exact.bfloat16()))
    engine.close()
    return same


def refusals(case: dict[str, Any]) -> list[str]:
    """What this rank says of modules and options that can't follow the last stage."""
    modules = [
        lambda: module_with(Layer),
        lambda: module_with(Head),
        lambda: module_with(WeightOnly),
        lambda: module_with(FollowingHead, last=Layer),
    ]
    attempts: list[Callable[[], Any]] = [partial(trained, case["interlocking"], module) for module in modules]
    attempts.append(lambda: taken_before({"aux_head": {"borrow": 1}}))
    attempts.append(lambda: make_module(STAGES, {"aux_head": {"borrow": 2}}))
    return [said(attempt) for attempt in attempts]


def taken_before(interlocking: dict[str, Any]) -> None:
    """An optimizer that has the parameters of heads which the configuration then moves."""
    module = make_module(STAGES)
    config = {"train_micro_batch_size_per_gpu": 4, "interlocking": interlocking}
    initialize(model=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1), config=config)


def trained(interlocking: dict[str, Any], module: Callable[[], InterlockedPipelineModule]) -> Any:
    return engine_of(interlocking, module())


class WeightOnly(FollowingHead):
    """A head that copies too little."""

    def readout_tensors(self) -> list[Tensor]:
        return [self.readout.weight]


def module_with(head: Callable[[int], nn.Module], last: type[Layer] = Head) -> InterlockedPipelineModule:
    layers = [LayerSpec(Layer, 0), LayerSpec(Layer, 1), LayerSpec(last, 2)]
    return InterlockedPipelineModule(layers, num_stages=STAGES, loss_fn=loss_fn, aux_head=head)


def said(attempt: Callable[[], Any]) -> str:
    try:
        attempt()
    except InterlockingError as error:
        return str(error)
    return "nothing"


def real_model(case: dict[str, Any]) -> dict[str, float]:
    """A cut language model against the reference made of the same layers."""
    config = InterlockingConfig.parse(case["interlocking"])
    model = CausalLM(tiny("llama", tie_word_embeddings=case["tied"]))
    module = pipeline_module(model, config, STAGES, token_counts=torch.arange(model.vocab_size))
    engine = engine_of(case["interlocking"], module)
    reference = reference_of(model, config, module)
    parameters = [p for k in range(STAGES) for p in reference.parameters(k)]
    optimizer = torch.optim.SGD(parameters, lr=0.3, momentum=0.9)
    loss_error = 0.0
    for step in range(8):
        rows = [tokens(step, m) for m in range(COUNT)]
        loss = engine.train_batch(iter(rows))
        expected = reference.accumulate(rows)[engine.stage_id].item()
        loss_error = max(loss_error, abs(loss.item() - expected) / expected)
        optimizer.step()
        optimizer.zero_grad()
    rows = [tokens(9, m) for m in range(COUNT)]
    found, wanted, exact = engine.eval_batch(iter(rows), COUNT), *map(reference.evaluate, (rows, rows), (None, EXACT))
    engine.close()
    return {
        "loss": loss_error,
        "parameter": compare(list(module.parameters()), stage_parameters(reference, engine.stage_id)),
        "eval": ((found - wanted).abs() / wanted).max().item(),
        "exact": ((wanted - exact).abs() / exact).max().item(),
    }


def reference_of(model: CausalLM, config: InterlockingConfig, module: Any) -> InterlockedReference:
    assert config.aux_head is not None
    bounds = module.parts
    stages = [
        nn.Sequential(*(model.build_layer(i) for i in range(a, b))) for a, b in zip(bounds, bounds[1:], strict=False)
    ]
    counts = torch.arange(model.vocab_size)
    heads = [stage_objective(model, config, bounds, k, counts) for k in range(STAGES - 1)]
    return InterlockedReference(stages, heads, module.loss_fn, config)


def tokens(step: int, micro_batch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10 * step + micro_batch)
    input_ids = torch.randint(3, 97, (4, SEQUENCE), generator=generator)
    return input_ids, shifted(input_ids)


_TASKS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "parity": parity.run_case,
    "late": late,
    "resume": resume,
    "refusals": refusals,
    "average": average,
    "real": real_model,
}


def run_case(case: dict[str, Any]) -> Any:
    return _TASKS[case["task"]](case)
