"""What a head costs beside the layers of a stage, from their sizes: matrix products, in multiply-adds a token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ibp_deepspeed.config.interlocking import AuxHeadConfig

if TYPE_CHECKING:
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


def layer_costs(model: CausalLM, sequence_length: int) -> list[int]:
    """F, B and W of every layer of ``layer_specs`` for a token; embeddings are looked up.

    Args:
        model: the cut model.
        sequence_length: attention looks at half of it on average; 0 leaves attention out.
    """
    attention = sequence_length * model.hidden_size  # scores and values: S·H each, over half of the positions
    embedding, *layers, readout = model.matrix_parameters()
    return [3 * embedding, *(3 * (layer + attention) for layer in layers), 3 * readout]


def head_costs(model: CausalLM, options: AuxHeadConfig, sequence_length: int) -> int:
    """The same of an auxiliary head; one that copies its LM head has no W there."""
    products = 3 if options.readout == "private" else 2
    layers = layer_costs(model, sequence_length)[1:-1]
    blocks = options.blocks * sum(layers) / len(layers)
    return round(products * options.aux_tokens * head_readout_work(model, options) + blocks)


def training_flops(model: CausalLM, options: AuxHeadConfig | None, heads: int, sequence_length: int) -> float:
    """Floating-point operations that training on one token needs: 6·P + 6·L·S·H, as MFU is usually counted.

    P: elements of the matrices that a token passes (2 operations each forward, 4 backward): those of decoder layers, of
    experts those that it is sent to, of the model's LM head, and of each auxiliary head; embeddings are looked up. An
    LM head that copies the last stage's has no weight gradient (4 instead of 6), and heads read only the positions and
    tokens that they take their loss on. L decoder layers attend to half of S positions on average: 2·S·H forward, twice
    that backward.

    What a method does beyond that is not counted: recomputation, and the further input gradients of N > 1.
    """
    trunk = 2.0 * sum(layer_costs(model, sequence_length))
    if options is None or heads == 0:
        return trunk
    return trunk + heads * 2 * head_costs(model, options, sequence_length)


def head_readout_work(model: CausalLM, options: AuxHeadConfig) -> int:
    """Multiply-adds of a head's LM head for a token that it takes its loss on, forward."""
    size = model.hidden_size, model.vocab_size
    if options.rank is not None:
        return options.rank * sum(size)
    return size[0] * (size[1] if options.negatives is None else options.negatives)
