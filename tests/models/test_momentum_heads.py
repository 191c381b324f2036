"""Heads of cut language models with slow copies of the next stage's first layers."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from ibp_deepspeed.checkpoint.manifest import head_structure
from ibp_deepspeed.commands.convert_hf import export_all
from ibp_deepspeed.config.interlocking import AuxHeadConfig, InterlockingConfig
from ibp_deepspeed.config.objectives import MomentumOptions
from ibp_deepspeed.models import CausalLM, ModelError
from ibp_deepspeed.models.build import virtual_pipeline
from ibp_deepspeed.models.costs import head_operations, layer_operations
from ibp_deepspeed.models.exits.exits import Exits
from ibp_deepspeed.models.hf.save import write
from ibp_deepspeed.models.tuning import Lora, Tuning
from ibp_deepspeed.models.workload import workload
from ibp_deepspeed.objectives.cross_entropy import CausalLMLoss
from tests.models.test_causal_lm import shifted, tiny, tokens
from tests.models.test_costs import llama
from tests.models.test_export import checkpoint
from tests.models.test_heads import hidden_states
from tests.models.test_routers import balanced

MOMENTUM = AuxHeadConfig(objective=MomentumOptions())


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gemma2", "opt", "cohere"])
@pytest.mark.parametrize("readout", ["private", "shared"])
def test_a_head_reads_out_behind_its_copies(model_type: str, readout: Any) -> None:
    """norm and LM head of f̄(h) + B h; B is 0 at first, f̄ of the kind of the model's layers there, and not trained."""
    options = AuxHeadConfig(readout=readout, objective=MomentumOptions(layers=2))
    model = CausalLM(tiny(model_type))
    head = model.aux_head(0, options, after=1).eval()
    assert head.kinds == [1, 2] and not head.blocks.correction.weight.any()
    layers = [model.build_layer(index).eval() for index in (2, 3)]
    for copied, layer in zip(head.blocks.layers, layers, strict=True):
        copied.load_state_dict(layer.state_dict())
    plain = AuxHeadConfig(readout=readout)
    alone = model.aux_head(0, plain, after=1).eval()
    alone.load_state_dict({n: t for n, t in head.state_dict().items() if not n.startswith("blocks.")})
    hidden = hidden_states().requires_grad_()
    with torch.no_grad():
        head.blocks.correction.weight.normal_()
        behind = nn.Sequential(*layers)(hidden) + hidden @ head.blocks.correction.weight.T
        torch.testing.assert_close(head(hidden).materialize(), alone(behind).materialize())
    CausalLMLoss()(head(hidden), shifted(tokens())).backward()
    assert hidden.grad is not None and hidden.grad.any()
    copies = {id(p) for p in head.blocks.layers.parameters()}
    for name, parameter in head.named_parameters():
        trained = id(parameter) not in copies and (readout == "private" or not name.startswith("readout."))
        assert parameter.requires_grad == trained and (parameter.grad is not None) == trained, name
    sources = head.sources()
    assert sources["norm.weight"] == "4.norm.weight" and "blocks.correction.weight" not in sources
    assert {s.partition(".")[0] for n, s in sources.items() if n.startswith("blocks.layers.1.")} == {"3"}


