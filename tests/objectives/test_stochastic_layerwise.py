"""Stochastic layer-wise learning: a distance of posteriors of what a stage is given and what it makes of it. In
processes: tests/engine/test_named_objectives.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ibp_deepspeed import InterlockedReference, InterlockingConfig
from ibp_deepspeed.checkpoint import layout
from ibp_deepspeed.checkpoint.manifest import head_structure
from ibp_deepspeed.config.interlocking import AuxHeadConfig
from ibp_deepspeed.errors import ConfigError
from ibp_deepspeed.models import CausalLM
from ibp_deepspeed.models.costs import head_operations
from ibp_deepspeed.models.exits.exits import Exits
from ibp_deepspeed.models.profiling.specimens import Specimens
from ibp_deepspeed.models.runs.description import Description
from ibp_deepspeed.objectives.cross_entropy import CausalLMLoss
from ibp_deepspeed.objectives.stochastic_layerwise import StochasticLayerwise, posterior_distance
from tests.models.test_causal_lm import SEQUENCE, perturbed, run, shifted, tiny, tokens
from tests.models.test_costs import Products

NAME = "stochastic_layerwise"
WHERE = {"batch": 2, "micro_batch": 1, "index": 1}
STAGES, WIDTH, CLASSES = 3, 4, 7


def objective(seed: int = 0, aux_tokens: float = 1.0, **options: Any) -> StochasticLayerwise:
    given = {"objective": {"name": NAME, **options}, "aux_tokens": aux_tokens, "aux_tokens_seed": seed}
    made = StochasticLayerwise(nn.Linear(WIDTH, CLASSES))
    return made.configured(AuxHeadConfig.model_validate(given), CausalLMLoss())


def posterior(states: Tensor, projection: Tensor) -> Tensor:
    """By its definition."""
    size = (states.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return torch.softmax((states / size) @ projection.T.to(states.dtype), -1)


def by_hand(made: StochasticLayerwise, given: Tensor, hidden: Tensor, where: dict[str, int]) -> Tensor:
    """Of all positions."""
    projection = made.projection(hidden, where["index"]) * made.kept_columns(hidden, **where)
    p, q = posterior(given.detach(), projection), posterior(hidden, projection)
    return -(p * q).sqrt().sum(-1).log().mean()


def test_is_the_bhattacharyya_distance_of_two_softmaxes() -> None:
    """Value and gradient in fp64, 1e-12; never more than half of the divergence."""
    torch.manual_seed(0)
    given, hidden = torch.randn(9, 6, dtype=torch.float64), torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    projection, labels = torch.randn(5, 6), torch.zeros(9, dtype=torch.int64)
    p, q = posterior(given, projection), posterior(hidden, projection)
    want = -(p * q).sqrt().sum(-1).log().mean()
    got = posterior_distance(given, hidden, labels, projection)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(loss, hidden)[0] for loss in (got, want)), atol=1e-12, rtol=1e-12)
    assert 0 < got <= (p * (p / q).log()).sum(-1).mean() / 2
    assert posterior_distance(given, 3 * given, labels, projection).abs() <= 1e-5  # of another length alone
    assert posterior_distance(given.bfloat16(), hidden.bfloat16(), labels, projection).dtype == torch.float32


def test_positions_without_a_label_do_not_count() -> None:
    torch.manual_seed(0)
    given, hidden, projection = torch.randn(9, 6), torch.randn(9, 6, requires_grad=True), torch.randn(5, 6)
    labels = torch.randint(5, (9,))
    labels[2] = labels[7] = -100
    kept = labels >= 0
    got = posterior_distance(given, hidden, labels, projection)
    torch.testing.assert_close(got, posterior_distance(given[kept], hidden[kept], labels[kept], projection))
    assert not torch.autograd.grad(got, hidden)[0][~kept].any()
    nothing = posterior_distance(given, hidden, torch.full_like(labels, -100), projection)
    assert nothing == 0 and not torch.autograd.grad(nothing, hidden)[0].any()
    zeros = torch.zeros(9, 6, requires_grad=True)  # no direction: finite all the same
    assert torch.autograd.grad(posterior_distance(given, zeros, labels, projection), zeros)[0].isfinite().all()


def test_the_projection_is_fixed_and_its_columns_are_drawn_again_for_each_micro_batch() -> None:
    made, states = objective(dropout=0.3), torch.randn(2, 5, 4000)
    fixed = made.projection(states, 1).clone()
    assert fixed.shape == (256, 4000) and fixed.var().item() == pytest.approx(1 / 4000, rel=0.01)
    assert torch.equal(objective().projection(states, 1), fixed)  # another process, or after a resume
    assert not torch.equal(objective().projection(states, 0), fixed)
    assert not torch.equal(objective(seed=3).projection(states, 1), fixed)
    columns = made.kept_columns(states, **WHERE)
    assert torch.equal(objective(dropout=0.3).kept_columns(states, **WHERE), columns)
    assert columns.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert (columns == 0).float().mean().item() == pytest.approx(0.3, abs=0.03)
    for name in WHERE:
        assert not torch.equal(made.kept_columns(states, **{**WHERE, name: 5}), columns), name
    assert torch.equal(made.projection(states, 1), fixed)


def test_the_loss_uses_what_is_drawn() -> None:
    """Each micro-batch its own columns; without dropout the stage's projection alone; on a part of the positions."""
    torch.manual_seed(0)
    given, hidden, labels = torch.randn(2, 10, WIDTH), torch.randn(2, 10, WIDTH), torch.randint(CLASSES, (2, 10))
    made, still = objective(dropout=0.5), objective(dropout=0)
    found = set()
    for where in (WHERE, {**WHERE, "micro_batch": 3}, {**WHERE, "batch": 0}):
        got = made.stage_loss(given, hidden, labels, **where)
        torch.testing.assert_close(got, by_hand(made, given, hidden, where))
        found.add(float(got))
        assert still.stage_loss(given, hidden, labels, **where) == still.stage_loss(given, hidden, labels, **WHERE)
    assert len(found) == 3
    part = objective(aux_tokens=0.4)
    assert part.positions is not None
    chosen = part.positions.positions(2, 1, 20)
    want = by_hand(part, given.flatten(0, 1)[chosen], hidden.flatten(0, 1)[chosen], WHERE)
    torch.testing.assert_close(part.stage_loss(given, hidden, labels, **WHERE), want)


