"""The pipeline layers of a causal language model: embedding, decoder layers, head; and auxiliary heads.

Each is built on its own from the shell. A meta copy tells its parameter count; ``initialise`` makes it real.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ibp_deepspeed.config.interlocking import AuxHeadConfig
from ibp_deepspeed.config.objectives import MomentumOptions
from ibp_deepspeed.documents import at_hand
from ibp_deepspeed.models.beside import beside_of
from ibp_deepspeed.models.recorder import Recorder, no_mask, plain_attributes
from ibp_deepspeed.models.routers import routers
from ibp_deepspeed.models.shell import Shell
from ibp_deepspeed.objectives.cross_entropy import LazyLogits, LogitsBeside
from ibp_deepspeed.objectives.slow_layers import SlowLayers
from ibp_deepspeed.stage.weight_gradients import WeightGradients, split_backward, split_linear


class EmbeddingLayer(nn.Module):
    """Tokens [B, S] → hidden states [B, S, H]: the model's own decoder without layers and final norm.

    So learned positions, embedding scales and input projections are the model's own too.
    """

    def __init__(self, shell: Shell) -> None:
        super().__init__()
        ends = [part for part in (shell.norm, shell.projection) if part is not None]
        swaps = [(end, nn.Identity()) for end in ends]
        self.decoder = shell.copy_of(shell.decoder, (shell.layers, nn.ModuleList()), *swaps)

    def compiled_parts(self) -> list[nn.Module]:
        """None: looking up rows gains nothing, and making masks would break the graph."""
        return []

    def forward(self, input_ids: Tensor) -> Tensor:
        documents, more = at_hand(), {}
        if documents is not None:
            more = {"position_ids": documents.positions, "attention_mask": no_mask(input_ids.device)}
        return self.decoder(input_ids=input_ids, use_cache=False, **more).last_hidden_state


class DecoderLayer(nn.Module):
    """Hidden states [B, S, H] → hidden states [B, S, H]; ``index`` counts decoder layers from 0."""

    def __init__(self, shell: Shell, index: int, recorder: Recorder) -> None:
        super().__init__()
        self.layer = shell.copy_of(shell.layers[index])
        self.index = index
        self._recorder = recorder
        self._router_logits: list[Tensor] = []
        for router, place in routers(self.layer, shell.decoder) if shell.balances_experts else ():
            router.register_forward_hook(partial(self._note, place))

    def compiled_parts(self) -> list[nn.Module]:
        """The model's layer; what the recorder does around it is Python's."""
        return [self.layer]

    def split_backward(self, weight_gradients: WeightGradients) -> None:
        """All linear maps in it, GPT-2's too, which have their own class."""
        split_backward([self.layer], weight_gradients)
        for module in self.layer.modules():
            if isinstance(module, Conv1D):
                split_linear(module, weight_gradients, transposed=True)

    def take_router_logits(self) -> list[Tensor]:
        """What its routers said in the last forward pass, [tokens, experts] each, if the config asks for their loss."""
        taken, self._router_logits = self._router_logits, []
        return taken

    def _note(self, place: int, router: nn.Module, given: Any, output: Any) -> None:
        self._router_logits.append(output[place] if isinstance(output, tuple) else output)

    def forward(self, hidden: Tensor) -> Tensor:
        self._router_logits.clear()
        output = self.layer(hidden, **self._recorder.inputs_for(self.index, hidden))
        return output[0] if isinstance(output, tuple) else output


