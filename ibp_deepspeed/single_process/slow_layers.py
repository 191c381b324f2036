"""Heads with slow copies of the next stage's first layers, where all stages are in one process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ibp_deepspeed.config.interlocking import InterlockingConfig
from ibp_deepspeed.errors import ConfigError, InterlockingError
from ibp_deepspeed.objectives.head import Objective
from ibp_deepspeed.objectives.shared_readout import RefreshRule, install
from ibp_deepspeed.objectives.slow_layers import Followed, begun_again, completed, first_layers, slow_rule


class SlowCopies:
    """A head's copies, and the layers that they follow.

    Args:
        layers, copies: their parameters; the copies begin as the layers.
        average: β.
    """

    def __init__(self, layers: list[Tensor], copies: list[Tensor], average: float | None) -> None:
        self._layers, self._copies = layers, copies
        self._followed = Followed(layers, average)
        install(copies, layers)

    def begin_batch(self, batch: int, rule: RefreshRule) -> None:
        """Take a copy, and use one, if the rule names one for the beginning of ``batch`` (from 0)."""
        if rule.takes(batch):
            self._followed.take(batch, self._layers)
        used = rule.used_from(batch)
        if used is not None:
            install(self._copies, self._followed.taken.pop(used))

    def state(self, pending: Sequence[int]) -> dict[str, Any]:
        """For a checkpoint; the copies in use are in the head's own state."""
        return self._followed.state(pending)

    def load(
        self, state: dict[str, Any] | None, pending: Sequence[int], *, strict: bool, boundary: int, path: Any
    ) -> list[str]:
        """From a checkpoint, see :func:`completed`; from the layers as they are now if it has nothing that fits.

        Returns:
            lines for the user.
        """
        found = completed(state, pending, self._layers, strict=strict, path=path)
        if found is not None:
            self._followed.load(found)
            return []
        self._followed.begin_again(self._layers, pending)
        install(self._copies, self._layers)
        return [begun_again(boundary)]


def slow_copies(
    stages: Sequence[nn.Module], objectives: Mapping[int, Objective], interlocking: InterlockingConfig
) -> dict[int, SlowCopies]:
    """Of all heads that have some, by their stage.

    Raises:
        ConfigError: a stage with fewer layers, or a head without copies, or with others.
    """
    found, rule = {}, slow_rule(interlocking, 1)
    for stage, objective in objectives.items():
        if rule is None or not objective.needs.layers:
            continue
        try:
            copies = objective.copied_layers()
            layers = first_layers(stage + 1, list(stages[stage + 1].children()), objective.needs.layers)
        except InterlockingError as error:
            raise ConfigError(str(error)) from None
        here, there = ([tuple(tensor.shape) for tensor in tensors] for tensors in (copies, layers))
        if here != there:
            raise ConfigError(f"the head of stage {stage} copies layers of {here}, the next stage's are {there}.")
        found[stage] = SlowCopies(layers, copies, rule.average)
    return found
