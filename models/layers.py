"""The pipeline layers of a causal language model: embedding, decoder layers, head; and auxiliary heads.

Each is built on its own from the shell. A meta copy tells its parameter count; ``initialise`` makes it real.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

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


class HeadLayer(nn.Module):
    """Hidden states [B, S, H] → lazy logits [B, S, V]: final norm and the model's own readout.

    The readout is the model's forward with the decoder stubbed, so soft caps, biases and logit scales are its own.
    """

    def __init__(self, shell: Shell) -> None:
        super().__init__()
        self.norm = shell.copy_of(shell.norm)
        self.projection = shell.copy_of(shell.projection) if shell.projection is not None else None
        self.readout = shell.copy_of(shell.model, (shell.decoder, _PassThrough()))

    def forward(self, hidden: Tensor) -> LazyLogits:
        hidden = self.norm(hidden)
        if self.projection is not None:
            hidden = self.projection(hidden)
        return _lazy(hidden, self._read, self.readout)

    def _read(self, rows: Tensor) -> Tensor:
        return self.readout(inputs_embeds=rows[None], use_cache=False).logits[0]


class AuxiliaryHead(nn.Module):
    """Hidden states [B, S, H] → lazy logits [B, S, V]: a norm of the model's kind and a linear readout."""

    def __init__(self, shell: Shell) -> None:
        super().__init__()
        self.norm = shell.copy_of(shell.norm)
        self.readout = nn.Linear(
            shell.config.hidden_size, shell.config.vocab_size, bias=False, device="meta", dtype=torch.float32
        )

    def forward(self, hidden: Tensor) -> LazyLogits:
        return _lazy(self.norm(hidden), self.readout, self.readout)


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