class Readout(nn.Module):
    """Normed hidden states → lazy logits: an LM head of the model's own kind.

    It is the model's forward with the decoder stubbed, so soft caps, biases and logit scales are the model's.

    Args:
        shell: of the model.
        rank: make the LM head's matrix a product of two, of this inner size.
    """

    def __init__(self, shell: Shell, rank: int | None = None) -> None:
        super().__init__()
        self.projection = shell.copy_of(shell.projection) if shell.projection is not None else None
        swaps: list[tuple[nn.Module, nn.Module]] = [(shell.decoder, _PassThrough(shell.decoder))]
        if rank is not None:
            swaps.append((shell.readout, _product_of_two(shell.readout, rank)))
        self.readout = shell.copy_of(shell.model, *swaps)
        self._linear_name = shell.readout_name
        self._is_linear: bool | None = None

    def factors(self) -> list[nn.Linear]:
        """The linear map to the logits, or the two whose product it is, the inner one first."""
        linear = self.readout.get_submodule(self._linear_name)
        return [part for part in linear.modules() if isinstance(part, nn.Linear)]

    def readout_tensors(self) -> list[Tensor]:
        """What heads with a shared LM head copy."""
        parts = [part for part in (self.projection, self.readout) if part is not None]
        return [parameter for part in parts for parameter in part.parameters()]

    def compiled_parts(self) -> list[nn.Module]:
        """None: logits are made chunk by chunk, as the loss asks for them."""
        return []

    def forward(self, hidden: Tensor) -> LazyLogits:
        if self.projection is not None:
            hidden = self.projection(hidden)
        trained = tuple(p for p in self.readout.parameters() if p.requires_grad)
        return LazyLogits(hidden, self._rows_to_logits(hidden), trained)

    def split_backward(self, weight_gradients: WeightGradients) -> None:
        """Nothing: the loss takes the LM head's gradients chunk by chunk, as it goes through the tokens."""

    def _read(self, rows: Tensor) -> Tensor:
        return self.readout(inputs_embeds=rows[None], use_cache=False).logits.squeeze(0)

    def _rows_to_logits(self, hidden: Tensor) -> Callable[[Tensor], Tensor]:
        """``_read``, or the linear map inside where that is all it does: fused kernels look for one."""
        linear = self.factors()[-1]
        if self._is_linear is None and len(self.factors()) == 1:
            with torch.no_grad():
                row = hidden.detach().reshape(-1, hidden.shape[-1])[:1]
                row = 1000 * torch.ones_like(row)  # large, so that a soft cap shows
                self._is_linear = torch.equal(self._read(row), linear(row))
        return linear if self._is_linear else self._read


class HeadLayer(Readout):
    """Hidden states [B, S, H] → lazy logits [B, S, V]: final norm and the model's own LM head."""

    def __init__(self, shell: Shell) -> None:
        super().__init__(shell)
        self.norm = shell.copy_of(shell.norm)

    def forward(self, hidden: Tensor) -> LazyLogits:
        return super().forward(self.norm(hidden))


