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
    the positions that it takes its loss on, and only the tokens that stand for the vocabulary.
    """
    if options is None:
        return 0.0
    layer, readout = layer_work(model, sequence_length), head_readout_work(model, options)
    products = 3 if options.readout == "private" else 2
    head = products * options.aux_tokens * readout + 3 * options.blocks * layer
    return head / (layer * (model.num_layers - 2) / num_stages)


def training_flops(model: CausalLM, options: AuxHeadConfig | None, heads: int, sequence_length: int) -> float:
    """Floating-point operations that training on one token needs: 6·P + 6·L·S·H, as MFU is usually counted.

    P: elements of the matrices that a token passes (2 operations each forward, 4 backward): those of decoder layers, of
    experts those that it is sent to, of the model's LM head, and of each auxiliary head; embeddings are looked up. An
    LM head that copies the last stage's has no weight gradient (4 instead of 6), and heads read only the positions and
    tokens that they take their loss on. L decoder layers attend to half of S positions on average: 2·S·H forward, twice
    that backward.

    What a method does beyond that is not counted: recomputation, and the further input gradients of N > 1.
    """
    attention = 2 * sequence_length * model.hidden_size
    embedding, *layers, readout = model.matrix_parameters()
    trunk = sum(6 * layer + 3 * attention for layer in layers) + 6 * (embedding + readout)
    if options is None or heads == 0:
        return float(trunk)
    products = 3 if options.readout == "private" else 2
    matrices = head_readout_work(model, options)
    blocks = options.blocks * (6 * sum(layers) / len(layers) + 3 * attention)
    return trunk + heads * (2 * products * options.aux_tokens * matrices + blocks)


def head_readout_work(model: CausalLM, options: AuxHeadConfig) -> int:
    """Multiply-adds of a head's LM head for a token that it takes its loss on, forward."""
    size = model.hidden_size, model.vocab_size
    if options.rank is not None:
        return options.rank * sum(size)
    return size[0] * (size[1] if options.negatives is None else options.negatives)
