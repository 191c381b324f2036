"""Interlocking backpropagation in one process: the oracle of every test.

Plain autograd over an uncut forward pass, written from the definition of the gradients and from nothing else in
this package but the table of which loss trains which trunk and the rule by which heads follow the last LM head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ibp_deepspeed.config.interlocking import InterlockingConfig
from ibp_deepspeed.documents import Documents, reading
from ibp_deepspeed.errors import ConfigError
from ibp_deepspeed.measures import LATE_LOSS
from ibp_deepspeed.objectives.evaluation import ExitMeans, weight_of
from ibp_deepspeed.objectives.head import Objective, as_objective, last_objective
from ibp_deepspeed.objectives.shared_readout import ReadoutSource, RefreshRule, install, source_readout
from ibp_deepspeed.objectives.side_loss import MakeSideLoss, SideLoss
from ibp_deepspeed.objectives.slow_layers import slow_rule
from ibp_deepspeed.single_process.late_learning import LateLearning
from ibp_deepspeed.single_process.slow_layers import slow_copies
from ibp_deepspeed.strategy.head_placement import HeadPlacement
from ibp_deepspeed.strategy.strategy import Strategy
from ibp_deepspeed.strategy.timeline import Timeline

Weighted = tuple[list[nn.Parameter], float]
Sample = tuple[Any, Any] | tuple[Any, Any, Documents | None]
"""A micro-batch: inputs, labels, and the documents of its rows where they hold several."""
_Ends = tuple[Tensor | None, Tensor]
"""See ``Objective.stage_loss``: h_{k-1}, detached, and what the head reads."""


class InterlockedReference:
    """K stages and the heads of their exits on one device, differentiated as interlocking backpropagation says.

    With ``aux_head.readout`` shared or frozen the heads' copies are overwritten by the last stage's LM head here.

    Args:
        stages: the K trunks; stage k maps h_{k-1} to h_k, the last one to what ``loss_fn`` takes.
        aux_heads: the heads a_k of stages 0 … K-2, modules or objectives, None where a stage is no exit (a head given
            there is not used); or None for backpropagation without heads.
        loss_fn: ``loss_fn(outputs, labels)`` → scalar.
        interlocking: the configuration, as in the DeepSpeed JSON.
        side_loss: gives a loss of a stage's own layers after their forward pass, a part of all exits' losses behind it.

    Attributes:
        placement: where the heads stand.
        objectives: of all losses, by their stage.
        aux_heads: the heads' modules, by their stage.
        batch: the number of the next batch, from 0; strategies and copies of the LM head follow it.
        taken: copies of the last LM head that are not used yet, by the batch at whose beginning they were taken.
        source: what makes these copies; None with private LM heads.
        late: what exits keep for late targets.
        slow_layers: heads' copies of the next stage's first layers, by the heads' stages.
        side_losses: of the last forward pass, by stage.
        side_means: of the last batch: stage → name → mean over its micro-batches; the late loss too.

    Raises:
        ConfigError: more borrowed or copied layers than a stage has, or what :class:`Timeline` refuses.
        InterlockingError: late targets that can't be had.
        ValueError: an exit without a head.
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],
        aux_heads: Sequence[nn.Module | Objective | None] | None,
        loss_fn: Callable[[Any, Any], Tensor],
        interlocking: InterlockingConfig | Mapping[str, Any],
        side_loss: MakeSideLoss | None = None,
    ) -> None:
        self.stages = list(stages)
        self.loss_fn, self._side_loss = loss_fn, side_loss
        self.side_losses: dict[int, SideLoss] = {}
        self.side_means: dict[int, dict[str, float]] = {}
        self.interlocking = InterlockingConfig.parse(interlocking)
        count, self._has_heads = len(self.stages), aux_heads is not None
        Timeline(self.interlocking, count, 1, self._has_heads).distinct()  # refuses what needs heads
        if aux_heads is not None and len(aux_heads) != count - 1:
            raise ValueError(f"{count} stages need {count - 1} heads, not {len(aux_heads)}")
        self.placement = HeadPlacement.from_config(self.interlocking, count, self._has_heads)
        options = self.interlocking.aux_head if self.placement.heads else None
        made = {
            k: as_objective(_head_of(aux_heads or (), k)).configured(options, loss_fn) for k in self.placement.heads
        }
        self.objectives = {**made, count - 1: last_objective().configured(None, loss_fn)}
        self.aux_heads = {k: objective.module for k, objective in made.items()}
        self.late = LateLearning(self.objectives, self.placement)
        self._check_borrow()
        self.batch = 0
        self.taken: dict[int, list[Tensor]] = {}
        self.source: ReadoutSource | None = None
        self._copies: list[list[Tensor]] = []
        if options and options.readout != "private":
            self._copies = [objective.copied_readout() for objective in made.values()]
            initial = source_readout(self.stages[-1])
            self.source = ReadoutSource(initial, options.average)
            self._install(initial)
        self.slow_layers = slow_copies(self.stages, self.objectives, self.interlocking)

    def parameters(self, stage: int) -> list[nn.Parameter]:
        """Trunk and head parameters of a stage, in that order; with borrowed layers the head of the stage before."""
        return [p for module in self.modules(stage) for p in trained_parameters(module)]

    def modules(self, stage: int) -> list[nn.Module]:
        """Trunk, and head if there is one, that live on a stage together."""
        loss = self.placement.head_at(stage)
        return [self.stages[stage], *([] if loss is None else [self.aux_heads[loss]])]

    def accumulate(self, micro_batches: Sequence[Sample]) -> Tensor:
        """Add the gradients of the next batch to ``.grad``.

        Args:
            micro_batches: M pairs of inputs and labels, or triples with the documents of the rows.

        Returns:
            The K losses, means over the micro-batches, detached; NaN where a stage has no loss. Shape [K], float64.
        """
        count = len(micro_batches)
        self._refresh_readouts(count)
        rule = slow_rule(self.interlocking, count)
        if rule is not None:
            for copies in self.slow_layers.values():
                copies.begin_batch(self.batch, rule)
        self.side_means = {}
        self._learn_late(count)
        strategies = Timeline(self.interlocking, len(self.stages), count, self._has_heads).at(self.batch)
        rows = []
        for i, (sample, strategy) in enumerate(zip(micro_batches, strategies.strategies, strict=True)):
            losses = self._training_losses(i, *sample)
            for j, loss in losses.items():
                self._differentiate((loss + self._side_of(j)) / count, self._trained_by(j, strategy))
            rows.append({j: loss.detach() for j, loss in losses.items()})
            for k, side in self.side_losses.items():
                self._add_mean(k, side.name, side.value, count)
        self.batch += 1
        return self._means(rows)

    def evaluate(self, micro_batches: Sequence[Sample], measure: Callable[[Any, Any], Tensor] | None = None) -> Tensor:
        """The K held-out losses, or another ``measure(outputs, labels)`` of the exits. Shape [K], float64.

        Means over micro-batches, weighted by what counts in them if the loss function, or the measure, says so. A
        measure may give several numbers, [m]: the means are [K, m].
        """
        means = ExitMeans(len(self.stages))
        with torch.no_grad():
            for inputs, labels, *documents in micro_batches:
                outputs, objectives = self.outputs(inputs, *documents), self.objectives
                values = {k: (measure or objectives[k].measure)(outputs[k], labels) for k in outputs}
                weights = {k: weight_of(measure, labels) if measure else objectives[k].weight(labels) for k in outputs}
                means.add(values, weights)
        return means.means()

    def outputs(self, inputs: Any, documents: Documents | None = None) -> dict[int, Any]:
        """What the loss of every exit takes, on one connected graph."""
        return self._forward(inputs, documents)[0]

    def _forward(self, inputs: Any, documents: Documents | None) -> tuple[dict[int, Any], dict[int, _Ends]]:
        """What the loss of every exit takes, and what the stage of its head was given and made of it."""
        with reading(documents):
            return self._through_stages(inputs)

    def _through_stages(self, hidden: Any) -> tuple[dict[int, Any], dict[int, _Ends]]:
        outputs: dict[int, Any] = {}
        ends: dict[int, _Ends] = {}
        for k, stage in enumerate(self.stages):
            loss = self.placement.head_at(k)
            given = hidden.detach() if k else None
            if self.placement.borrowed_from(k):
                hidden, stage = self._borrowed(k)(hidden), self._own(k)
                outputs[k - 1], ends[k - 1] = self.objectives[k - 1].outputs(hidden), (None, hidden)
            hidden = stage(hidden)
            side = None if self._side_loss is None else self._side_loss(stage.children())
            if side is not None:
                self.side_losses[k] = side
            if loss == k:
                outputs[k], ends[k] = self.objectives[k].outputs(hidden), (given, hidden)
        return {**outputs, len(self.stages) - 1: hidden}, ends

    def losses(self, inputs: Any, labels: Any, documents: Documents | None = None) -> dict[int, Tensor]:
        """L_k of every stage that has one, of one micro-batch, at all positions and over all tokens.

        Args:
            inputs, labels: of the micro-batch.
            documents: of its rows, where they hold several.
        """
        outputs = self.outputs(inputs, documents)
        return {k: objective.loss(outputs[k], labels) for k, objective in self.objectives.items()}

    def _training_losses(
        self, micro_batch: int, inputs: Any, labels: Any, documents: Documents | None = None
    ) -> dict[int, Tensor]:
        """The same at the positions and over the tokens that a micro-batch of the next batch takes in training."""
        outputs, ends = self._forward(inputs, documents)
        losses = {}
        for k, objective in self.objectives.items():
            where = {"batch": self.batch, "micro_batch": micro_batch, "index": k}
            losses[k] = objective.training_loss(outputs[k], labels, **where)
            if k in ends:
                losses[k] = losses[k] + objective.stage_loss(*ends[k], labels, **where)
        self.late.keep(self.batch, {k: hidden for k, (_, hidden) in ends.items()}, outputs, labels)
        return losses

    def _learn_late(self, micro_batches: int) -> None:
        """Add the gradients of the heads' losses whose targets are due as a batch begins."""
        for k, loss, count in self.late.losses(self.batch, micro_batches):
            self._differentiate(loss / count, [(trained_parameters(self.aux_heads[k]), 1.0)])
            self._add_mean(k, LATE_LOSS, loss, count)

    def _add_mean(self, stage: int, name: str, value: Tensor, count: int) -> None:
        means = self.side_means.setdefault(stage, {})
        means[name] = means.get(name, 0.0) + value.item() / count

    def _side_of(self, loss: int) -> Tensor | float:
        """What the stages up to an exit add to its loss."""
        return sum(side.factor * side.value for stage, side in self.side_losses.items() if stage <= loss)

    def _trained_by(self, loss: int, strategy: Strategy) -> list[Weighted]:
        """The parameters that L_loss trains, with its weight: w_{j-k} ∂L_j/∂θ_k for trunks, ∂L_k/∂φ_k for heads."""
        groups: list[Weighted] = []
        for k in strategy.users(loss):
            weights = strategy.weights(k)
            if self.placement.borrowed_from(k) and strategy.mode == "window":
                # Its first layers also serve the head before: one loss more in their mean.
                share = 1.0 / (len(weights) + 1)
                groups += [
                    (trained_parameters(self._borrowed(k)), share),
                    (trained_parameters(self._own(k)), weights[loss]),
                ]
            else:
                groups.append((trained_parameters(self.stages[k]), weights[loss]))
        if loss in self.aux_heads:
            groups.append((trained_parameters(self.aux_heads[loss]), 1.0))
            if self.placement.borrow and strategy.mode == "window":
                share = 1.0 / (len(strategy.weights(loss + 1)) + 1)
                groups.append((trained_parameters(self._borrowed(loss + 1)), share))
        return groups

    def _borrowed(self, stage: int) -> nn.Module:
        return self.stages[stage][: self.placement.borrow]  # type: ignore[index,return-value]

    def _own(self, stage: int) -> nn.Module:
        return self.stages[stage][self.placement.borrow :]  # type: ignore[index,return-value]

    def _check_borrow(self) -> None:
        borrow = self.placement.borrow
        if not borrow:
            return
        if self._side_loss is not None:
            raise ConfigError('a side_loss does not go together with "interlocking.aux_head.borrow".')
        for k, stage in enumerate(self.stages):
            if self.placement.borrowed_from(k) == 0:
                continue
            if not isinstance(stage, nn.Sequential) or len(stage) <= borrow:
                raise ConfigError(
                    f'"interlocking.aux_head.borrow" is {borrow}, but stage {k} is not an nn.Sequential of more layers.'
                )

    def _refresh_readouts(self, micro_batches: int) -> None:
        """Take and use copies of the last stage's LM head at the beginning of a batch."""
        rule = RefreshRule.from_config(self.interlocking, len(self.stages), micro_batches) if self._copies else None
        if rule is None:
            return
        if rule.takes(self.batch):
            assert self.source is not None
            self.taken[self.batch] = self.source.take(source_readout(self.stages[-1]))
        taken = rule.used_from(self.batch)
        if taken is not None:
            self._install(self.taken.pop(taken))

    def _install(self, newest: list[Tensor]) -> None:
        for copies in self._copies:
            install(copies, newest)

    def _differentiate(self, loss: Tensor, groups: list[Weighted]) -> None:
        """Add weight · ∂loss/∂parameter for all groups, in one backward pass."""
        parameters = [p for group, _ in groups for p in group]
        if not parameters:
            return
        weights = [weight for group, weight in groups for _ in group]
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        for parameter, gradient, weight in zip(parameters, gradients, weights, strict=True):
            if gradient is not None:
                self._add_gradient(parameter, gradient if weight == 1.0 else gradient * weight)

    def _add_gradient(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def _means(self, rows: Sequence[Mapping[int, Tensor]]) -> Tensor:
        means = torch.full((len(self.stages),), torch.nan, dtype=torch.float64)
        for k in rows[0]:
            means[k] = torch.stack([row[k] for row in rows]).double().mean()
        return means


def _head_of(aux_heads: Sequence[nn.Module | Objective | None], stage: int) -> nn.Module | Objective:
    head = aux_heads[stage]
    if head is None:
        raise ValueError(f"stage {stage} has a loss and needs a head, None was given")
    return head


def trained_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Those that require a gradient."""
    return [p for p in module.parameters() if p.requires_grad]
