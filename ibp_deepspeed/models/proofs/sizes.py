"""The same config with small sizes: every switch as it was, and widths, counts and windows so small that it is fast."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PretrainedConfig

VOCABULARY, POSITIONS, LENGTH = 64, 32, 12
"""Tokens; the longest sequence; the one that proofs use, longer than any window."""
_HEADS = 4
_HEAD_SIZES = (8, 16, 20, 40)  # the first of which the part that rotates is even
_WINDOW = 4
# Common names of sizes, and those that single architectures have: what they become, at most.
_SIZES = {
    "vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8,
    "max_position_embeddings": POSITIONS, "n_ctx": POSITIONS, "model_max_length": POSITIONS,
    "original_max_position_embeddings": LENGTH - 4,
    "intermediate_size": 48, "ffn_dim": 48, "ffn_hidden_size": 48, "decoder_ffn_dim": 48, "n_inner": 48,
    "intermediate_size_mlp": 48, "dense_intermediate_size": 48, "d_inner": 48, "block_multiple_of": 8,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "shared_intermediate_size": 16,
    "shared_experts_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16,
    "num_experts": 4, "num_local_experts": 4, "moe_num_experts": 4, "n_routed_experts": 4, "zero_expert_num": 2,
    "num_experts_per_tok": 2, "moe_topk": 2, "moe_top_k": 2, "n_group": 2, "topk_group": 1,
    "sliding_window": _WINDOW, "window_size": _WINDOW, "attention_chunk_size": _WINDOW, "local_attention": _WINDOW,
    "keep_window_size": _WINDOW, "floor_scale": _WINDOW, "index_topk": _WINDOW, "attention_window_size": _WINDOW,
    "q_lora_rank": 12, "kv_lora_rank": 12, "o_lora_rank": 12, "router_hidden_size": 16, "adapter_rank": 4,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "qk_head_dim": 16, "v_head_dim": 8, "rotary_dim": 4,
    "index_head_dim": 8, "index_n_heads": 2,
    "linear_num_heads": 2, "linear_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "mamba_d_state": 8, "state_size": 8, "ssm_state_size": 8, "mamba_dt_rank": 4, "time_step_rank": 4,
    "mamba_n_heads": 8, "mamba_num_heads": 8, "num_heads": 8, "mamba_chunk_size": _WINDOW, "chunk_size": _WINDOW,
    "block_size": _WINDOW,
    "mamba_n_groups": 2, "n_groups": 2, "mamba_ngroups": 2,
}  # fmt: skip
_NAMELESS = {
    "_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "id2label", "label2id",
    "quantization_config", "auto_map", "task_specific_params", "problem_type",
}  # fmt: skip
"""What says nothing of how a model computes."""
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")


def small_sizes(config: PretrainedConfig) -> dict[str, Any]:
    """The values of a config with small sizes, and as many layers as it had.

    Dropout is off: what it draws is no question of the cut.
    """
    values = {name: value for name, value in config.to_dict().items() if name not in _NAMELESS}
    common = {own: name for name, own in config.attribute_map.items()}
    by_common_name = {common.get(name, name): value for name, value in values.items()}
    head = _head_size(by_common_name)
    sizes = {**_SIZES, **_attention(by_common_name, head)}
    small = dict(_shrunk(values, common, sizes, head))
    for index, name in enumerate(_TOKENS):
        if values.get(name) is not None:
            small[name] = index
    if "pad_token_id" in values:
        small["pad_token_id"] = 0  # so that what a model does with such a token shows
    return small


def _shrunk(
    values: Mapping[str, Any], common: Mapping[str, str], sizes: Mapping[str, int], head: int
) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        size = sizes.get(common.get(name, name))
        if isinstance(value, dict):
            yield name, dict(_shrunk(value, common, sizes, head))
        elif name in ("short_factor", "long_factor"):
            yield name, value[: head // 2]
        elif "dropout" in str(name) or str(name).endswith("pdrop"):
            yield name, type(value)(0) if isinstance(value, float | int) else value
        elif str(name).endswith(("token_id", "token_index")):
            yield name, min(value, VOCABULARY - 1) if isinstance(value, int) else value
        elif size is None or isinstance(value, bool):
            yield name, value
        elif isinstance(value, list) and value and all(type(entry) is int for entry in value):
            yield name, [min(entry, size) for entry in value]
        else:
            yield name, min(value, size) if isinstance(value, int) and value > 0 else value


def _head_size(values: Mapping[str, Any]) -> int:
    """Of attention heads, so that the rotating part of it is an even number."""
    rope = values.get("rope_parameters") or {}
    each = rope.values() if rope and all(isinstance(part, dict) for part in rope.values()) else [rope]
    parts = [part.get("partial_rotary_factor") for part in each if isinstance(part, dict)]
    parts += [values.get(name) for name in ("partial_rotary_factor", "rotary_pct", "rotary_emb_fraction")]
    factors = [float(part) for part in parts if isinstance(part, float | int)]
    fitting = (size for size in _HEAD_SIZES if all(int(size * f) % 2 == 0 and int(size * f) > 0 for f in factors))
    return next(fitting, _HEAD_SIZES[0])


def _attention(values: Mapping[str, Any], head: int) -> dict[str, int]:
    """Widths that have to fit each other; heads that fill the hidden size, or not, still do, or don't."""
    hidden, heads, keys = (values.get(n) for n in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    own_head = values.get("head_dim")
    fills = not isinstance(own_head, int) or not isinstance(heads, int) or own_head * heads == hidden
    few = 2 if isinstance(keys, int) and isinstance(heads, int) and 1 < keys < heads else _HEADS
    width = (min(heads, _HEADS) if isinstance(heads, int) else _HEADS) * head
    return {
        "hidden_size": width,
        **dict.fromkeys(("num_attention_heads", "decoder_attention_heads", "encoder_attention_heads"), _HEADS),
        **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "kv_n_heads"), few),
        "head_dim": head if fills or own_head == values.get("qk_rope_head_dim") else 2 * head,
        "word_embed_proj_dim": width if values.get("word_embed_proj_dim", hidden) == hidden else width // 2,
        **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), width // 4),
        **dict.fromkeys(("mamba_d_ssm", "attention_hidden_size"), 2 * width),
        "lru_width": width,
    }
