"""From the weights of pipeline layers back to one Hugging Face model: the whole, or the first stages with a head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from ibp_deepspeed.models.config import with_layers
from ibp_deepspeed.models.errors import ModelError
from ibp_deepspeed.models.shell import Shell, meta_model, untied
from ibp_deepspeed.objectives.head import ExitLayers


def assemble(hf_config: PretrainedConfig, state: Mapping[int, Mapping[str, Tensor]]) -> PreTrainedModel:
    """The full model, with an LM head of its own, from the state dicts of all pipeline layers.

    Args:
        hf_config: the config that ``CausalLM`` was given.
        state: index in ``layer_specs`` → ``state_dict()`` of that layer; the tensors are copied.

    Returns:
        The model in eval mode on the CPU, ready for ``generate`` and ``save_pretrained``.

    Raises:
        ModelError: a layer or a weight that is missing, unknown or of another shape; named.
    """
    shell = Shell(hf_config)
    expected = set(range(len(shell.layers) + 2))
    if set(state) != expected:
        raise ModelError(
            f"the weights have layers {sorted(state)}, and the model needs layers 0 to {max(expected)}: "
            f"missing {sorted(expected - set(state))}, unknown {sorted(set(state) - expected)}"
        )
    weights: dict[str, Tensor] = {}
    for index, layer_state in state.items():
        for key, tensor in layer_state.items():
            # copied, because loading below adopts the tensors and training may go on
            weights[model_key(shell, index, key)] = tensor.detach().to("cpu", copy=True)
    return _loaded(hf_config, weights)


def exit_parts(
    hf_config: PretrainedConfig, below: Iterator[Mapping[str, Tensor]], layers: int, head: ExitLayers
) -> tuple[PretrainedConfig, Iterator[Mapping[str, Tensor]]]:
    """What :func:`assemble` makes a smaller model of.

    Args:
        hf_config: of the whole model.
        below: state dicts of the embedding and the decoder layers before the head.
        layers: how many these are.
        head: as layers of the model.

    Returns:
        config of the smaller model, states of its pipeline layers in the dtype of ``below``, each as it is taken.
    """

    def states() -> Iterator[Mapping[str, Tensor]]:
        dtypes: list[torch.dtype] = []
        for state in below:
            dtypes += [tensor.dtype for tensor in state.values() if tensor.is_floating_point()][:1]
            yield state
        for part in head.states:
            yield {name: tensor.to(dtypes[0]) for name, tensor in part.items()}

    return with_layers(hf_config, [*range(layers - 1), *head.kinds]), states()


def model_key(shell: Shell, index: int, key: str) -> str:
    """The name in the whole model of a weight of pipeline layer ``index``."""
    last = len(shell.layers) + 1
    decoder = f"{shell.decoder_name}."
    prefixes = {"layer": f"{decoder}{shell.layers_name}.{index - 1}."}
    if index == 0:
        prefixes = {"decoder": decoder}
    if index == last:
        prefixes = {"norm": f"{decoder}{shell.norm_name}.", "projection": f"{decoder}project_out.", "readout": ""}
    part, _, rest = key.partition(".")
    if part not in prefixes:
        raise ModelError(f"layer {index} has a weight '{key}' that no layer of {shell} has at that place")
    return prefixes[part] + rest


def _loaded(hf_config: PretrainedConfig, weights: dict[str, Tensor]) -> PreTrainedModel:
    model = meta_model(untied(hf_config))
    wanted = model.state_dict()
    missing, unknown = sorted(wanted.keys() - weights.keys()), sorted(weights.keys() - wanted.keys())
    misfits = [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    if missing or unknown or misfits:
        raise ModelError(
            f"the weights do not fit a model of type '{hf_config.model_type}': missing {missing}, unknown {unknown}, "
            f"of another shape {misfits}"
        )
    model.load_state_dict(weights, assign=True)
    return as_exported(model)


def as_exported(model: PreTrainedModel) -> PreTrainedModel:
    """With what goes beside the weights set for use, in eval mode."""
    model.config.use_cache = True
    if model.generation_config is not None:  # made of the config; generating without a cache takes three times as long
        model.generation_config.use_cache = True
    model.config.dtype = model.dtype
    return model.eval()
