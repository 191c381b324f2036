"""From a cut model to an interlocked pipeline, and the description that goes with its checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn
from transformers import AutoConfig, PretrainedConfig

from ibp_deepspeed import InterlockedPipelineModule, InterlockingConfig
from ibp_deepspeed.engine.initialize import resolve_interlocking
from ibp_deepspeed.objectives.cross_entropy import CausalLMLoss
from ibp_deepspeed.single_process.virtual_pipeline import VirtualPipeline
from models.causal_lm import CausalLM
from models.errors import ModelError

DESCRIPTION_FILE = "interlocked_model.json"


def pipeline_module(
    model: CausalLM, interlocking: InterlockingConfig, num_stages: int, manual: Sequence[int] | None = None
) -> InterlockedPipelineModule:
    """This rank's stage of a language model with its head.

    Args:
        model: the cut model.
        interlocking: strategy and options of the heads.
        num_stages: K.
        manual: a partition, see :meth:`CausalLM.partition`; None balances parameters, heads included.
    """
    options = interlocking.aux_head
    bounds = model.partition(num_stages, aux_heads=options, manual=manual)

    def aux_head(stage: int) -> nn.Module:
        assert options is not None
        return model.aux_head(stage, options, after=bounds[stage + 1] + options.borrow - 1)

    return InterlockedPipelineModule(
        model.layer_specs(),
        num_stages=num_stages,
        loss_fn=CausalLMLoss(options.chunk_tokens if options else None),
        aux_head=aux_head if options else None,
        interlocking=interlocking,
        partition_method=bounds,
    )


def virtual_pipeline(
    model: CausalLM,
    config: Mapping[str, Any],
    num_stages: int,
    manual: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    monitor: Any = None,
) -> VirtualPipeline:
    """All stages of a language model on one device, with the weights that processes would start from.

    Args:
        model: the cut model.
        config: DeepSpeed configuration.
        num_stages: K.
        manual: a partition, see :meth:`CausalLM.partition`.
        device: where they go.
        monitor: DeepSpeed's, for the losses.
    """
    options = resolve_interlocking(config).aux_head
    bounds = model.partition(num_stages, aux_heads=options, manual=manual)
    stages = [nn.Sequential(*map(model.build_layer, range(low, high))) for low, high in pairwise(bounds)]
    heads = None
    if options is not None:
        behind = [bound + options.borrow for bound in bounds[1:-1]]
        heads = [model.aux_head(k, options, after=layer - 1) for k, layer in enumerate(behind)]
    loss_fn = CausalLMLoss(options.chunk_tokens if options else None)
    return VirtualPipeline(stages, heads, loss_fn, config, device, monitor)


class Description(BaseModel):
    """What a checkpoint holds, beside DeepSpeed's files: enough to rebuild the model in one process."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: dict[str, Any]
    """The Hugging Face config."""
    bounds: list[int]
    """Stage k has layers bounds[k] … bounds[k+1]-1 of embedding, decoder layers, head."""
    interlocking: dict[str, Any]
    sequence_length: int
    data: str | None = None
    """Folder of the prepared data, with the tokenizer; None: nothing was trained, the weights are ``init_from``'s."""
    source: str | None = None
    """What text that is."""
    init_from: str | None = None
    """Folder or hub name of the weights that the training began with; None: random ones."""
    settings: dict[str, Any] = {}
    """The DeepSpeed configuration, but for the interlocking block."""

    def config(self) -> PretrainedConfig:
        """The Hugging Face config as an object."""
        values = dict(self.model)
        return AutoConfig.for_model(values.pop("model_type"), **values)

    def files(self) -> dict[str, str]:
        """What goes beside a checkpoint's files, by name."""
        return {DESCRIPTION_FILE: json.dumps(self.model_dump(), indent=1) + "\n"}

    @classmethod
    def read(cls, folder: Path) -> Description:
        """Read from a checkpoint's folder.

        Raises:
            ModelError: it is missing or not readable.
        """
        path = folder / DESCRIPTION_FILE
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ModelError(f"{folder} is no checkpoint of train_lm.py: it has no {DESCRIPTION_FILE}.") from None
        except ValueError as error:
            raise ModelError(f"{path} is damaged: {str(error).splitlines()[0]}.") from None