class AuxiliaryHead(nn.Module):
    """Hidden states [B, S, H] → lazy logits [B, S, V]: decoder blocks, a norm and an LM head of the model's kinds.

    Args:
        shell, recorder: of the model.
        options: how many blocks, or copied layers in their place; the rank of the LM head.
        after: decoder layers of the model before the head; the blocks are of the kind that the model has next.

    Attributes:
        kinds: for each block or copied layer, the decoder layer of the model that it is of the kind of.
        beside: what its objective trains beside it, if anything; the logits are then ``LogitsBeside``.
    """

    def __init__(self, shell: Shell, recorder: Recorder, options: AuxHeadConfig, after: int = 0) -> None:
        super().__init__()
        layers = len(shell.layers)
        copied = copied_layers(options)
        self.kinds = [min(after + i, layers - 1) for i in range(copied or options.blocks)]
        blocks = [DecoderLayer(shell, kind, recorder) for kind in self.kinds]
        size, dtype = shell.hf_config.hidden_size, shell.readout.weight.dtype
        self.blocks: Any = SlowLayers(blocks, size, dtype, "meta") if copied else nn.Sequential(*blocks)
        self.norm = shell.copy_of(shell.norm)
        self.readout = Readout(shell, options.rank)
        self.beside = beside_of(shell, options.objective)
        self._last_layer = layers + 1

    def forward(self, hidden: Tensor) -> LazyLogits:
        logits = self._logits(hidden)
        if self.beside is None:
            return logits
        return LogitsBeside(logits.hidden, logits.readout, logits.parameters, hidden, self.beside)

    def _logits(self, hidden: Tensor) -> LazyLogits:
        return self.readout(self.norm(self.blocks(hidden)))

    def sources(self) -> dict[str, str]:
        """Parameter of the head → "layer.parameter" of the pipeline, from which it can start.

        The norm and the LM head are the model's own (the logit lens), blocks the decoder layers that follow.
        """
        found = {}
        for name, _ in self.named_parameters():
            part, _, rest = name.partition(".")
            if part == "norm":
                found[name] = f"{self._last_layer}.{name}"
            elif part == "readout" and len(self.readout.factors()) == 1:
                found[name] = f"{self._last_layer}.{rest}"
            elif part == "blocks":
                index, _, inner = rest.removeprefix("layers.").partition(".")
                if index.isdigit():
                    found[name] = f"{self.kinds[int(index)] + 1}.{inner}"
        return found

    def initial(self) -> dict[str, Tensor]:
        """Parameters that begin at a value of their own: B of copied layers at 0."""
        if not isinstance(self.blocks, SlowLayers):
            return {}
        return {"blocks.correction.weight": torch.zeros(self.blocks.correction.weight.shape)}

    @torch.no_grad()
    def as_last_layer(self) -> dict[str, Tensor]:
        """The state dict of a ``HeadLayer`` that reads out as this head does behind its blocks."""
        state = {f"norm.{name}": tensor for name, tensor in self.norm.state_dict().items()}
        name = f"readout.{self.readout._linear_name}"
        state.update({n: t for n, t in self.readout.state_dict().items() if not n.startswith(f"{name}.")})
        *inner, outer = self.readout.factors()
        weight = outer.weight @ inner[0].weight if inner else outer.weight
        state[f"{name}.weight"] = weight / self._divisor()
        if outer.bias is not None:
            state[f"{name}.bias"] = outer.bias
        return state

    def _divisor(self) -> Tensor | float:
        """What the LM head's input is divided by."""
        return 1.0


class FollowingHead(AuxiliaryHead):
    """An auxiliary head whose LM head is a copy of the model's own, which no loss trains here.

    Attributes:
        temperature: learned, [1]; what the logits of a linear LM head are divided by.
    """

    def __init__(self, shell: Shell, recorder: Recorder, options: AuxHeadConfig, after: int = 0) -> None:
        super().__init__(shell, recorder, options, after)
        self.readout.requires_grad_(False)
        self.temperature = nn.Parameter(torch.ones(1))

    def readout_tensors(self) -> list[Tensor]:
        """The copied tensors, in the order of the last layer's."""
        return self.readout.readout_tensors()

    def _logits(self, hidden: Tensor) -> LazyLogits:
        return self.readout(self.norm(self.blocks(hidden)) / self.temperature)

    def _divisor(self) -> Tensor | float:
        return self.temperature.detach()


class _PassThrough(nn.Module):
    """Stands where the decoder stood and gives its input back as the decoder's output; numbers are the decoder's."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        for name, value in plain_attributes(decoder).items():
            setattr(self, name, value)

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> _DecoderOutput:
        return _DecoderOutput(last_hidden_state=inputs_embeds)


class _DecoderOutput(SimpleNamespace):
    """A decoder's output of which only the hidden state exists; models ask for others, each has its own."""

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: int | slice) -> Any:
        return (self.last_hidden_state,)[index]


def copied_layers(options: AuxHeadConfig) -> int:
    """How many layers of the next stage a head has copies of."""
    return options.objective.layers if isinstance(options.objective, MomentumOptions) else 0


def _product_of_two(readout: nn.Linear, rank: int) -> nn.Sequential:
    """A linear map as two of a smaller inner size, on meta."""
    bias = readout.bias is not None
    options: dict[str, Any] = {"device": "meta", "dtype": readout.weight.dtype}
    inner = nn.Linear(readout.in_features, rank, bias=False, **options)
    return nn.Sequential(inner, nn.Linear(rank, readout.out_features, bias=bias, **options))
