"""What a head costs beside the layers of a stage, from their sizes: matrix products, in multiply-adds a token."""

from __future__ import annotations

from ibp_deepspeed.config.interlocking import AuxHeadConfig
from models.causal_lm import CausalLM


def layer_work(model: CausalLM, sequence_length: int) -> float:
    """Forward pass of a decoder layer: its weights, and attention's scores and values over a sequence."""
    decoder_layers = model.parameter_counts()[1:-1]
    return sum(decoder_layers) / len(decoder_layers) + 2 * sequence_length * model.hidden_size


def head_cost(model: CausalLM, options: AuxHeadConfig | None, num_stages: int, sequence_length: int) -> float:
    """Forward and backward of a head, in units of a stage's forward pass (0 without heads).

    An LM head that copies the last stage's has no weight gradient; one of low rank is two small products; it reads only
    the positions that it takes its loss on.
    """
    if options is None:
        return 0.0
    layer, size, rank = layer_work(model, sequence_length), (model.hidden_size, model.vocab_size), options.rank
    readout = size[0] * size[1] if rank is None else rank * sum(size)
    products = 3 if options.readout == "private" else 2
    head = products * options.aux_tokens * readout + 3 * options.blocks * layer
    return head / (layer * (model.num_layers - 2) / num_stages)
