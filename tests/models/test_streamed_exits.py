"""Models larger than memory: the same losses, predictions and exports, with one layer at a time."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ibp_deepspeed.commands.inference import offloading
from ibp_deepspeed.commands.inference.loading import from_folder
from ibp_deepspeed.errors import InterlockingError
from ibp_deepspeed.models.errors import ModelError
from ibp_deepspeed.models.exits.exits import Exits
from ibp_deepspeed.models.exits.memory import Memory
from ibp_deepspeed.models.exits.passage import Passage
from ibp_deepspeed.models.exits.predictions import WatchedExits
from ibp_deepspeed.models.hf.save import write
from tests.models.test_causal_lm import shifted, tokens
from tests.models.test_export import checkpoint, logits

SMALL = 3e-5
"""GiB, 32 kB: less than twice any of the models here; a quarter holds several micro-batches."""


def micro_batches(count: int = 5) -> Iterator[tuple[torch.Tensor, ...]]:
    """With two documents in every row, which are apart."""
    for shift in range(count):
        ids = tokens().roll(shift, 1)
        length = ids.shape[1]
        positions = torch.cat([torch.arange(5), torch.arange(length - 5)]).expand_as(ids)
        labels = shifted(ids)
        labels[0, :shift] = -100
        yield ids, labels, torch.arange(len(ids)), positions


class Alive:
    """Counts layers and heads that are built, and the largest number of each that was alive at once."""

    def __init__(self, exits: Exits, monkeypatch: pytest.MonkeyPatch) -> None:
        self.most = {"layer": 0, "head": 0}
        self.built = 0
        self._alive: dict[str, weakref.WeakSet[nn.Module]] = {kind: weakref.WeakSet() for kind in self.most}
        build, with_head = exits.model.build_layer, exits._with_head

        def layer(index: int) -> nn.Module:
            self._count("layer", made := build(index))
            return made

        def head(*given: Any) -> Any:
            made = with_head(*given)
            self._count("head", made.module)
            return made

        monkeypatch.setattr(exits.model, "build_layer", layer)
        monkeypatch.setattr(exits, "_with_head", head)

    def _count(self, kind: str, module: nn.Module) -> None:
        self.built += 1
        self._alive[kind].add(module)
        self.most[kind] = max(self.most[kind], len(self._alive[kind]))


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2", "mixtral"])
def test_losses_and_predictions_are_those_of_the_whole_model(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With documents that are apart, and one layer and one head alive at a time."""
    checkpoint(tmp_path / "run", model_type, blocks=1)
    held, streamed = Exits(tmp_path / "run"), Exits(tmp_path / "run", memory_gib=SMALL)
    assert not held.is_streamed and streamed.is_streamed
    alive = Alive(streamed, monkeypatch)
    groups = len(list(streamed._groups(Passage.of(one, torch.device("cpu")) for one in micro_batches())))
    assert 1 < groups < 5, "the test is of groups with several micro-batches"
    of_held, of_streamed = WatchedExits(held), WatchedExits(streamed)
    want, got = of_held.eval_batch(micro_batches(), 5), of_streamed.eval_batch(micro_batches(), 5)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    one, other = of_held.predictions(), of_streamed.predictions()
    assert one.exits == other.exits and one.trunk_layers == other.trunk_layers == [2, 3]
    for name in ("tokens", "confidences", "losses", "labels"):
        torch.testing.assert_close(getattr(other, name), getattr(one, name))
    assert alive.most == {"layer": 1, "head": 1} and alive.built == 6 * groups
    documents_matter = held.eval_batch((one[:3] for one in micro_batches()), 5)
    assert not torch.allclose(documents_matter, want, rtol=1e-4)


def test_layers_are_in_the_checkpoints_dtype_and_losses_in_fp32(tmp_path: Path) -> None:
    """As the training's own evaluation: layers, heads and what goes between them in 16 bits."""
    layers, head = checkpoint(tmp_path / "run", "llama", torch.bfloat16)
    ids = tokens()
    for gib in (None, SMALL):
        exits = Exits(tmp_path / "run", memory_gib=gib)
        assert exits.dtype == torch.bfloat16
        assert {p.dtype for p in [*exits.layer(1).parameters(), *exits.objective(1).module.parameters()]} == {
            torch.bfloat16
        }
        with torch.no_grad():
            hidden = ids
            for layer in layers[:3]:
                hidden = layer(hidden)
            want = nn.functional.cross_entropy(head(hidden).materialize().float().flatten(0, 1), shifted(ids).flatten())
        got = exits.eval_batch(iter([(ids, shifted(ids), torch.arange(2))]), 1)
        assert got[0].item() == pytest.approx(want.item(), rel=1e-6)
    wide = exits.in_full_precision()
    assert wide.dtype == torch.float32 and wide.is_streamed and wide.in_full_precision() is wide


