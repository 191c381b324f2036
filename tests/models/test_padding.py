"""Rows padded on the right need no mask: at every token of a row it is what Hugging Face computes with one."""

from __future__ import annotations

import pytest
import torch

from ibp_deepspeed.models import CausalLM
from ibp_deepspeed.objectives.cross_entropy import CausalLMLoss
from tests.models.test_causal_lm import SEQUENCE, WINDOW, build, perturbed, run, shifted, tiny, tokens, whole

LENGTHS = [SEQUENCE, 9, 5, 2]


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "mistral", "gemma3_text", "mixtral"])
def test_padded_rows_need_no_mask_and_no_position_ids(model_type: str) -> None:
    mixed = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    config = tiny(model_type, **(mixed if model_type == "gemma3_text" else {}))
    assert getattr(config, "sliding_window", None) in (None, WINDOW) and WINDOW < SEQUENCE
    layers = perturbed(build(CausalLM(config)))
    input_ids, mask = tokens(len(LENGTHS)), torch.zeros(len(LENGTHS), SEQUENCE, dtype=torch.int64)
    for row, length in enumerate(LENGTHS):
        mask[row, :length] = 1
    input_ids[mask == 0] = config.eos_token_id
    real = mask.bool()
    labels = shifted(input_ids.where(real, -100))
    labels[0, :4] = -100  # a prompt
    full = whole(config, layers)
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        mine = run(layers, input_ids)
        logits = mine.materialize()
        loss = CausalLMLoss(chunk_tokens=7)(mine, labels)
        want = full(
            input_ids=input_ids, attention_mask=mask, position_ids=position_ids, use_cache=False,
            labels=labels, shift_labels=labels,
        )  # fmt: skip
    assert want.logits.std() > 1e-3
    assert (logits - want.logits)[real].abs().max() <= 1e-6
    torch.testing.assert_close(loss, want.loss, rtol=1e-6, atol=0)
