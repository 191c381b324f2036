"""Label smoothing is torch's, chunk by chunk. In processes: tests/engine/test_named_objectives.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ibp_deepspeed import InterlockedReference, InterlockingConfig
from ibp_deepspeed.config.objectives import OBJECTIVES, objective_options
from ibp_deepspeed.errors import ConfigError, InterlockingError
from ibp_deepspeed.models.objective import of_name
from ibp_deepspeed.objectives.cross_entropy import CausalLMLoss, LazyLogits
from ibp_deepspeed.objectives.label_smoothing import LabelSmoothing
from tests.objectives.test_cross_entropy import Head, gradients, relative, some_labels, states

SMOOTHED = {"objective": {"name": "label_smoothing", "smoothing": 0.3}}


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("chunk_tokens", [None, 1, 4])
@pytest.mark.parametrize("ignored", [(), (0, 5, 6, 20), tuple(range(21))])
def test_equals_torch(chunk_tokens: int | None, ignored: tuple[int, ...], lazy: bool) -> None:
    """Loss and all gradients, fp64, 1e-12."""
    head, hidden, labels = Head(), states(), some_labels(ignored)
    logits = head(hidden)
    got = CausalLMLoss(chunk_tokens, smoothing=0.1)(logits if lazy else logits.materialize(), labels)
    total = F.cross_entropy(logits.materialize().flatten(0, 1), labels.flatten(), label_smoothing=0.1, reduction="sum")
    want = total / max(1, 21 - len(ignored))
    if len(ignored) == 21:
        assert got == 0 and not any(g.any() for g in gradients(got, hidden, head))
        return
    assert relative(got, want) <= 1e-12
    for a, b in zip(gradients(got, hidden, head), gradients(want, hidden, head), strict=True):
        assert relative(a, b) <= 1e-12


class ToyHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.readout = nn.Linear(4, 7)

    def forward(self, hidden: Tensor) -> LazyLogits:
        return LazyLogits(hidden, self.readout, tuple(self.readout.parameters()))


def reference(make: Any, **options: Any) -> InterlockedReference:
    torch.manual_seed(0)
    stages, head = [nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), ToyHead())], ToyHead()
    return InterlockedReference(stages, [make(head)], CausalLMLoss(), {"strategy": "local", "aux_head": options})


def test_evaluation_and_the_last_stage_are_cross_entropy() -> None:
    torch.manual_seed(1)
    batch = [(torch.randn(2, 10, 4), torch.randint(7, (2, 10)))]
    plain, soft = reference(lambda head: head), reference(LabelSmoothing, **SMOOTHED)
    assert torch.equal(soft.evaluate(batch), plain.evaluate(batch))
    got, want = soft.accumulate(batch), plain.accumulate(batch)
    assert got[1] == want[1] and got[0] != want[0]


def test_a_part_of_the_positions() -> None:
    """The loss is that of the chosen positions alone."""
    torch.manual_seed(1)
    batch = [(torch.randn(2, 10, 4), torch.randint(7, (2, 10)))]
    pipeline = reference(LabelSmoothing, **SMOOTHED, aux_tokens=0.4)
    sample = pipeline.objectives[0].positions
    assert sample is not None
    chosen = sample.positions(0, 0, 20)
    logits = pipeline.outputs(batch[0][0])[0].materialize().flatten(0, 1)[chosen]
    want = F.cross_entropy(logits, batch[0][1].flatten()[chosen], label_smoothing=0.3)
    torch.testing.assert_close(pipeline.accumulate(batch)[0], want.double(), check_dtype=False, atol=1e-6, rtol=1e-6)


def test_every_name_has_its_objective() -> None:
    assert [of_name(name).name for name in OBJECTIVES] == list(OBJECTIVES)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_name_is_an_object_of_defaults(name: str) -> None:
    short, long = (InterlockingConfig.parse({"aux_head": {"objective": given}}) for given in (name, {"name": name}))
    assert short == long and short.aux_head is not None and short.aux_head.objective.name == name
    assert objective_options(short.aux_head.objective.model_dump(mode="json")) == short.aux_head.objective


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "label_smooting"}, r'there is no objective .*did you mean "label_smoothing".*cross_entropy'),
        ({"objective": {"smoothing": 0.1}}, "there is no objective None, there are cross_entropy"),
        ({"objective": 3}, "there is no objective 3, there are cross_entropy"),
        ({"objective": ["label_smoothing"]}, "there is no objective"),
        ({"objective": {"name": "label_smoothing", "epsilon": 1}}, "'epsilon' is no option.*which has smoothing"),
        ({"objective": {"name": "cross_entropy", "smoothing": 0.1}}, "no option of cross_entropy, which has none"),
        ({"objective": {"name": "label_smoothing", "smoothing": 1}}, "smoothing of label_smoothing: .*less than 1"),
        ({"objective": "label_smoothing", "negatives": 5}, "negatives and label_smoothing don't go together"),
    ],
)
def test_what_there_is_not_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        InterlockingConfig.parse({"aux_head": options})


def test_a_head_of_a_users_own_is_not_trained_by_another_loss_in_silence() -> None:
    with pytest.raises(InterlockingError, match="aux_head.objective.* is label_smoothing, .* given as Objective"):
        reference(lambda head: head, **SMOOTHED)