def test_memory_is_what_is_free_or_what_is_said() -> None:
    assert Memory.of(torch.device("cpu")).bytes > 2**20
    assert Memory(100).holds(50) and not Memory(100).holds(51)
    with pytest.raises(ModelError, match="--memory-gib is 0: give more than 0"):
        Memory.of(torch.device("cpu"), 0.0)
    with pytest.raises(ModelError, match="--memory-gib is nan"):
        Memory.of(torch.device("cpu"), float("nan"))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for path in folder.glob("*.safetensors") for key, tensor in load_file(path).items()}


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "gpt_neox", "phi3", "mixtral", "qwen2_moe", "gpt_oss"])
def test_an_export_layer_by_layer_is_the_one_at_once(model_type: str, tmp_path: Path) -> None:
    """The same files but for where one ends and the next begins: names, values, configs; and it loads."""
    checkpoint(tmp_path / "run", model_type, readout="shared")
    for exit_ in (1, 2):
        at_once, streamed = tmp_path / f"at-once-{exit_}", tmp_path / f"streamed-{exit_}"
        exits = Exits(tmp_path / "run", memory_gib=SMALL)
        assert write(exits, streamed, exit_) == write(Exits(tmp_path / "run"), at_once, exit_)
        want, got = tensors(at_once), tensors(streamed)
        assert want.keys() == got.keys()
        assert all(torch.equal(want[key], got[key]) and want[key].dtype == got[key].dtype for key in want)
        files = sorted(path.name for path in streamed.iterdir() if "safetensors" not in path.name)
        assert files == sorted(path.name for path in at_once.iterdir() if "safetensors" not in path.name)
        for file in files:
            assert (at_once / file).read_text() == (streamed / file).read_text(), file
        index = json.loads((streamed / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == want.keys()
        assert torch.equal(logits(at_once), logits(streamed))


def test_what_stops_a_streamed_export_leaves_nothing(tmp_path: Path) -> None:
    layers, _ = checkpoint(tmp_path / "run", "gpt2", values={"scale_attn_by_inverse_layer_idx": True}, blocks=2)
    with pytest.raises(ModelError, match="exit 1 can't be written as a gpt2 model: the architecture has no place for"):
        write(Exits(tmp_path / "run", memory_gib=SMALL), tmp_path / "first", 1)
    with torch.no_grad():
        next(layers[2].parameters()).view(-1)[0] = torch.nan
    torch.save(layers[2].state_dict(), tmp_path / "run" / "layer_02-model_states.pt")
    with pytest.raises(ModelError, match=r"not finite, transformer\.h\.1\.\S+ is the first: export"):
        write(Exits(tmp_path / "run", memory_gib=SMALL), tmp_path / "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_generation_from_an_export_that_does_not_fit(model_type: str, tmp_path: Path) -> None:
    """Greedy text with layers left in the files is that of the whole; a checkpoint or a draft says the way out."""
    checkpoint(tmp_path / "run", model_type)
    write(Exits(tmp_path / "run"), tmp_path / "hf")
    texts = []
    for gib in (None, 1e-4):
        model = from_folder(str(tmp_path / "hf"), **offloading.options(tmp_path / "hf", "cpu", gib)).eval()
        assert offloading.is_offloaded(model) == (gib is not None)
        texts.append(model.generate(tokens(), max_new_tokens=5, do_sample=False))
    assert "disk" in model.hf_device_map.values()
    assert torch.equal(*texts)
    with pytest.raises(InterlockingError, match="a draft needs a model in memory"):
        offloading.check_draft(model)
    with pytest.raises(InterlockingError, match=r"takes more than half of .* GiB .*: write it with scripts/convert_hf"):
        offloading.check_held(Exits(tmp_path / "run", memory_gib=SMALL))
    offloading.check_held(Exits(tmp_path / "run"))
