"""What a profile is of: model, micro-batch, dtype, head."""

from __future__ import annotations

import json
from typing import Any, Literal

from ibp_deepspeed.config.interlocking import AuxHeadConfig
from ibp_deepspeed.models.causal_lm import CausalLM
from ibp_deepspeed.planner.profile import DType, Subject, head_options

_TIMELESS = (
    "_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype", "initializer_range", "id2label",
    "label2id", "bos_token_id", "eos_token_id", "pad_token_id", "task_specific_params", "tie_word_embeddings",
)  # fmt: skip
"""Values of a config that no layer's time depends on; LM heads are never tied here."""


def config_values(model: CausalLM) -> dict[str, Any]:
    """What of a model's config its layers' times may depend on, as JSON gives it back."""
    values = {name: value for name, value in model.hf_config.to_dict().items() if name not in _TIMELESS}
    plain: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return plain


def subject_of(
    model: CausalLM,
    options: AuxHeadConfig | None,
    *,
    dtype: DType,
    sequence_length: int,
    samples: int,
    compiled: bool | Literal["either"],
) -> Subject:
    """Of a model, its auxiliary heads (None: there are none) and a micro-batch."""
    return Subject(
        config=config_values(model),
        dtype=dtype,
        sequence_length=sequence_length,
        samples=samples,
        head={} if options is None else head_options(options),
        compiled=None if compiled == "either" else compiled,
    )
