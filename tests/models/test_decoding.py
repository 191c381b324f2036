"""Decoding with a draft gives greedy decoding's tokens, and its counts are those of what happened."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ibp_deepspeed.models import ModelError
from ibp_deepspeed.models.exits.decoding import Decoded, assisted, greedy
from ibp_deepspeed.models.exits.exits import Exits
from tests.models.test_causal_lm import tokens
from tests.models.test_export import checkpoint

OPTIONS = {"max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": None}


def prompt(length: int = 5) -> dict[str, Tensor]:
    ids = tokens(1, length)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def both(folder: Path, model_type: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    checkpoint(folder, model_type)
    exits = Exits(folder)
    return exits.to_hugging_face(), exits.to_hugging_face(1)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2"])
def test_a_draft_changes_no_token(model_type: str, tmp_path: Path) -> None:
    model, draft = both(tmp_path / "run", model_type)
    plain = greedy(model, prompt(), **OPTIONS)
    found = assisted(model, draft, prompt(), **OPTIONS)
    assert plain.passes == len(plain.tokens) == 12 and plain.drafted == 0
    assert found.difference(plain) is None and found.tokens.tolist() == plain.tokens.tolist()
    assert found.accepted + found.passes == 12 and found.accepted <= found.drafted


def test_all_that_a_model_drafts_for_itself_is_accepted(tmp_path: Path) -> None:
    """Three tokens a draft and one of the check are four: eight in two passes."""
    model, _ = both(tmp_path / "run", "llama")
    draft = Exits(tmp_path / "run").to_hugging_face()
    assert draft.generation_config is not None
    draft.generation_config.update(num_assistant_tokens=3, assistant_confidence_threshold=0.0)
    found = assisted(model, draft, prompt(), **{**OPTIONS, "max_new_tokens": 8})
    assert (found.passes, found.drafted, found.accepted) == (2, 6, 6)


def test_a_draft_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    model, draft = both(tmp_path / "run", "llama")
    draft.config.vocab_size = 50
    with pytest.raises(ModelError, match="the draft has 50 tokens, the model 97: a draft needs the model's vocabulary"):
        assisted(model, draft, prompt())


def test_where_two_continuations_part() -> None:
    def of(*ids: int) -> Decoded:
        return Decoded(torch.tensor(ids), 1, 0, 0, 1.0)

    assert of(1, 2, 3).difference(of(1, 2, 3)) is None
    assert of(1, 2, 3).difference(of(1, 5, 3)) == 1
    assert of(1, 2).difference(of(1, 2, 3)) == 2
