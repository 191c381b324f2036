"""Heads with a copy of the model's readout, and with blocks of the model's own kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ibp_deepspeed.checkpoint import layout
from ibp_deepspeed.config.interlocking import AuxHeadConfig
from ibp_deepspeed.models import CausalLM
from ibp_deepspeed.models.exits.exits import Exits
from ibp_deepspeed.models.layers import FollowingHead, HeadLayer
from ibp_deepspeed.models.runs.description import Description
from ibp_deepspeed.objectives.cross_entropy import CausalLMLoss, LazyLogits
from tests.models.test_causal_lm import SEQUENCE, VOCAB, perturbed, shifted, tiny, tokens

SHARED = AuxHeadConfig(readout="shared")
WITH_BLOCKS = AuxHeadConfig(readout="shared", blocks=2)
KINDS = ("gpt2", "llama", "gemma2", "opt", "cohere")  # plain twice, soft cap, projection, logit scale


def make(model_type: str, options: AuxHeadConfig = SHARED) -> tuple[FollowingHead, HeadLayer]:
    """A head that follows the model's last layer, whose weights are not its initial ones."""
    model = CausalLM(tiny(model_type))
    head, last = model.aux_head(0, options, after=1), model.build_layer(model.num_layers - 1)
    assert isinstance(head, FollowingHead) and isinstance(last, HeadLayer)
    perturbed([last])
    with torch.no_grad():
        for copied, original in zip(head.readout_tensors(), last.readout_tensors(), strict=True):
            copied.copy_(original)
    head.norm.load_state_dict(last.norm.state_dict())
    return head.eval(), last.eval()


def hidden_states() -> Tensor:
    return torch.randn(2, SEQUENCE, 32, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("model_type", KINDS)
def test_a_following_head_reads_out_as_the_model_does(model_type: str) -> None:
    head, last = make(model_type)
    with torch.no_grad():
        want = last(hidden_states()).materialize()
        assert want.shape == (2, SEQUENCE, VOCAB)
        assert torch.equal(head(hidden_states()).materialize(), want)
        head.temperature.fill_(2.0)
        halved = last.readout(inputs_embeds=projected(last, last.norm(hidden_states()) / 2)).logits
        torch.testing.assert_close(head(hidden_states()).materialize(), halved)


def projected(last: HeadLayer, normed: Tensor) -> Tensor:
    return normed if last.projection is None else last.projection(normed)


@pytest.mark.parametrize("model_type", KINDS)
def test_what_of_a_following_head_is_trained(model_type: str) -> None:
    """Norm, temperature and blocks are, the copied tensors are not, and gradients go through them."""
    head, _ = make(model_type, WITH_BLOCKS)
    copies = {id(tensor) for tensor in head.readout_tensors()}
    hidden = hidden_states().requires_grad_()
    logits = head(hidden)
    assert isinstance(logits, LazyLogits) and logits.parameters == ()
    CausalLMLoss(chunk_tokens=5)(logits, shifted(tokens())).backward()
    assert hidden.grad is not None and hidden.grad.any()
    for name, parameter in head.named_parameters():
        assert parameter.requires_grad == (id(parameter) not in copies), name
        assert (parameter.grad is None) == (id(parameter) in copies), name
    assert head.temperature.grad is not None and head.temperature.grad.any()


@pytest.mark.parametrize("model_type", KINDS)
def test_blocks_change_the_logits_and_are_the_models_own(model_type: str) -> None:
    (plain, _), (deep, _) = make(model_type), make(model_type, WITH_BLOCKS)
    layer = CausalLM(tiny(model_type)).build_layer(2)
    with torch.no_grad():
        assert not torch.allclose(plain(hidden_states()).materialize(), deep(hidden_states()).materialize())
        deep.blocks[0].load_state_dict(layer.state_dict())
        deep.blocks = nn.Sequential(deep.blocks[0])
        want = plain(layer.eval()(hidden_states())).materialize()
        torch.testing.assert_close(deep(hidden_states()).materialize(), want)


@pytest.mark.parametrize("model_type", KINDS)
def test_state_dict_round_trip(model_type: str, tmp_path: Path) -> None:
    """The copied LM head and the temperature are in the state of a head."""
    head, _ = make(model_type, WITH_BLOCKS)
    perturbed([head])
    torch.save(head.state_dict(), tmp_path / "head.pt")
    other = CausalLM(tiny(model_type), seed=9).aux_head(0, WITH_BLOCKS, after=1).eval()
    other.load_state_dict(torch.load(tmp_path / "head.pt"))
    with torch.no_grad():
        assert torch.equal(other(hidden_states()).materialize(), head(hidden_states()).materialize())
    model = CausalLM(tiny(model_type))
    assert model.aux_head_parameters(WITH_BLOCKS) == sum(p.numel() for p in head.parameters())


def test_a_head_starts_with_the_readout_of_its_model() -> None:
    for config in (tiny("llama"), tiny("gpt2", tie_word_embeddings=True)):
        model = CausalLM(config, seed=4)
        head, last = model.aux_head(1, SHARED), model.build_layer(4)
        assert isinstance(head, FollowingHead) and isinstance(last, HeadLayer)
        assert all(map(torch.equal, head.readout_tensors(), last.readout_tensors()))
        assert head.temperature.item() == 1


@pytest.mark.parametrize("borrow", [0, 1])
def test_exits_of_a_checkpoint_with_shared_readout_and_blocks(tmp_path: Path, borrow: int) -> None:
    """Files as the engine writes them: two stages, the first one's head with two blocks, behind a borrowed layer."""
    config = tiny("llama")
    options = WITH_BLOCKS.model_copy(update={"borrow": borrow})
    model, bounds, cut = CausalLM(config), [0, 3 - borrow, 5], 3
    layers = perturbed([model.build_layer(i).eval() for i in range(model.num_layers)])
    head = perturbed([model.aux_head(0, WITH_BLOCKS, after=2).eval()])[0]
    for index, layer in enumerate(layers):
        torch.save(layer.state_dict(), tmp_path / f"layer_{index:02d}-model_00-model_states.pt")
    torch.save(head.state_dict(), tmp_path / layout.aux_head(cut))
    description = Description(
        model=config.to_dict(),
        bounds=bounds,
        interlocking={"aux_head": options.model_dump(exclude_unset=True)},
        sequence_length=SEQUENCE,
        data="nowhere",
    )
    (tmp_path / layout.DESCRIPTION).write_text(json.dumps(description.model_dump()))
    with torch.no_grad():
        first = nn.Sequential(*layers[:3])(tokens())
        outputs = head(first), nn.Sequential(*layers[3:])(first)
        want = [CausalLMLoss()(output, shifted(tokens())).item() for output in outputs]
    losses = Exits(tmp_path).eval_batch(iter([(tokens(), shifted(tokens()), tokens())]), 1)
    assert losses.tolist() == pytest.approx(want, rel=1e-6)
