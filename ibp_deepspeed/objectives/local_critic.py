"""Local critic training: heads that estimate the next exit's loss.

H. Lee, C.-J. Hsieh, J.-S. Lee 2021, arXiv:2102.01963. The trunk is trained by the cross-entropy of its head, the
critic, and the critic so that its loss is the next exit's. As in the released code
(github.com/hjdw2/Local-critic-training) a critic minimises the mean absolute difference of the two losses of each
sample, here of each token, and the last critic follows the model's own loss. There both are of the same batch; here
the next exit's comes some batches later.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ibp_deepspeed.config.interlocking import AuxHeadConfig
from ibp_deepspeed.config.objectives import LocalCriticOptions
from ibp_deepspeed.objectives.by_rows import by_rows
from ibp_deepspeed.objectives.cross_entropy import LazyLogits
from ibp_deepspeed.objectives.head import LossFn, Objective
from ibp_deepspeed.objectives.late_targets import LateTargets

IGNORED = -100


@dataclass(frozen=True)
class TokenLosses(LateTargets):
    """The cross-entropy of an exit at some positions, nats."""

    def of(self, outputs: Any, labels: Tensor) -> list[Tensor]:
        """Overrides LateTargets': fp32 [t]; 0 where the label does not count."""
        return [by_rows(token_losses, outputs, labels).float()]


class LocalCritic(Objective):
    """Cross-entropy that trains the trunk alone; some batches later |L_k - L_next| of each token for the head."""

    name = "local_critic"

    def configured(self, options: AuxHeadConfig | None, loss_fn: LossFn | None) -> Self:
        """Overrides Objective's: with the options."""
        super().configured(options, loss_fn)
        if options is not None and isinstance(options.objective, LocalCriticOptions):
            own = options.objective
            self.needs = replace(self.needs, late=TokenLosses(own.tokens, own.delay, options.aux_tokens_seed))
        return self

    def outputs(self, hidden: Any) -> Any:
        """Overrides Objective's: through them no gradient reaches the head."""
        with untrained(self.module):
            outputs = self.module(hidden)
        if not isinstance(outputs, LazyLogits):
            return outputs
        return LazyLogits(outputs.hidden, self._untrained_readout(outputs.readout), ())

    def late_loss(self, states: Tensor, labels: Tensor, targets: list[Tensor]) -> Tensor:
        """Overrides Objective's: the mean over positions whose label counts."""
        (wanted,), counted = targets, labels != IGNORED
        differences = (by_rows(token_losses, self.module(states), labels) - wanted).abs()
        return differences.masked_fill(~counted, 0.0).sum() / counted.sum().clamp(min=1)

    def _untrained_readout(self, readout: Any) -> Any:
        """A linear one stays one, which fused kernels look for."""
        if isinstance(readout, nn.Linear):
            return _detached(readout)

        def read(rows: Tensor) -> Tensor:
            with untrained(self.module):
                logits: Tensor = readout(rows)
                return logits

        return read


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy in nats of each row of logits [t, V] in fp32 or more, [t]; 0 where the label is -100."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)


@contextmanager
def untrained(module: nn.Module) -> Iterator[None]:
    """What is computed inside gives the module's parameters no gradient, and its inputs theirs."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _detached(linear: nn.Linear) -> nn.Linear:
    """The same map with the same memory, which nothing trains."""
    made = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
    made.weight = nn.Parameter(linear.weight.detach(), requires_grad=False)
    if linear.bias is not None:
        made.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
    return made
