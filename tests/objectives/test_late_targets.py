"""Objectives that learn from the next exit some batches later, by hand. In processes: tests/engine."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ibp_deepspeed import InterlockedReference, InterlockingConfig
from ibp_deepspeed.config.interlocking import AuxHeadConfig
from ibp_deepspeed.errors import ConfigError, InterlockingError
from ibp_deepspeed.objectives import by_rows
from ibp_deepspeed.objectives.cross_entropy import CausalLMLoss, LazyLogits
from ibp_deepspeed.objectives.distillation import Distillation, LikeliestTokens, divergences, likeliest
from ibp_deepspeed.objectives.late_targets import LateMemory, LateWay, late_ways, least_late_delay
from ibp_deepspeed.objectives.local_critic import LocalCritic, TokenLosses

VOCABULARY, WIDTH = 7, 4


class ToyHead(nn.Module):
    """A linear layer and a readout; ``linear``: whether that is an nn.Linear or a function of rows."""

    def __init__(self, *, linear: bool = True) -> None:
        super().__init__()
        self.inner, self.readout, self.linear = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, VOCABULARY), linear

    def forward(self, hidden: Tensor) -> LazyLogits:
        readout = self.readout if self.linear else (lambda rows: self.readout(rows).tanh())
        return LazyLogits(self.inner(hidden), readout, tuple(p for p in self.readout.parameters() if p.requires_grad))


def configured(kind: Any, head: nn.Module | None = None, **options: Any) -> Any:
    given = AuxHeadConfig.model_validate({"objective": {"name": kind.name, **options}})
    return kind(head or ToyHead()).configured(given, CausalLMLoss())


@pytest.mark.parametrize("top", [1, 3, VOCABULARY, VOCABULARY + 5])
def test_the_divergence_is_that_of_the_likeliest_and_all_others(top: int) -> None:
    """With k = V it is the exact KL; with less that of the same distributions with all others as one event."""
    torch.manual_seed(0)
    teacher, student = torch.randn(2, 5, VOCABULARY, dtype=torch.float64)
    got = divergences(student, *likeliest(teacher, top))
    p, q = teacher.softmax(-1), student.softmax(-1)
    order = p.argsort(-1, descending=True)
    p, q = p.gather(1, order), q.gather(1, order)
    if top < VOCABULARY:
        p, q = (torch.cat([x[:, :top], x[:, top:].sum(1, keepdim=True)], 1) for x in (p, q))
    torch.testing.assert_close(got, (p * (p / q).log()).sum(-1), atol=1e-6, rtol=1e-6)
    assert (divergences(teacher, *likeliest(teacher, top)).abs() < 1e-6).all()


def test_tokens_that_are_impossible_count_nothing() -> None:
    teacher = torch.tensor([[0.0, 1.0, -torch.inf, -torch.inf]])
    student = torch.randn(1, 4, requires_grad=True)
    for top in (2, 3, 4):
        (gradient,) = torch.autograd.grad(divergences(student, *likeliest(teacher, top)).sum(), student)
        torch.testing.assert_close(gradient, student.softmax(-1) - teacher.softmax(-1))


def test_distillation_by_hand() -> None:
    """λ · τ² times the mean divergence of tempered distributions over labels that count."""
    torch.manual_seed(0)
    made = configured(Distillation, weight=0.3, temperature=2.0, top=VOCABULARY)
    states, wanted, labels = torch.randn(5, WIDTH), torch.randn(5, VOCABULARY), torch.tensor([1, -100, 2, 0, -100])
    targets = made.needs.late.of(wanted, labels)
    got = made.late_loss(states, labels, targets)
    logits = made.module(states).materialize()
    rows = F.kl_div((logits / 2).log_softmax(-1), (wanted / 2).softmax(-1), reduction="none").sum(-1)
    want = 0.3 * 4 * rows[labels != -100].mean()
    torch.testing.assert_close(got, want)
    parameters = list(made.module.parameters())
    for a, b in zip(*(torch.autograd.grad(loss, parameters) for loss in (got, want)), strict=True):
        torch.testing.assert_close(a, b)
    assert made.late_loss(states, torch.full_like(labels, -100), targets) == 0


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_critic_by_hand(sign: float) -> None:
    """The mean absolute difference of each token's losses: where the next exit's is above, the own one is to rise."""
    torch.manual_seed(0)
    made = configured(LocalCritic)
    states, labels = torch.randn(5, WIDTH), torch.tensor([1, -100, 2, 0, 4])
    losses = F.cross_entropy(made.module(states).materialize(), labels, reduction="none")
    wanted = (losses + sign * torch.rand(5)).detach()
    got = made.late_loss(states, labels, [wanted])
    counted = labels != -100
    torch.testing.assert_close(got, (wanted - losses.detach())[counted].abs().mean())
    parameters = list(made.module.parameters())
    mean = F.cross_entropy(made.module(states).materialize(), labels)
    found, rising = (torch.autograd.grad(loss, parameters) for loss in (got, mean))
    for a, b in zip(found, rising, strict=True):
        torch.testing.assert_close(a, -sign * b)


def test_a_critic_says_the_loss_of_each_token() -> None:
    head, labels = ToyHead(), torch.tensor([1, -100, 2])
    outputs = head(torch.randn(3, WIDTH))
    (said,) = TokenLosses().of(outputs, labels)
    torch.testing.assert_close(said, F.cross_entropy(outputs.materialize(), labels, reduction="none"))
    assert said[1] == 0


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("full", [True, False])
def test_cross_entropy_trains_the_trunk_and_not_the_critic(linear: bool, full: bool) -> None:
    """The gradient of the states is that of the head; the head gets none, and is trained as before afterwards."""
    torch.manual_seed(0)
    head = ToyHead(linear=linear)
    made, states, labels = configured(LocalCritic, head), torch.randn(2, 5, WIDTH), torch.randint(VOCABULARY, (2, 5))
    hidden = [states.clone().requires_grad_() for _ in range(2)]
    outputs = made.outputs(hidden[0])
    assert isinstance(outputs.readout, nn.Linear) == linear
    where = {"batch": 0, "micro_batch": 0, "index": 0}
    loss = made.loss(outputs.materialize(), labels) if full else made.training_loss(outputs, labels, **where)
    want = CausalLMLoss()(head(hidden[1]).materialize(), labels)
    torch.testing.assert_close(loss, want)
    loss.backward()
    assert all(p.grad is None and p.requires_grad for p in head.parameters())
    want.backward()
    torch.testing.assert_close(hidden[0].grad, hidden[1].grad)
    assert all(p.grad is not None for p in head.parameters())


@pytest.mark.parametrize("kind", [Distillation, LocalCritic])
def test_chunks_are_the_whole(kind: Any) -> None:
    """Targets, late losses and their gradients."""
    torch.manual_seed(0)
    made, labels = configured(kind), torch.randint(VOCABULARY, (6,))
    states, outputs = torch.randn(6, WIDTH), ToyHead()(torch.randn(6, WIDTH))
    found = []
    for logits in (2**24, 2 * VOCABULARY):
        with mock.patch.object(by_rows, "CHUNK_LOGITS", logits):
            targets = made.needs.late.of(outputs, labels)
            loss = made.late_loss(states, labels, targets)
            found.append([*targets, loss, *torch.autograd.grad(loss, list(made.module.parameters()))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_the_draw_depends_on_batch_and_exits_alone() -> None:
    late, where = TokenLosses(tokens=4, seed=3), {"batch": 2, "receiver": 0, "sender": 2}
    drawn = late.positions(10, **where)
    assert torch.equal(drawn, late.positions(10, **where)) and len(drawn) == 4 and (drawn.diff() > 0).all()
    others = [{**where, "batch": 3}, {**where, "receiver": 1}, {**where, "sender": 3}]
    assert all(not torch.equal(drawn, late.positions(10, **other)) for other in others)
    assert not torch.equal(drawn, TokenLosses(tokens=4, seed=4).positions(10, **where))
    assert torch.equal(late.positions(3, **where), torch.arange(3))


def test_ways_go_from_an_exit_to_the_one_before() -> None:
    late = {1: TokenLosses(), 3: TokenLosses(delay=7), 7: None}
    ways = late_ways(late, [1, 3, 7], 2)
    assert [(way.receiver, way.sender, way.delay) for way in ways] == [(1, 3, 3), (3, 7, 7)]
    assert [least_late_delay(1, m) for m in (1, 2, 4)] == [3, 2, 2]
    with pytest.raises(InterlockingError, match='of stage 1 takes late targets, .* "aux_head.borrow" 1'):
        late_ways(late, [1, 3, 7], 2, borrow=1)


def test_labels_that_are_not_of_positions_are_refused() -> None:
    way = LateWay(0, 1, TokenLosses(), 1)
    with pytest.raises(InterlockingError, match=r"the labels of \(4, 5\) positions are \(4,\)"):
        way.rows(torch.randn(4, 5, 6), torch.zeros(4), 0)
    with pytest.raises(InterlockingError, match="positions are dict"):
        way.rows(torch.randn(4, 6), {"classes": torch.zeros(4)}, 0)


def test_a_memory_keeps_what_is_pending() -> None:
    """Over a save and a load, also with another delay, and what is lacking is said."""
    memory = LateMemory(LateWay(0, 1, TokenLosses(), 2))
    for batch in range(4):
        assert list(memory.way.pending(batch)) == list(range(max(0, batch - 2), batch))
        memory.keep(batch, torch.full((3, 2), batch), torch.zeros(3))
        memory.targets[batch] = [[torch.full((3,), batch)]]
        if memory.way.used_at(batch) >= 0:
            ((states, _, (target,)),) = memory.take(batch - 2)
            assert (states == batch - 2).all() and (target == batch - 2).all()
    saved = memory.state_dict(4)
    for delay, lacking in ((2, []), (1, []), (3, [1])):
        other = LateMemory(LateWay(0, 1, TokenLosses(), delay))
        assert other.load_state_dict(saved, 4, "cpu") == lacking
        assert sorted(other.kept) == sorted(other.targets) == [b for b in range(4 - delay, 4) if b >= 2]
    assert memory.load_state_dict({}, 4, "cpu") == [2, 3] and not memory.kept


def test_likeliest_tokens_are_small() -> None:
    """8 k + 4 bytes a position."""
    said = LikeliestTokens(top=3).of(torch.randn(5, VOCABULARY, dtype=torch.bfloat16), torch.zeros(5))
    assert sum(tensor.nbytes for tensor in said) == 5 * (8 * 3 + 4)


def reference(kind: Any, delay: int, **options: Any) -> InterlockedReference:
    torch.manual_seed(0)
    stages = [nn.Linear(WIDTH, WIDTH), nn.Sequential(nn.Linear(WIDTH, WIDTH), ToyHead())]
    options = {"objective": {"name": kind.name, "delay": delay, **options}}
    return InterlockedReference(stages, [kind(ToyHead())], CausalLMLoss(), {"strategy": "local", "aux_head": options})


def batch_of(number: int) -> list[tuple[Tensor, Tensor]]:
    """Two micro-batches."""
    torch.manual_seed(number)
    return [(torch.randn(2, 3, WIDTH), torch.randint(VOCABULARY, (2, 3))) for _ in range(2)]


def examples(pipeline: InterlockedReference, rows: list[tuple[Tensor, Tensor]]) -> list[Any]:
    """States, labels and targets of all positions of micro-batches, as the pipeline is now."""
    made, late = [], pipeline.objectives[0].needs.late
    assert late is not None
    for inputs, labels in rows:
        with torch.no_grad():
            hidden = pipeline.stages[0](inputs).flatten(0, 1)
            made.append((hidden, labels.flatten(), late.of(pipeline.stages[1](hidden), labels.flatten())))
    return made


@pytest.mark.parametrize("kind", [Distillation, LocalCritic])
def test_a_late_loss_is_taken_some_batches_later(kind: Any) -> None:
    """The head's gradient of batch b is its own and that of what was kept in batch b - 2; the trunk's its own."""
    pipeline, exact, history = reference(kind, 2), CausalLMLoss(), []
    objective, head, trunk = pipeline.objectives[0], pipeline.aux_heads[0], pipeline.stages[0]
    optimizer = torch.optim.SGD([p for k in range(2) for p in pipeline.parameters(k)], lr=0.5)
    for batch in range(5):
        rows = batch_of(batch)
        history.append(examples(pipeline, rows))
        own = torch.stack([exact(head(trunk(inputs)), labels) for inputs, labels in rows]).mean()
        terms = [own] if kind is Distillation else []
        if batch >= 2:
            terms.append(torch.stack([objective.late_loss(*example) for example in history[batch - 2]]).mean())
        of_head = torch.autograd.grad(sum(terms), [*head.parameters()], retain_graph=True) if terms else None  # type: ignore[arg-type]
        of_trunk = torch.autograd.grad(own, [*trunk.parameters()])
        pipeline.accumulate(rows)
        torch.testing.assert_close([p.grad for p in trunk.parameters()], [*of_trunk])
        assert of_head is not None or all(p.grad is None for p in head.parameters())
        if of_head is not None:
            torch.testing.assert_close([p.grad for p in head.parameters()], [*of_head])
        if batch >= 2:
            assert pipeline.side_means[0]["late loss"] == pytest.approx(terms[-1].item(), rel=1e-5)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", [Distillation, LocalCritic])
def test_evaluations_are_cross_entropy(kind: Any) -> None:
    rows = [(torch.randn(2, 3, WIDTH), torch.randint(VOCABULARY, (2, 3)))]
    got, want = (reference(made, 1).evaluate(rows) for made in (kind, kind))
    plain = CausalLMLoss()(reference(kind, 1).outputs(rows[0][0])[0].materialize(), rows[0][1])
    assert torch.equal(got, want)
    torch.testing.assert_close(got[0], plain.double(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "distillation", "blocks": 1}, "blocks and distillation don't go together"),
        ({"objective": "local_critic", "blocks": 2}, "blocks and local_critic don't go together"),
        ({"objective": "distillation", "borrow": 1}, "borrow and distillation don't go together"),
        ({"objective": "local_critic", "borrow": 1}, "borrow and local_critic don't go together"),
        ({"objective": "distillation", "negatives": 9}, "negatives and distillation don't go together"),
        ({"objective": "local_critic", "negatives": 9}, "negatives and local_critic don't go together"),
        ({"objective": "local_critic", "readout": "shared"}, 'local_critic is for readout "private", .*"shared"'),
        ({"objective": "local_critic", "readout": "frozen"}, 'local_critic is for readout "private", .*"frozen"'),
        ({"objective": {"name": "distillation", "delay": 0}}, "delay of distillation: .*greater than or equal to 1"),
        ({"objective": {"name": "local_critic", "tokens": 0}}, "tokens of local_critic: .*greater than or equal to 1"),
        ({"objective": {"name": "distillation", "temperature": 0}}, "temperature of distillation: .*greater than 0"),
        ({"objective": {"name": "local_critic", "weight": 1}}, "'weight' is no option of local_critic.*tokens, delay"),
    ],
)
def test_what_there_is_not_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        InterlockingConfig.parse({"aux_head": options})
