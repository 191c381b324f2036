"""A model that drafts with its own first layers gives greedy decoding's tokens; layers are read once for each token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import JambaConfig, JambaForCausalLM, PreTrainedModel

from ibp_deepspeed.models import ModelError
from ibp_deepspeed.models.exits import self_speculation
from ibp_deepspeed.models.exits.decoding import greedy
from ibp_deepspeed.models.exits.exits import Exits
from ibp_deepspeed.models.exits.self_speculation import SelfSpeculation
from tests.models.test_decoding import OPTIONS, prompt
from tests.models.test_export import checkpoint

TOKENS = 20


@torch.no_grad()
def decoding(folder: Path, model_type: str, **head: Any) -> tuple[PreTrainedModel, SelfSpeculation]:
    """A model that says many things, of which its exit guesses some."""
    checkpoint(folder, model_type, **head)
    exits = Exits(folder)
    model, draft = exits.to_hugging_face().eval(), exits.to_hugging_face(1).eval()
    for one in (model, draft):
        for name, parameter in one.named_parameters():
            if parameter.dim() > 1 and "embed" not in name and "wte" not in name:
                parameter.mul_(3)
    readout = model.get_output_embeddings().weight
    noise = torch.randn(readout.shape, generator=torch.Generator().manual_seed(0))
    draft.get_output_embeddings().weight.copy_(readout + 0.2 * readout.std() * noise)
    return model, SelfSpeculation(model, draft, exits.shared_layers(1))


@pytest.mark.parametrize("sure", [0.0, 0.05, 1.1])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2", "opt", "mixtral"])
def test_a_models_own_draft_changes_no_token(
    model_type: str, sure: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All tokens are sure, some, or none; windows of attention shorter than the text; learned positions."""
    monkeypatch.setattr(self_speculation, "SURE", sure)
    model, drafting = decoding(tmp_path / "run", model_type)
    wanted = greedy(model, prompt(), **{**OPTIONS, "max_new_tokens": TOKENS})
    found, plain = drafting.decode(prompt(), TOKENS), drafting.plain(prompt(), TOKENS)
    assert found.difference(wanted) is None and plain.difference(wanted) is None
    assert len(set(wanted.tokens.tolist())) > 2, "one token again and again shows little"
    assert found.accepted + found.passes == TOKENS and found.accepted <= found.drafted
    assert found.drafted > 0 if sure == 0 else sure < 1 or found.drafted == 0
    assert plain.passes == TOKENS and plain.drafted == 0


def test_blocks_of_the_exits_head_have_their_own_keys_and_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_speculation, "SURE", 0.0)
    model, drafting = decoding(tmp_path / "run", "llama", blocks=1)
    assert len(drafting.draft.model.layers) == 3 and drafting.shared == 2
    wanted = greedy(model, prompt(), **{**OPTIONS, "max_new_tokens": TOKENS})
    found = drafting.decode(prompt(), TOKENS)
    assert found.difference(wanted) is None and found.drafted > found.accepted > 0, found


def test_a_layer_reads_each_kept_token_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shared layers, which are the draft's too, and refused tokens besides; the others each drafted one once."""
    monkeypatch.setattr(self_speculation, "SURE", 0.0)
    model, drafting = decoding(tmp_path / "run", "llama")
    read: dict[int, int] = {}
    for index, layer in enumerate(model.model.layers):
        counted(layer, index, read)
    found = drafting.decode(prompt(), TOKENS)
    once = 5 + found.passes - 1 + found.drafted  # the prompt, the model's own tokens but the last, drafts
    assert read == {0: once, 1: once, 2: once} and found.accepted < found.drafted


def counted(layer: nn.Module, index: int, read: dict[int, int]) -> None:
    def note(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        read[index] = read.get(index, 0) + hidden.shape[1]

    layer.register_forward_pre_hook(note, with_kwargs=True)


def test_text_ends_at_a_token_that_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in the middle of what a check accepts."""
    monkeypatch.setattr(self_speculation, "SURE", 0.0)
    _, drafting = decoding(tmp_path / "run", "gpt2")
    whole = drafting.plain(prompt(), TOKENS).tokens.tolist()
    for end in set(whole):
        first = whole[: whole.index(end) + 1]
        for decode in (drafting.decode, drafting.plain):
            assert decode(prompt(), TOKENS, frozenset([end])).tokens.tolist() == first


def test_what_can_not_draft_is_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path / "run", "llama")
    model = Exits(tmp_path / "run").to_hugging_face()
    with pytest.raises(ModelError, match=r"an exit of 3 of 3 decoder layers can't draft: give a smaller exit\."):
        SelfSpeculation(model, model, 3)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    recurrent = JambaForCausalLM(JambaConfig(**sizes, vocab_size=97, use_mamba_kernels=False, intermediate_size=32))
    with pytest.raises(ModelError, match=r"'jamba' keeps more than keys and values \(LinearAttentionLayer\)"):
        SelfSpeculation(recurrent, recurrent, 1)
