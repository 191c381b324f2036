"""What is compared between a small model, cut and uncut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ibp_deepspeed.checkpoint import layout
from ibp_deepspeed.documents import Documents, reading
from ibp_deepspeed.models.causal_lm import CausalLM
from ibp_deepspeed.models.errors import ModelError
from ibp_deepspeed.models.exits.exits import Exits
from ibp_deepspeed.models.hf.assemble import model_key
from ibp_deepspeed.models.hf.save import write
from ibp_deepspeed.models.hf.weights import PretrainedWeights
from ibp_deepspeed.models.proofs.sizes import LENGTH
from ibp_deepspeed.models.runs.description import Description
from ibp_deepspeed.objectives.cross_entropy import CausalLMLoss, LazyLogits

_SEEN = 1e-3  # less than what another token changes, or else a comparison would show nothing
_LEAST = 1e-3  # of the largest gradient's norm: smaller ones are rounding errors' own
_LENGTHS = (LENGTH, 9, 5, 2)  # of padded rows


class Pair:
    """A small model, uncut and cut, with the same weights: written to a folder, and read from it layer by layer.

    Attributes:
        uncut, cut, layers: the model, how it is cut, and its pipeline layers.
        bounds: of two stages, or of one if there is but one decoder layer.
        ids: tokens [B, S].
    """

    def __init__(self, config: PretrainedConfig, folder: Path) -> None:
        torch.manual_seed(3)
        self.uncut: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _perturb(self.uncut)
        self._folder, hub = folder, folder / "hub"
        self.uncut.eval().save_pretrained(hub, max_shard_size="30KB")
        weights = PretrainedWeights(hub, config)
        weights.check()
        self.cut = CausalLM(config, weights=weights)
        self.layers = [self.cut.build_layer(index).eval() for index in range(self.cut.num_layers)]
        depth = self.cut.num_layers
        self.bounds = [0, max(2, depth // 2), depth] if depth > 3 else [0, depth]
        self._head = self.cut.aux_head(0, after=self.bounds[1] - 1).eval()
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(self.cut.vocab_size, (len(_LENGTHS), LENGTH), generator=generator)

    def cut_logits(self, ids: Tensor) -> LazyLogits:
        hidden: Any = ids
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden

    @torch.no_grad()
    def logits(self) -> float:
        got, want = self.cut_logits(self.ids).materialize(), self._uncut_logits(self.ids)
        return _difference(got, want)

    @torch.no_grad()
    def causality(self) -> float:
        """How much the logits of earlier tokens change with the last one."""
        other = self.ids.clone()
        other[:, -1] = (other[:, -1] + 1) % self.cut.vocab_size
        before, after = self.cut_logits(self.ids).materialize(), self.cut_logits(other).materialize()
        if not (before - after)[:, -1].abs().max() > _SEEN * before.abs().max():
            raise ModelError("its logits do not depend on the token that they follow")
        return _difference(after[:, :-1], before[:, :-1])

    def gradients(self) -> float:
        """The largest difference of a parameter's gradient in training, of the gradient's norm."""
        for module in (self.uncut, *self.layers):
            module.train()
        labels = self.ids.roll(-1, dims=1)
        labels[:, -1] = -100
        torch.manual_seed(1)
        CausalLMLoss(chunk_tokens=5)(self.cut_logits(self.ids), labels).backward()
        torch.manual_seed(1)
        want = self._uncut_logits(self.ids)
        nn.functional.cross_entropy(want.flatten(0, 1), labels.flatten()).backward()
        for module in (self.uncut, *self.layers):
            module.eval()
        return self._gradient_difference()

    def _gradient_difference(self) -> float:
        shell, ours, embedding = self.cut._shell, dict[str, Tensor](), self.uncut.get_input_embeddings().weight
        parameters = dict(self.uncut.named_parameters())
        for index, layer in enumerate(self.layers):
            for name, parameter in layer.named_parameters():
                key = model_key(shell, index, name)
                if shell.was_tied and key == f"{shell.readout_name}.weight":
                    key = next(name for name, whole in parameters.items() if whole is embedding)
                gradient = _gradient(parameter)
                ours[key] = ours[key] + gradient if key in ours else gradient
        theirs = {name: _gradient(parameter) for name, parameter in parameters.items()}
        if ours.keys() != theirs.keys():
            raise ModelError(f"the cut model has other parameters: {sorted(ours.keys() ^ theirs.keys())}")
        least = _LEAST * max(gradient.norm().item() for gradient in theirs.values())
        return max(((ours[name] - want).norm() / want.norm().clamp(min=least)).item() for name, want in theirs.items())

    @torch.no_grad()
    def padding(self) -> float:
        """How much logits of real tokens differ where rows end in padding, which only the uncut model is told."""
        mask = torch.zeros_like(self.ids)
        for row, length in enumerate(_LENGTHS):
            mask[row, :length] = 1
        ids = self.ids.masked_fill(mask == 0, 2)
        want = self._uncut_logits(ids, attention_mask=mask)
        return _difference(self.cut_logits(ids).materialize()[mask.bool()], want[mask.bool()])

    @torch.no_grad()
    def documents(self) -> float:
        """How much logits differ between rows of two documents and each of these alone, uncut."""
        ends = torch.tensor([7, 5, 1, 9])
        counted = torch.arange(LENGTH).expand_as(self.ids)
        positions = torch.where(counted < ends[:, None], counted, counted - ends[:, None])
        with reading(Documents.of(positions, self.ids.device)):
            got = self.cut_logits(self.ids).materialize()
        alone = [
            torch.cat([self._uncut_logits(row[None, :end]), self._uncut_logits(row[None, end:])], dim=1)
            for row, end in zip(self.ids, ends.tolist(), strict=True)
        ]
        return _difference(got, torch.cat(alone))

    @torch.no_grad()
    def export(self, folder: Path, exit_: int) -> float:
        """How much the logits differ of an exit, from 1 on, that is exported to a folder and loaded again."""
        exits = Exits(self._run())
        write(exits, folder, exit_)
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()
        hidden: Any = self.ids
        last = [self._head] if exit_ < len(self.bounds) - 1 else []
        for layer in [*self.layers[: self.bounds[exit_]], *last]:
            hidden = layer(hidden)
        return _difference(loaded(input_ids=self.ids, use_cache=False).logits, hidden.materialize())

    def _run(self) -> Path:
        """The folder of a checkpoint of the cut model in one or two stages, as the engine writes it."""
        run = self._folder / "run"
        if not run.exists():
            run.mkdir()
            for index, layer in enumerate(self.layers):
                torch.save(layer.state_dict(), run / layout.layer(index))
            torch.save(self._head.state_dict(), run / layout.aux_head(self.bounds[1]))
            description = Description(
                model=self.cut.hf_config.to_dict(),
                bounds=self.bounds,
                interlocking={"strategy": "local"},
                sequence_length=LENGTH,
            )
            for name, text in description.files().items():
                (run / name).write_text(text, encoding="utf-8")
        return run

    def _uncut_logits(self, ids: Tensor, **more: Any) -> Tensor:
        return self.uncut(input_ids=ids, use_cache=False, **more).logits


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _difference(got: Tensor, want: Tensor) -> float:
    """The largest, of the largest value; not a number if there is one in either."""
    if got.shape != want.shape:
        raise ModelError(f"its logits have the shape {tuple(got.shape)}, the uncut model's {tuple(want.shape)}")
    return ((got - want).abs().max() / want.abs().max()).item()


@torch.no_grad()
def _perturb(model: nn.Module) -> None:
    """Norms, biases and sinks away from ones and zeros, so that a mistaken one is seen."""
    generator = torch.Generator().manual_seed(7)
    buffers = [buffer for name, buffer in model.named_buffers() if name.endswith("bias")]  # others are tables
    for tensor in [*model.parameters(), *buffers]:
        if tensor.is_floating_point():
            tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            module.weight[module.padding_idx] = (
                0.0  # as it is and stays in training; some classes set it when they load
            )
