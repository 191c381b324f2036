"""The norm of gradients, and what happens to a step when it is not finite."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ibp_deepspeed.errors import NonFiniteError


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The 2-norm of all gradients together, a scalar; 0 where there is none."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def drop_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Leave the next step out: torch's optimizers touch neither weights nor moments of what has no gradient."""
    for parameter in parameters:
        parameter.grad = None


def not_made(policy: str, who: str, batch: int, losses: Sequence[int] = ()) -> str:
    """What is said of a step that was not made: a warning, or by the policy the end.

    Args:
        policy: ``stop`` or ``skip_batch``.
        who: the stage.
        batch: from 1.
        losses: of this stage that are not finite, by their indices.

    Raises:
        NonFiniteError: policy ``stop``.
    """
    what = f"loss {', '.join(map(str, losses))} is not finite" if losses else "the norm of the gradients is not finite"
    if policy == "stop":
        raise NonFiniteError(
            f"{who}, batch {batch}: {what}; go on from the last checkpoint with a smaller learning rate or other data, "
            'or set "interlocking.non_finite" to "skip_batch", which leaves such steps of a stage out.'
        )
    return f"{who}, batch {batch}: {what}, so this step is left out; the learning rate goes on"