def test_copies_begin_as_the_next_stage_is_and_are_in_no_optimizer() -> None:
    block = {"strategy": "local", "exits": 2, "aux_head": {"objective": "momentum"}}
    config = {"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    made = virtual_pipeline(CausalLM(tiny("llama", num_hidden_layers=4)), {**config, "interlocking": block}, 4, [1] * 4)
    assert list(made.reference.aux_heads) == [1]
    head, layer = cast(Any, made.reference.aux_heads[1]), cast(Any, made.reference.stages[2])[0]
    copies = list(head.blocks.layers.parameters())
    assert all(map(torch.equal, copies, layer.parameters()))
    trained = {id(p) for group in made.optimizers[1].param_groups for p in group["params"]}
    assert id(head.blocks.correction.weight) in trained and not trained & set(map(id, copies))


@pytest.mark.parametrize(
    ("stages", "exits", "manual", "sentence"),
    [
        (2, None, [4, 2], None),
        (2, None, [5, 1], "copies 2 decoder layers of the next stage, stage 1 has 1: use fewer stages"),
        (3, None, [2, 1, 3], 'stage 1 has 1: use fewer stages, or "layers": 1'),
        (3, [1, 2], [2, 1, 3], None),
        (6, None, None, "stage 1 has 1"),
    ],
)
def test_stages_with_too_few_layers_are_named(stages: int, exits: Any, manual: Any, sentence: str | None) -> None:
    model, options = llama(num_hidden_layers=6), AuxHeadConfig(objective=MomentumOptions(layers=2))
    if sentence is None:
        model.partition(stages, aux_heads=options, exits=exits, manual=manual)
        return
    with pytest.raises(ModelError, match=sentence):
        model.partition(stages, aux_heads=options, exits=exits, manual=manual)


def test_adapters_and_routers_are_refused() -> None:
    model = CausalLM(tiny("llama"), tuning=Tuning(lora=Lora()))
    with pytest.raises(ModelError, match='"aux_head.objective" is momentum, whose heads copy whole layers, and --lora'):
        model.partition(2, aux_heads=MOMENTUM)
    block = InterlockingConfig.parse({"aux_head": {"objective": "momentum"}})
    with pytest.raises(ModelError, match='objective: momentum" does not go together with the loss of a router'):
        CausalLM(balanced("mixtral")).side_loss(block)


def test_frozen_layers_are_copied_too() -> None:
    model = CausalLM(tiny("llama", num_hidden_layers=4), tuning=Tuning(frozen=(0, 1, 2, 3)))
    config = {"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    objective = {"name": "momentum", "interval": 1, "delay": 0}
    block = {"strategy": "local", "aux_head": {"objective": objective}}
    made = virtual_pipeline(model, {**config, "interlocking": block}, 4, [1] * 4)
    for _ in range(3):
        made.train_batch(iter([(tokens(), shifted(tokens()))]))
    for k in (0, 1, 2):
        head, layer = cast(Any, made.reference.aux_heads[k]), cast(Any, made.reference.stages[k + 1])[0]
        same = all(map(torch.equal, head.blocks.layers.parameters(), layer.parameters()))
        assert same == (k < 2), "the last stage's layer alone is trained, and followed slowly"


def test_costs() -> None:
    """F and B of q mean layers, F, B and W of H × H; copies are no optimizer's."""
    model, length = llama(), 16
    for q in (1, 2):
        options = AuxHeadConfig(objective=MomentumOptions(layers=q))
        more = [
            a - b for a, b in zip(*(head_operations(model, o, length) for o in (options, AuxHeadConfig())), strict=True)
        ]
        layer, square = layer_operations(model, length)[1], model.hidden_size**2
        assert more == pytest.approx([q * layer.forward + square, q * layer.input_gradient + square, square])
        head = workload(model, options, samples=1, sequence_length=length, weight_bytes=4).head
        plain = workload(model, AuxHeadConfig(), samples=1, sequence_length=length, weight_bytes=4).head
        assert head is not None and plain is not None
        assert head.trained - plain.trained == square
        assert head.parameters - head.trained == q * model.parameter_counts()[1]


def test_a_checkpoint_knows_the_number_of_layers() -> None:
    one, two = (head_structure(AuxHeadConfig(objective=MomentumOptions(layers=q))) for q in (1, 2))
    assert one is not None and one["objective"] == "momentum" and one != two
    slower = AuxHeadConfig(objective=MomentumOptions(interval=5, average=0.9))
    assert head_structure(slower) == one


def test_an_exit_is_evaluated_and_not_exported(tmp_path: Path) -> None:
    layers, head = checkpoint(tmp_path / "run", "llama", objective="momentum")
    exits = Exits(tmp_path / "run")
    with torch.no_grad():
        wanted = CausalLMLoss()(head(nn.Sequential(*layers[:3])(tokens())), shifted(tokens())).item()
    losses = exits.eval_batch(iter([(tokens(), shifted(tokens()))]), 1)
    assert losses[0].item() == pytest.approx(wanted, rel=1e-6) and exits.depth(1) == 3
    with pytest.raises(ModelError, match="no smaller model: export the last exit, or one with another objective"):
        write(exits, tmp_path / "first", 1)
    family = Namespace(checkpoint=tmp_path / "run", memory_gib=None, data=None, out=tmp_path / "family")
    with pytest.raises(ModelError, match="no smaller model"):  # before data are opened, which are nowhere
        export_all(family)
    write(exits, tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "whole"]


@pytest.mark.parametrize("objective", ["label_smoothing", "predsim", "reconstruction"])
def test_exits_of_other_objectives_are_evaluated_and_exported(tmp_path: Path, objective: str) -> None:
    checkpoint(tmp_path / "run", "llama", objective=objective)
    exits = Exits(tmp_path / "run")
    assert exits.eval_batch(iter([(tokens(), shifted(tokens()))]), 1).isfinite().all()
    write(exits, tmp_path / "first", 1)