def reference(strategy: str, **options: Any) -> InterlockedReference:
    torch.manual_seed(0)
    maps = [nn.Linear(WIDTH, WIDTH) for _ in range(STAGES)]
    stages = [*maps[:-1], nn.Sequential(maps[-1], nn.Linear(WIDTH, CLASSES))]
    heads = [StochasticLayerwise(nn.Linear(WIDTH, CLASSES)) for _ in range(STAGES - 1)]
    config = {"strategy": strategy, "mode": "window", "aux_head": {"objective": {"name": NAME, **options}}}
    return InterlockedReference(stages, heads, CausalLMLoss(), config)


@pytest.mark.parametrize("strategy", ["local", "pairwise"])
def test_what_a_stage_is_given_gets_no_gradient_of_the_distance(strategy: str) -> None:
    """The losses and all gradients against autograd through the definition; the first stage has a prediction alone."""
    torch.manual_seed(1)
    inputs, labels = torch.randn(2, 10, WIDTH), torch.randint(CLASSES, (2, 10))
    made = reference(strategy)
    losses = made.accumulate([(inputs, labels)])
    first, second = made.objectives[0], made.objectives[1]
    assert isinstance(second, StochasticLayerwise)
    given = made.stages[0](inputs)
    hidden = made.stages[1](given)
    predictions = [
        F.cross_entropy(each.module(states).flatten(0, 1), labels.flatten())
        for each, states in ((first, given), (second, hidden))
    ]
    distance = by_hand(second, given, hidden, {"batch": 0, "micro_batch": 0, "index": 1})
    assert distance > 0.001
    want = [predictions[0], predictions[1] + distance]
    torch.testing.assert_close(losses[:2], torch.stack(want).double(), atol=1e-6, rtol=1e-6)
    measured = made.evaluate([(inputs, labels)])
    torch.testing.assert_close(measured[:2], torch.stack(predictions).double(), atol=1e-6, rtol=1e-6)
    trunks = [list(stage.parameters()) for stage in made.stages]
    of_second = torch.autograd.grad(want[1], trunks[1] + trunks[0], retain_graph=True)
    own = torch.autograd.grad(want[0], trunks[0])
    for place, parameter in enumerate(trunks[0]):
        both = (own[place] + of_second[2 + place]) / 2
        torch.testing.assert_close(parameter.grad, own[place] if strategy == "local" else both)
    if strategy == "local":  # else the last loss trains the second stage too
        for parameter, gradient in zip(trunks[1], of_second, strict=False):
            torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"objective": {"name": NAME, "weight": 1}}, f"'weight' is no option of {NAME}, which has categories, dropout"),
        ({"objective": {"name": NAME, "categories": 1}}, f"categories of {NAME}: .*greater than or equal to 2"),
        ({"objective": {"name": NAME, "dropout": 1}}, f"dropout of {NAME}: .*less than 1"),
        ({"objective": NAME, "borrow": 1}, f"borrow and {NAME} don't go together"),
    ],
)
def test_what_makes_no_sense_is_refused(block: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        InterlockingConfig.parse({"aux_head": block})


def test_heads_on_the_first_stage_alone_are_refused() -> None:
    config = {"strategy": "local", "aux_head": {"objective": NAME}}
    for more, stages in (({}, 2), ({"exits": [0]}, 4)):
        with pytest.raises(ConfigError, match="only the first stage has a head, and it is given data: use more stages"):
            InterlockingConfig.parse({**config, **more}).exits_for(stages)
    assert InterlockingConfig.parse(config).exits_for(3) == (0, 1, 2)
    assert InterlockingConfig.parse({**config, "exits": 2}).exits_for(4) == (1, 3)
    assert InterlockingConfig.parse({**config, "strategy": "global"}).exits_for(1) == (0,)


@pytest.mark.parametrize("aux_tokens", [1.0, 0.5])
def test_costs_are_those_of_its_products(aux_tokens: float) -> None:
    """2 · 2 operations forward and 2 · 1 backward for d · H and a position that counts; nothing is trained."""
    model = CausalLM(tiny("llama"))
    plain, more = (
        head_operations(model, AuxHeadConfig.model_validate({"objective": name, "aux_tokens": aux_tokens}), SEQUENCE)
        for name in ("cross_entropy", {"name": NAME, "categories": 8})
    )
    made, size, labels = objective(aux_tokens=aux_tokens, categories=8), model.hidden_size, shifted(tokens())
    given, hidden = torch.randn(*labels.shape, size), torch.randn(*labels.shape, size, requires_grad=True)
    with Products() as products:
        loss = made.stage_loss(given, hidden, labels, **WHERE)
        assert isinstance(loss, Tensor)
        forward = products.operations
        loss.backward()
    assert forward == 2 * labels.numel() * (more.forward - plain.forward)
    assert products.operations - forward == 2 * labels.numel() * (more.input_gradient - plain.input_gradient)
    assert more.weight_gradient == plain.weight_gradient
    assert operations_of_a_profile(NAME) > operations_of_a_profile("cross_entropy")


def operations_of_a_profile(name: str) -> int:
    """Of what is timed as a head."""
    options = AuxHeadConfig.model_validate({"objective": name})
    specimen = Specimens(CausalLM(tiny("llama")), options, samples=1, sequence_length=8).head()
    with specimen.on(torch.device("cpu")), Products() as products:
        specimen.whole()
    return products.operations


def test_an_exit_is_exported_as_any_other(tmp_path: Path) -> None:
    """Nothing of the objective is in checkpoints: its heads are those of cross-entropy."""
    options = AuxHeadConfig.model_validate({"objective": NAME})
    assert head_structure(options) == head_structure(AuxHeadConfig())
    config, bounds = tiny("llama"), [0, 2, 3, 5]
    model = CausalLM(config)
    made = model.objective(1, options, 2)
    assert isinstance(made, StochasticLayerwise) and made.module.state_dict().keys() == {
        *model.aux_head(1, after=2).state_dict()
    }
    layers = perturbed([model.build_layer(index).eval() for index in range(5)])
    (own,) = perturbed([made.module.eval()])
    for index, layer in enumerate(layers):
        torch.save(layer.state_dict(), tmp_path / layout.layer(index))
    torch.save(own.state_dict(), tmp_path / layout.aux_head(3))
    block = {"strategy": "local", "aux_head": {"objective": NAME}}
    about = Description(model=config.to_dict(), bounds=bounds, interlocking=block, sequence_length=12, data="nowhere")
    for name, text in about.files().items():
        (tmp_path / name).write_text(text)
    exported = Exits(tmp_path).to_hugging_face(2).eval()
    with torch.no_grad():
        want = run([*layers[:3], own], tokens()).materialize()
        assert (exported(tokens()).logits - want).abs().max() <= 1e-6
