"""Write the table of what needs no proof at first use: transformers' causal model types, in the kinds that people have.

python -m ibp_deepspeed.models.proofs.table
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ibp_deepspeed import cli
from ibp_deepspeed.atomic_files import replace_text
from ibp_deepspeed.models.config import CONFIGS, load_config
from ibp_deepspeed.models.errors import ModelError
from ibp_deepspeed.models.proofs.first_use import TABLE, code_digest, proving
from ibp_deepspeed.models.proofs.kind import kind_of
from ibp_deepspeed.models.proofs.proof import Proof, prove

TYPES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
"""All causal model types of the transformers that is installed."""
_COMPLETED: dict[str, dict[str, Any]] = {
    "dbrx": {"attn_config": {"rope_theta": 5e5, "clip_qkv": 8.0, "kv_n_heads": 8}},
    "deepseek_v2": {"num_experts_per_tok": 6, "topk_group": 3, "n_group": 8},
    "dots1": {
        "num_experts_per_tok": 6, "n_routed_experts": 128, "n_shared_experts": 2, "n_group": 1, "topk_group": 1,
        "first_k_dense_replace": 1, "num_key_value_heads": 32,
    },
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
}  # fmt: skip
"""Types whose default config makes no model → what those of released models have in its place."""
_COMMON = (
    "cohere2", "deepseek_v3", "gemma", "gemma2", "gemma3_text", "glm4", "gpt2", "gpt_neox", "gpt_oss", "granite",
    "llama", "mistral", "mixtral", "olmo2", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "starcoder2",
)  # fmt: skip
"""Types of which released models have other switches than the default: they are proved with these too."""
_LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
_LINEAR = {"rope_type": "linear", "factor": 4.0}


def default_config(model_type: str) -> PretrainedConfig:
    """The config of a type's models where nothing else is said."""
    return AutoConfig.for_model(model_type, **_COMPLETED.get(model_type, {}))


def configs(model_type: str) -> Iterator[PretrainedConfig]:
    """Configs of a type, one for each kind that the table has."""
    yield from _once(_configs(model_type))


def _once(found: Iterator[PretrainedConfig]) -> Iterator[PretrainedConfig]:
    seen = set()
    for config in found:
        if (kind := _kind(config)) not in seen:
            seen.add(kind)
            yield config


def _configs(model_type: str) -> Iterator[PretrainedConfig]:
    given = _COMPLETED.get(model_type, {})
    try:
        base = default_config(model_type)
    except Exception:  # see below
        return
    variants: list[dict[str, Any]] = [{}]
    if model_type in _COMMON:
        variants += list(_variants(base))
    for values in variants:
        for tied in (False, True):
            with suppress(Exception):  # classes refuse what their models can't have with any kind of error
                yield AutoConfig.for_model(model_type, **{**given, **values, "tie_word_embeddings": tied})
    for path in sorted(CONFIGS.glob("*.json")):
        config = load_config(path)
        if config.model_type == model_type:
            yield config
            yield type(config).from_dict({**config.to_dict(), "tie_word_embeddings": not config.tie_word_embeddings})


def _variants(base: PretrainedConfig) -> Iterator[dict[str, Any]]:
    rope = getattr(base, "rope_parameters", None)
    if isinstance(rope, dict) and rope.get("rope_type") == "default":
        for kind in (_LLAMA3, _YARN, _LINEAR):
            yield {"rope_parameters": {**rope, **kind}}
    if hasattr(base, "sliding_window") and not getattr(base, "layer_types", None):
        yield {"sliding_window": None if base.sliding_window else 4096}
    if getattr(base, "num_key_value_heads", None) is not None:
        heads = base.num_attention_heads
        yield {"num_key_value_heads": heads if base.num_key_value_heads != heads else heads // 4}
    if getattr(base, "head_dim", None) is not None:
        yield {"head_dim": 2 * base.head_dim}


def _kind(config: PretrainedConfig) -> str:
    """Empty for a config that is of no whole model: the proof then says why."""
    try:
        return kind_of(config)
    except ModelError:
        return ""


def proved(model_type: str) -> dict[str, Proof]:
    """Kind → proof of each config of a type."""
    with proving():
        return {_kind(config): prove(config) for config in configs(model_type)}


def main() -> None:
    """Prove and write."""
    cli.quiet()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    types: dict[str, dict[str, dict[str, float]]] = {}
    refused: dict[str, str] = {}
    for model_type in tqdm(TYPES, desc="types"):
        proofs = proved(model_type)
        kinds = {kind: proof.differences for kind, proof in proofs.items() if proof.refusal is None}
        if kinds:
            types[model_type] = kinds
        else:
            reasons = [str(proof.refusal) for proof in proofs.values()]
            refused[model_type] = next(iter(reasons), "its default config is one that its own class refuses")
    versions = {"transformers": transformers.__version__, "torch": torch.__version__, "code": code_digest()}
    replace_text(TABLE, as_text(versions, types, refused))
    print(f"{TABLE}: {len(types)} of {len(TYPES)} causal model types, {sum(map(len, types.values()))} kinds of configs")


def as_text(versions: dict[str, str], types: dict[str, dict[str, dict[str, float]]], refused: dict[str, str]) -> str:
    """JSON with a line for each kind."""
    lines = [
        f'  "{name}": {{\n'
        + ",\n".join(
            f'   "{kind}": {json.dumps({check: float(f"{value:.0e}") for check, value in found.items()})}'
            for kind, found in kinds.items()
        )
        + "\n  }"
        for name, kinds in types.items()
    ]
    head = "".join(f' "{name}": {json.dumps(value)},\n' for name, value in versions.items())
    reasons = ",\n".join(f'  "{name}": {json.dumps(reason)}' for name, reason in refused.items())
    return f'{{\n{head} "types": {{\n' + ",\n".join(lines) + f'\n }},\n "refused": {{\n{reasons}\n }}\n}}\n'


if __name__ == "__main__":
    main()
