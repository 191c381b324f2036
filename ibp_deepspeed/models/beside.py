"""What a head has beside its LM head because its objective trains it; no exit needs it."""

from __future__ import annotations

import torch
from torch import nn

from ibp_deepspeed.config.objectives import ObjectiveOptions
from ibp_deepspeed.models.shell import Shell


def beside_of(shell: Shell, objective: ObjectiveOptions) -> nn.Module | None:
    """On meta, for rows of hidden states [n, H]; None: the objective needs nothing."""
    size, dtype = shell.hf_config.hidden_size, shell.readout.weight.dtype
    if objective.name == "predsim":
        with torch.device("meta"):
            return nn.Linear(size, size, bias=False, dtype=dtype)
    return None
