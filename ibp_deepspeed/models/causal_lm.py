"""Hugging Face causal language models cut into pipeline layers: embedding, decoder layers, head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from ibp_deepspeed.config.interlocking import AuxHeadConfig, InterlockingConfig
from ibp_deepspeed.models.costs import backward_passes, head_operations, layer_operations
from ibp_deepspeed.models.cut_model import CutModel, Weights, count_parameters
from ibp_deepspeed.models.errors import ModelError
from ibp_deepspeed.models.kinds import first_of_kind
from ibp_deepspeed.models.layers import (
    AuxiliaryHead,
    DecoderLayer,
    EmbeddingLayer,
    FollowingHead,
    HeadLayer,
    copied_layers,
)
from ibp_deepspeed.models.objective import LanguageModelObjective, of_name
from ibp_deepspeed.models.partition import balanced_sizes, check_next_stages, manual_bounds, sizes_to_bounds
from ibp_deepspeed.models.proofs.first_use import require_proof
from ibp_deepspeed.models.recorder import MASKED_ATTENTION, Recorder
from ibp_deepspeed.models.routers import SWITCH, RouterBalance
from ibp_deepspeed.models.shell import Shell
from ibp_deepspeed.models.tuning import EVERYTHING, Tuning
from ibp_deepspeed.objectives.cross_entropy import CausalLMLoss
from ibp_deepspeed.objectives.reconstruction import Reconstruction
from ibp_deepspeed.optimizer.matrices import inner_matrices
from ibp_deepspeed.strategy.head_placement import HeadPlacement

if TYPE_CHECKING:
    from ibp_deepspeed.planner.workload import Workload

PRIVATE = AuxHeadConfig()
_NANOSECONDS = 1e9  # partitions are of whole numbers


class CausalLM(CutModel):
    """How one Hugging Face causal language model is cut into pipeline layers: embedding, decoder layers, head.

    The LM head has its own weights even where the model's config ties it to the embedding, which would tie the first
    stage to the last; ``was_tied`` tells.

    Args:
        hf_config: of any causal model whose cut is proved, see :mod:`ibp_deepspeed.models.proofs`; it is copied.
        seed: of all initial weights.
        dtype: of all parameters; initial values are drawn in fp32 and rounded to it.
        weights: of the layers, instead of random ones.
        fresh_heads: draw auxiliary heads at random all the same; otherwise they begin with the given weights' final
            norm and LM head, and blocks as the decoder layers that the model has next.
        tuning: what of the layers is trained (default: everything).

    Attributes:
        num_layers: decoder layers + 2.
        vocab_size, hidden_size: V and H.
        was_tied: whether the config ties the LM head to the embedding.
        tuning: with LoRA's targets named.

    Raises:
        ModelError: a model that cannot be cut, by name and with the reason; targets that it does not have.
    """

    blocks_called = "decoder layers"

    def __init__(
        self,
        hf_config: PretrainedConfig,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        weights: Weights | None = None,
        fresh_heads: bool = False,
        tuning: Tuning = EVERYTHING,
    ) -> None:
        self._shell = Shell(hf_config)
        self._proved = require_proof(hf_config)
        self._recorder = Recorder(self._shell)
        super().__init__(self._shell, len(self._shell.layers), seed=seed, dtype=dtype, weights=weights)
        self._fresh_heads = fresh_heads or weights is None
        self.tuning = tuning
        if tuning.lora is not None:
            self.tuning = tuning.model_copy(update={"lora": tuning.lora.for_model(self._shell)})
        self.vocab_size: int = self._shell.hf_config.vocab_size
        self.hidden_size: int = self._shell.hf_config.hidden_size
        self.was_tied = self._shell.was_tied

    def objective(self, stage: int, options: AuxHeadConfig, after: int) -> LanguageModelObjective:
        """The one that the options name, read out by :meth:`aux_head`."""
        objective = of_name(options.objective.name)(self.aux_head(stage, options, after))
        if isinstance(objective, Reconstruction):
            objective.depth = after / (self.num_layers - 2)
        return objective

    def empty_objective(self, options: AuxHeadConfig, after: int) -> LanguageModelObjective:
        """:meth:`objective` with its head's parameters on meta."""
        return of_name(options.objective.name)(self._meta_head(options, after))

    def loss_fn(self, options: AuxHeadConfig | None) -> CausalLMLoss:
        """Next tokens' cross-entropy."""
        return CausalLMLoss(options.chunk_tokens if options else None)

    @property
    def balances_experts(self) -> bool:
        """Whether the config asks for the loss of its routers."""
        return self._shell.balances_experts

    def side_loss(self, interlocking: InterlockingConfig) -> RouterBalance | None:
        """The loss of a stage's routers; None: the model's config does not ask for it.

        Raises:
            ModelError: it does, and that can't be done with these settings, or the architecture has none.
        """
        if not self.balances_experts:
            return None
        options = interlocking.aux_head
        why = {
            "compile": interlocking.compile,
            "aux_head.blocks": options is not None and options.blocks > 0,
            "aux_head.borrow": options is not None and options.borrow > 0,
            "aux_head.objective: momentum": options is not None and copied_layers(options) > 0,
        }
        for name in (name for name, given in why.items() if given):
            raise ModelError(
                f'"interlocking.{name}" does not go together with the loss of a router ({SWITCH}=True in the model\'s '
                "config): leave one of them out."
            )
        return self.router_balance()

    def router_balance(self) -> RouterBalance | None:
        """The loss of the routers of a stage; None: the config does not ask for it.

        Raises:
            ModelError: it does, and the architecture has none.
        """
        return RouterBalance(self._shell) if self.balances_experts else None

    def build_layer(self, index: int) -> nn.Module:
        """Overrides CutModel's: with what of the layer is trained, and adapters."""
        return self.tuning.apply(super().build_layer(index), index, self._seed)

    def layer_class(self, index: int) -> type[nn.Module]:
        """The class of layer ``index``."""
        ends = {0: EmbeddingLayer, self.num_layers - 1: HeadLayer}
        return ends.get(index, DecoderLayer)

    def aux_head(self, stage_id: int, options: AuxHeadConfig = PRIVATE, after: int = 0) -> AuxiliaryHead:
        """The auxiliary head of a stage, hidden states [B, S, H] → LazyLogits, on the CPU.

        A norm and an LM head of the model's kinds, with decoder blocks before them if the options say so; random ones
        depend on seed and stage alone. An LM head that is not private starts as the model's own.

        Args:
            stage_id: the stage that the head ends.
            options: kind of LM head, number of blocks.
            after: decoder layers of the model before the head, which decides the kind of its blocks.
        """
        head = self._meta_head(options, after)
        sources = head.sources()
        if self._fresh_heads:
            kept = "readout." if options.readout != "private" else None
            sources = {name: source for name, source in sources.items() if kept and name.startswith(kept)}
        values = self._from_layers(sources) | head.initial()
        self._initialised(head, f"auxiliary head {stage_id}", values)
        return head

    def check_document_masks(self) -> None:
        """That documents in one row can be kept apart.

        Raises:
            ModelError: the attention takes no mask as a tensor, or something else in the layers crosses documents.
        """
        kind = self.hf_config._attn_implementation
        if kind not in MASKED_ATTENTION:
            raise ModelError(
                f"attention '{kind}' of the model's config takes no mask that keeps documents apart: use "
                f"{' or '.join(MASKED_ATTENTION)}, or train with --no-document-masks"
            )
        if "documents" not in self._proved:
            raise ModelError(
                f"a model of type '{self.hf_config.model_type}' with this config can't keep documents in one row apart "
                "(convert_hf.py check says why): train with --no-document-masks"
            )

    def trained_parameters(self) -> int:
        """Of all layers together those that are trained; nothing is materialised."""
        layers = (self.tuning.apply(self._meta_layer(index), index, self._seed) for index in range(self.num_layers))
        return sum(p.numel() for layer in layers for p in layer.parameters() if p.requires_grad)

    def matrix_parameters(self) -> list[int]:
        """Elements of the matrices that a token is multiplied with in every layer of ``layer_specs``.

        Embeddings are looked up, and of experts (all in one parameter) a token passes those that it is sent to.
        """
        chosen = getattr(self.hf_config, "num_experts_per_tok", None)
        return [_matrices(self._meta_layer(index), chosen) for index in range(self.num_layers)]

    def muon_parameters(self, options: AuxHeadConfig | None) -> tuple[list[int], int]:
        """Elements of the matrices that Muon trains, of every layer of ``layer_specs`` and of an auxiliary head; all
        layers are taken to be trained, and nothing is materialised."""
        last = self.num_layers - 1
        layers = [self._meta_layer(index) for index in range(self.num_layers)]
        of_layers = [inner_matrices([at], first=k == 0, last=k == last, head=None) for k, at in enumerate(layers)]
        head = None if options is None else self._meta_head(options, self.num_layers)
        of_head = inner_matrices([], first=False, last=False, head=head)
        return [sum(p.numel() for p in matrices) for matrices in of_layers], sum(p.numel() for p in of_head)

    def layer_kinds(self) -> list[int]:
        """For every layer of ``layer_specs`` the first one that is like it, see :mod:`ibp_deepspeed.models.kinds`."""
        last = self.num_layers - 1
        return [0, *(1 + first for first in first_of_kind(list(self._shell.layers), self.hf_config)), last]

    def aux_head_parameters(self, options: AuxHeadConfig = PRIVATE) -> int:
        """Parameters of one auxiliary head, copied ones included."""
        return count_parameters(self._meta_head(options, self.num_layers))

    def copied_head_parameters(self, options: AuxHeadConfig) -> int:
        """Those of them that are copies, which the head does not train."""
        return sum(p.numel() for p in self._meta_head(options, self.num_layers).parameters() if not p.requires_grad)

    def partition(
        self,
        num_stages: int,
        *,
        aux_heads: AuxHeadConfig | None = PRIVATE,
        exits: Sequence[int] | None = None,
        manual: Sequence[int] | None = None,
        sequence_length: int = 0,
        measured: Workload | None = None,
    ) -> list[int]:
        """Bounds of the stages in ``layer_specs``: stage k has the layers bounds[k] … bounds[k+1]-1.

        The slowest stage is as fast as it can be, counted in operations (``costs.py``) or in measured seconds, with an
        auxiliary head for all exits but the last (on the stage behind, if heads stand behind layers of the next one)
        unless ``aux_heads`` is None; of such partitions the most even one is taken. Every stage has a decoder layer.

        Args:
            num_stages: K, from 1 to the number of decoder layers.
            aux_heads: options of the auxiliary heads that count.
            exits: the stages that have a loss; None: all.
            manual: instead, K numbers of decoder layers, or K+1 bounds.
            sequence_length: S, for attention's share of a layer; 0 leaves it out.
            measured: seconds of this model's layers and of such a head, in the place of operations.

        Returns:
            K+1 numbers from 0 to ``num_layers``.

        Raises:
            ModelError: more stages than decoder layers, a manual partition that does not fit, or heads that copy layers
                which a stage has not, or that are trained by adapters.
        """
        self._check_stages(num_stages)
        placed = None if exits is None else tuple(exits)
        placement = HeadPlacement(num_stages, aux_heads.borrow if aux_heads else 0, placed)
        if manual is not None:
            bounds = manual_bounds(manual, num_stages, self.num_layers - 2)
            self._check_copies(aux_heads, placement, bounds)
            return bounds
        if measured is None:
            layers = [layer.total for layer in layer_operations(self, sequence_length)]
            head = head_operations(self, aux_heads, sequence_length).total if aux_heads else 0.0
        else:
            layers = [
                _NANOSECONDS
                * (layer.forward + has_b * layer.input_gradient + has_w * (layer.weight_gradient + layer.at_once))
                for layer, (has_b, has_w) in zip(measured.layers, backward_passes(self), strict=True)
            ]
            head = _NANOSECONDS * measured.head.total if aux_heads and measured.head else 0.0
        embedding, *costs, readout = map(round, layers)
        costs[0] += embedding
        costs[-1] += readout
        heads = [0 if placement.head_at(stage) is None else round(head) for stage in range(num_stages)]
        bounds = sizes_to_bounds(balanced_sizes(costs, heads))
        self._check_copies(aux_heads, placement, bounds)
        return bounds

    def _check_copies(self, options: AuxHeadConfig | None, placement: HeadPlacement, bounds: Sequence[int]) -> None:
        copied = copied_layers(options) if options and placement.heads else 0
        if copied and self.tuning.lora is not None:
            raise ModelError(
                '"aux_head.objective" is momentum, whose heads copy whole layers, and --lora trains adapters in them: '
                "leave one of the two out."
            )
        check_next_stages(copied, placement.heads, bounds)

    def _meta_layer(self, index: int) -> nn.Module:
        if self.layer_class(index) is DecoderLayer:
            return DecoderLayer(self._shell, index - 1, self._recorder)
        return self.layer_class(index)(self._shell)

    def _meta_head(self, options: AuxHeadConfig, after: int) -> AuxiliaryHead:
        kind = AuxiliaryHead if options.readout == "private" else FollowingHead
        return kind(self._shell, self._recorder, options, after)

    def _from_layers(self, sources: Mapping[str, str]) -> dict[str, Tensor]:
        """Name → the value of the "layer.parameter" that it names; each layer is read once, or drawn."""
        wanted: dict[int, dict[str, str]] = {}
        for name, source in sources.items():
            layer, _, parameter = source.partition(".")
            wanted.setdefault(int(layer), {})[name] = parameter
        values = {}
        for index, names in wanted.items():
            found = self._weights.layer(index, list(names.values())) if self._weights else self._drawn(index)
            values.update({name: found[parameter] for name, parameter in names.items()})
        return values

    def _drawn(self, index: int) -> dict[str, Tensor]:
        return self._initialised(self._meta_layer(index), f"layer {index}").state_dict()


def _matrices(module: nn.Module, chosen_experts: int | None) -> int:
    looked_up = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    parameters = [p for p in module.parameters() if p.dim() > 1 and id(p) not in looked_up]
    experts = [p for p in parameters if p.dim() == 3 and chosen_experts is not None]  # [experts, …]
    passed = sum(p.numel() for p in parameters) - sum(p.numel() for p in experts)
    return passed + sum(p.numel() // p.shape[0] * (chosen_experts or 0) for p in experts)
