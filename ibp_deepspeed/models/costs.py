"""Operations of a language model's layers and heads, from their sizes: multiply-adds of matrix products, for a token.

Embeddings are looked up. Attention looks at half of a sequence on average: scores and values, S·H each over half of the
positions, forward, and twice that backward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ibp_deepspeed.config.interlocking import AuxHeadConfig
from ibp_deepspeed.config.objectives import (
    LATE,
    LocalCriticOptions,
    MomentumOptions,
    PredSimOptions,
    ReconstructionOptions,
    StochasticLayerwiseOptions,
)
from ibp_deepspeed.models.beside import inner_size

if TYPE_CHECKING:
    from ibp_deepspeed.models.causal_lm import CausalLM


class Operations(NamedTuple):
    """Multiply-adds a token.

    Attributes:
        forward, input_gradient, weight_gradient: of F, B and W.
    """

    forward: float
    input_gradient: float
    weight_gradient: float

    @property
    def total(self) -> float:
        """Of all three."""
        return sum(self)


def layer_operations(model: CausalLM, sequence_length: int) -> list[Operations]:
    """Of every layer of ``layer_specs``; one that is not trained has no W, and no B where none before it is either.
    Adapters count as nothing.

    Args:
        model: the cut model.
        sequence_length: S; 0 leaves attention out.
    """
    attention = sequence_length * model.hidden_size
    embedding, *layers, readout = model.matrix_parameters()
    decoder = [Operations(layer + attention, layer + 2 * attention, layer) for layer in layers]
    whole = [Operations(*[embedding] * 3), *decoder, Operations(*[readout] * 3)]
    return [
        Operations(each.forward, each.input_gradient * has_b, each.weight_gradient * has_w)
        for each, (has_b, has_w) in zip(whole, backward_passes(model), strict=True)
    ]


def backward_passes(model: CausalLM) -> list[tuple[bool, bool]]:
    """For every layer whether it has a B, and whether a W of its weights: what is trained decides."""
    trained = [model.tuning.trains(index, model.num_layers) for index in range(model.num_layers)]
    lowest = trained.index(True) if any(trained) else model.num_layers
    return [(index >= lowest, each and model.tuning.lora is None) for index, each in enumerate(trained)]


def head_operations(model: CausalLM, options: AuxHeadConfig, sequence_length: int) -> Operations:
    """Of an auxiliary head; its blocks are taken to be like the mean decoder layer.

    An LM head that copies the last stage's has no weight gradient, and none of its own loss has a critic; one of low
    rank is two small products; it reads only the positions that it takes its loss on, and only the tokens that stand
    for the vocabulary.
    """
    product = options.aux_tokens * _readout_products(model, options)
    trained = options.readout == "private" and not isinstance(options.objective, LocalCriticOptions)
    of_readout = Operations(product, product, product if trained else 0.0)
    layers = layer_operations(model, sequence_length)[1:-1]
    of_block = Operations(*(sum(piece) / len(layers) for piece in zip(*layers, strict=True)))
    beside = _beside_operations(model, options, sequence_length, of_block)
    return Operations(*(a + options.blocks * b + c for a, b, c in zip(of_readout, of_block, beside, strict=True)))


def _beside_operations(
    model: CausalLM, options: AuxHeadConfig, sequence_length: int, of_block: Operations
) -> Operations:
    """Of what an objective needs beside its prediction.

    Similarity and late targets are of some tokens of a micro-batch, here of one sequence: with more of them it is less
    for each token. A decoder of the input reads out the positions of the loss. Late targets are read out by the next
    exit too, which counts here as what this head costs. A random projection reads what a stage is given and what it
    makes of it, and is not trained; the first stage has none, which is not told apart here. Copied layers have
    no weight gradient, the map B beside them has one.
    """
    objective = options.objective
    if isinstance(objective, MomentumOptions):
        b, q = model.hidden_size**2, objective.layers
        return Operations(q * of_block.forward + b, q * of_block.input_gradient + b, b)
    if isinstance(objective, ReconstructionOptions):
        inner = inner_size(model.hidden_size)
        decoder = inner * (model.hidden_size + options.aux_tokens * model.vocab_size)
        return Operations(*[decoder] * 3)
    if isinstance(objective, PredSimOptions) and sequence_length:
        compared = min(objective.tokens, sequence_length)
        share, size = compared / sequence_length, model.hidden_size
        linear, pairs = share * size**2, share * size * compared
        return Operations(linear + pairs, linear + 2 * pairs, linear)
    if isinstance(objective, LATE) and sequence_length:
        share = min(objective.tokens, sequence_length) / sequence_length
        late = share * _readout_products(model, options)
        return Operations(2 * late, late, late if options.readout == "private" else 0.0)
    if isinstance(objective, StochasticLayerwiseOptions):
        projection = options.aux_tokens * objective.categories * model.hidden_size
        return Operations(2 * projection, projection, 0.0)
    return Operations(0.0, 0.0, 0.0)


def training_flops(model: CausalLM, options: AuxHeadConfig | None, heads: int, sequence_length: int) -> float:
    """Floating-point operations that training on one token needs: 6·P + 6·L·S·H, as MFU is usually counted.

    P: elements of the matrices that a token passes (2 operations each forward, 4 backward): those of decoder layers, of
    experts those that it is sent to, of the model's LM head, and of each auxiliary head.

    What a method does beyond that is not counted: recomputation, and the further input gradients of N > 1.
    """
    trunk = sum(layer.total for layer in layer_operations(model, sequence_length))
    of_heads = 0.0 if options is None or heads == 0 else heads * head_operations(model, options, sequence_length).total
    return 2 * (trunk + of_heads)


def _readout_products(model: CausalLM, options: AuxHeadConfig) -> int:
    """Multiply-adds of a head's LM head for a token that it takes its loss on, forward."""
    size = model.hidden_size, model.vocab_size
    if options.rank is not None:
        return options.rank * sum(size)
    return size[0] * (size[1] if options.negatives is None else options.negatives)
