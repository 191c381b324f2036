"""The pipeline layers of a causal language model: embedding, decoder layers, head; and auxiliary heads.

Each is built on its own from the shell. A meta copy tells its parameter count; ``initialise`` makes it real.
"""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ibp_deepspeed.config import AuxHeadConfig
from ibp_deepspeed.heads import LazyLogits
from models.recorder import Recorder
from models.shell import Shell


class EmbeddingLayer(nn.Module):
    """Tokens [B, S] → hidden states [B, S, H]: the model's own decoder without layers and final norm.

    So learned positions, embedding scales and input projections are the model's own too.
    """

    def __init__(self, shell: Shell) -> None:
        super().__init__()
        ends = [part for part in (shell.norm, shell.projection) if part is not None]
        swaps = [(end, nn.Identity()) for end in ends]
        self.decoder = shell.copy_of(shell.decoder, (shell.layers, nn.ModuleList()), *swaps)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.decoder(input_ids=input_ids, use_cache=False).last_hidden_state


class DecoderLayer(nn.Module):
    """Hidden states [B, S, H] → hidden states [B, S, H]; ``index`` counts decoder layers from 0."""

    def __init__(self, shell: Shell, index: int, recorder: Recorder) -> None:
        super().__init__()
        self.layer = shell.copy_of(shell.layers[index])
        self.index = index
        self._recorder = recorder

    def forward(self, hidden: Tensor) -> Tensor:
        output = self.layer(hidden, **self._recorder.inputs_for(self.index, hidden))
        return output[0] if isinstance(output, tuple) else output


class Readout(nn.Module):
    """Normed hidden states → lazy logits: the model's own readout.

    It is the model's forward with the decoder stubbed, so soft caps, biases and logit scales are its own.
    """

    def __init__(self, shell: Shell) -> None:
        super().__init__()
        self.projection = shell.copy_of(shell.projection) if shell.projection is not None else None
        self.readout = shell.copy_of(shell.model, (shell.decoder, _PassThrough()))

    def readout_tensors(self) -> list[Tensor]:
        """What heads with a shared readout copy."""
        parts = [part for part in (self.projection, self.readout) if part is not None]
        return [parameter for part in parts for parameter in part.parameters()]

    def forward(self, hidden: Tensor) -> LazyLogits:
        if self.projection is not None:
            hidden = self.projection(hidden)
        return _lazy(hidden, self._read, self.readout)

    def _read(self, rows: Tensor) -> Tensor:
        return self.readout(inputs_embeds=rows[None], use_cache=False).logits.squeeze(0)


class HeadLayer(Readout):
    """Hidden states [B, S, H] → lazy logits [B, S, V]: final norm and the model's own readout."""

    def __init__(self, shell: Shell) -> None:
        super().__init__(shell)
        self.norm = shell.copy_of(shell.norm)

    def forward(self, hidden: Tensor) -> LazyLogits:
        return super().forward(self.norm(hidden))


class AuxiliaryHead(nn.Module):
    """Hidden states [B, S, H] → lazy logits [B, S, V]: decoder blocks, a norm of the model's kind, a linear readout.

    Args:
        shell, recorder: of the model.
        options: how many blocks, the rank of the readout.
        after: decoder layers of the model before the head; the blocks are of the kind that the model has next.
    """

    def __init__(self, shell: Shell, recorder: Recorder, options: AuxHeadConfig, after: int = 0) -> None:
        super().__init__()
        last = len(shell.layers) - 1
        kinds = [min(after + i, last) for i in range(options.blocks)]
        self.blocks = nn.Sequential(*(DecoderLayer(shell, kind, recorder) for kind in kinds))
        self.norm = shell.copy_of(shell.norm)
        self.readout: Any = self._make_readout(shell, options)

    def forward(self, hidden: Tensor) -> LazyLogits:
        return _lazy(self.norm(self.blocks(hidden)), self.readout, self.readout)

    def _make_readout(self, shell: Shell, options: AuxHeadConfig) -> nn.Module:
        hidden, vocabulary = shell.config.hidden_size, shell.config.vocab_size
        sizes = [hidden, vocabulary] if options.rank is None else [hidden, options.rank, vocabulary]
        factors = [nn.Linear(*pair, bias=False, device="meta", dtype=torch.float32) for pair in pairwise(sizes)]
        return factors[0] if len(factors) == 1 else nn.Sequential(*factors)


class FollowingHead(AuxiliaryHead):
    """An auxiliary head whose readout is a copy of the model's own, which no loss trains here.

    Attributes:
        temperature: learned, [1]; what the logits of a linear readout are divided by.
    """

    def __init__(self, shell: Shell, recorder: Recorder, options: AuxHeadConfig, after: int = 0) -> None:
        super().__init__(shell, recorder, options, after)
        self.temperature = nn.Parameter(torch.ones(1))

    def follow(self, last_layer: HeadLayer) -> None:
        """Copy the readout of the model's last layer."""
        with torch.no_grad():
            for copy, original in zip(self.readout_tensors(), last_layer.readout_tensors(), strict=True):
                copy.copy_(original)

    def readout_tensors(self) -> list[Tensor]:
        """The copied tensors, in the order of the last layer's."""
        return self.readout.readout_tensors()

    def forward(self, hidden: Tensor) -> LazyLogits:
        return self.readout(self.norm(self.blocks(hidden)) / self.temperature)

    def _make_readout(self, shell: Shell, options: AuxHeadConfig) -> Readout:
        return Readout(shell).requires_grad_(False)


class _PassThrough(nn.Module):
    """Stands where the decoder stood and gives its input back as the decoder's output."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> _DecoderOutput:
        return _DecoderOutput(last_hidden_state=inputs_embeds)


class _DecoderOutput(SimpleNamespace):
    """A decoder's output of which only the hidden state exists; models ask for others, each has its own."""

    def __getattr__(self, name: str) -> None:
        return None


def _lazy(hidden: Tensor, readout: Any, module: nn.Module) -> LazyLogits:
    return LazyLogits(hidden, readout, tuple(p for p in module.parameters() if p.requires_grad))
