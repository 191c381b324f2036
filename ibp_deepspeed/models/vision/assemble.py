"""From the weights of pipeline layers back to one Hugging Face image classifier."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from ibp_deepspeed.models.errors import ModelError
from ibp_deepspeed.models.vision.shell import ImageShell, meta_model


def assemble(hf_config: PretrainedConfig, state: Mapping[int, Mapping[str, Tensor]]) -> PreTrainedModel:
    """The full model from the state dicts of all pipeline layers.

    Args:
        hf_config: the config that ``ImageClassifier`` was given.
        state: index in ``layer_specs`` → ``state_dict()`` of that layer; the tensors are copied.

    Returns:
        The model in eval mode on the CPU, ready for ``save_pretrained``.

    Raises:
        ModelError: a weight that is missing, unknown or of another shape; named.
    """
    shell, model = ImageShell(hf_config), meta_model(hf_config)
    weights = {
        shell.model_key(index, key): tensor.detach().to("cpu", copy=True)
        for index, layer in state.items()
        for key, tensor in layer.items()
    }
    wanted = model.state_dict()
    missing, unknown = sorted(wanted.keys() - weights.keys()), sorted(weights.keys() - wanted.keys())
    misfits = sorted(n for n, tensor in wanted.items() if n in weights and weights[n].shape != tensor.shape)
    if missing or unknown or misfits:
        raise ModelError(
            f"the weights do not fit a model of type '{hf_config.model_type}': missing {missing}, unknown {unknown}, "
            f"of another shape {misfits}"
        )
    model.load_state_dict(weights, assign=True)
    model.config.dtype = model.dtype
    return model.eval()
