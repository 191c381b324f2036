"""A checkpoint into a pipeline of another shape: layers keep their states, heads follow their boundaries.

Everything is found by name (``reader.py``). The trunk's names are the same however it is cut. A head starts as
the one that stood at its boundary, or as the nearest one, or as the model's own LM head.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state
from torch import Tensor, nn

from ibp_deepspeed.checkpoint.manifest import PipelineShape
from ibp_deepspeed.checkpoint.reader import MASTER, CheckpointReader, head_name

_OF_THE_OPTIMIZER = ("weight_decay", "foreach", "fused", "capturable")


@dataclass(frozen=True)
class HeadOrigin:
    """Where a head's values come from.

    Attributes:
        words: for the log.
        names: name in the head → name in the checkpoint, those that have a value there.
    """

    words: str
    names: Mapping[str, str]


def head_origin(head: nn.Module, sources: Mapping[str, str], boundary: int, saved: CheckpointReader) -> HeadOrigin:
    """What of a checkpoint the head before layer ``boundary`` starts from.

    Args:
        head: its module.
        sources: its parameters' names → those of trunk parameters ("layer.name") that they can start from.
        boundary: the layer before which it stands.
        saved: the checkpoint.
    """
    shapes = {name: tensor.shape for name, tensor in head.state_dict().items()}

    def fitting(names: Mapping[str, str]) -> dict[str, str]:
        values = {name: saved.weight(source) for name, source in names.items()}
        return {n: names[n] for n, value in values.items() if value is not None and value.shape == shapes.get(n)}

    nearest = sorted(saved.shape.heads, key=lambda other: (abs(other - boundary), other))
    for other in nearest[:1]:
        names = {name: head_name(other, name) for name in shapes}
        if len(fitting(names)) == len(shapes):
            where = "the checkpoint" if other == boundary else f"the head before layer {other}"
            return HeadOrigin(f"head before layer {boundary}: from {where}", names)
    names = fitting(sources)
    drawn = sorted(shapes.keys() - names.keys())
    begun = f"head before layer {boundary}: from the model's LM head" if names else f"head before layer {boundary}: new"
    return HeadOrigin(begun + (f", {', '.join(drawn)} as in a new head" if names and drawn else ""), names)


@torch.no_grad()
def fill_head(head: nn.Module, origin: HeadOrigin, saved: CheckpointReader) -> None:
    """Give a head the weights that it starts from."""
    state = head.state_dict()
    for name, source in origin.names.items():
        value = saved.weight(source)
        assert value is not None
        state[name].copy_(value)


def dropped_report(saved: PipelineShape, now: PipelineShape) -> list[str]:
    """A line for the user for each head of the checkpoint at whose boundary none stands any more."""
    return [f"head before layer {b}: dropped, none stands there now" for b in sorted(saved.heads.keys() - now.heads)]


def decay_report(saved: PipelineShape, now: PipelineShape) -> list[str]:
    """A line for the user if the parameter groups are others than the checkpoint's; else none."""
    if saved.decay == now.decay:
        return []
    what = "on matrices alone" if now.decay == "matrices" else "on all parameters"
    return [f"weight decay acts {what} from here on; moments and steps are the checkpoint's, nothing is lost"]


def source_of(place: str, heads: Mapping[int, HeadOrigin]) -> str | None:
    """The name in the checkpoint of what a parameter starts from, None if it has no value there.

    Args:
        place: its name in the model.
        heads: layer before which a head stands → where that comes from.
    """
    for boundary, origin in heads.items():
        prefix = head_name(boundary, "")
        if place.startswith(prefix):
            return origin.names.get(place.removeprefix(prefix))
    return place


@torch.no_grad()
def restore_plain(
    optimizer: torch.optim.Optimizer, sources: Mapping[nn.Parameter, str], saved: CheckpointReader
) -> list[str]:
    """Give torch's optimizer the states of its parameters, and its groups the rates that these had.

    Args:
        optimizer: torch's.
        sources: parameter → name in the checkpoint.
        saved: the checkpoint.

    Returns:
        lines for the user.
    """
    settings = optimizer.state_dict()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    keys = [_key_of_moments(group) for group in optimizer.param_groups for _ in group["params"]]
    states, anew = {}, 0
    for index, (parameter, key_of_moments) in enumerate(zip(parameters, keys, strict=True)):
        values = saved.state(sources[parameter]) if parameter in sources else {}
        if _is_foreign(values, key_of_moments):
            anew += 1
        elif values:
            states[index] = {key: _shaped(value, parameter) for key, value in values.items() if key != MASTER}
        if MASTER in values:
            parameter.copy_(_shaped(values[MASTER], parameter))
    members = [group["params"] for group in optimizer.param_groups]
    groups, lines = _with_settings(settings["param_groups"], members, sources, saved)
    optimizer.load_state_dict({**settings, "state": states, "param_groups": groups})
    return lines + _foreign_report(anew, saved)


@torch.no_grad()
def restore_partitioned(optimizer: Any, sources: Mapping[nn.Parameter, str], saved: CheckpointReader) -> list[str]:
    """Give DeepSpeed's ZeRO or bf16 optimizer the states of its parameters, through its API for single parameters, and
    its groups the rates that these had.

    Args:
        optimizer: DeepSpeed's, around torch's.
        sources: parameter → name in the checkpoint.
        saved: the checkpoint.

    Returns:
        lines for the user.
    """
    inner, anew = optimizer.optimizer, 0
    optimizer.refresh_fp32_params()
    for parameter, name in sources.items():
        values = saved.state(name)
        if MASTER in values:
            parameter.copy_(_shaped(values[MASTER], parameter))
            safe_set_full_fp32_param(parameter, values[MASTER].flatten().to(parameter.device))
        if parameter._hp_mapping is None:  # type: ignore[attr-defined]
            continue  # another replica's
        group = inner.param_groups[parameter._hp_mapping.param_group_index]  # type: ignore[attr-defined]
        if _is_foreign(values, _key_of_moments(group)):
            anew += 1
            continue
        for key, value in values.items():
            if key != MASTER:
                _set_state(parameter, inner, key, value)
    members = optimizer.bit16_groups if hasattr(optimizer, "bit16_groups") else optimizer.bf16_groups
    groups, lines = _with_settings(inner.param_groups, members, sources, saved)
    for group, settings in zip(inner.param_groups, groups, strict=True):
        group.update({key: value for key, value in settings.items() if key != "params"})
    return lines + _foreign_report(anew, saved)


def _key_of_moments(group: Mapping[str, Any]) -> str | None:
    """What the optimizer of a group can't go on without once a parameter has a state; None: nothing that is known."""
    if group.get("use_muon"):
        return "momentum_buffer"
    return "exp_avg" if "betas" in group else None


def _is_foreign(values: Mapping[str, Any], key_of_moments: str | None) -> bool:
    """Whether a state is another kind of optimizer's."""
    return key_of_moments is not None and bool(values.keys() - {MASTER}) and key_of_moments not in values


def _foreign_report(anew: int, saved: CheckpointReader) -> list[str]:
    """A line for the user if moments of so many parameters were another kind of optimizer's."""
    kind = saved.shape.optimizer.rpartition("/")[2]
    return [f"{anew} parameters begin with new moments, those of the checkpoint are {kind}'s"] if anew else []


def _set_state(parameter: nn.Parameter, inner: torch.optim.Optimizer, key: str, value: Any) -> None:
    """One entry of a parameter's state, in the flat tensor of its group, which is made at the first step otherwise."""
    mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
    flat = inner.param_groups[mapping.param_group_index]["params"][0]
    state = inner.state[flat]
    if not _is_of_size(value, parameter):
        state[key] = copy.deepcopy(value)  # a number of steps: one for the whole group
        if inner.param_groups[mapping.param_group_index].get("fused") and isinstance(value, Tensor):
            state[key] = state[key].to(flat.device)  # torch's fused kernels count on the device
        return
    if key not in state:
        state[key] = torch.zeros_like(flat)
    mapping.set_optim_state_fragment(flat, state)
    safe_set_full_optimizer_state(parameter, value.flatten().to(parameter.device), key)


def _with_settings(
    groups: list[dict[str, Any]],
    members: Sequence[Sequence[nn.Parameter]],
    sources: Mapping[nn.Parameter, str],
    saved: CheckpointReader,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Parameter groups with the rates that their parameters had: schedules set new ones after a batch.

    Which group decays by how much and which kernels run is the optimizer's to say: the checkpoint's may be others. A
    group of new parameters alone takes the rates of the first stage's first group.

    Args:
        groups: of the optimizer.
        members: their parameters.
        sources: parameter → name in the checkpoint.
        saved: the checkpoint.

    Returns:
        the groups, and a line for each whose parameters had different rates: most of them decide.
    """
    made, lines = [], []
    for number, (group, parameters) in enumerate(zip(groups, members, strict=True)):
        found = [s for p in parameters if p in sources and (s := saved.settings(sources[p]))]
        found = found or saved.first_settings()[:1]
        kept = [{k: v for k, v in s.items() if k in group and k not in _OF_THE_OPTIMIZER} for s in found]
        votes = Counter(map(repr, kept))
        winner = next((s for s in kept if repr(s) == votes.most_common(1)[0][0]), {})
        if len(votes) > 1:
            names = sorted({k for s in kept for k in s if k in winner and repr(s[k]) != repr(winner[k])})
            lines += [
                f"parameter group {number}: {', '.join(f'{name} {winner[name]}' for name in names)}, as most of its "
                f"parameters had; {len(kept) - votes.most_common(1)[0][1]} of {len(kept)} had others"
            ] * bool(names)  # groups of another kind of optimizer have other settings besides
        made.append({**group, **winner})
    return made, lines


def _is_of_size(value: Any, parameter: nn.Parameter) -> bool:
    """Whether an entry of a state is a tensor as large as the parameter, and no number."""
    return isinstance(value, Tensor) and value.dim() > 0 and value.numel() == parameter.numel()


def _shaped(value: Any, parameter: nn.Parameter) -> Any:
    return value.reshape(parameter.shape).clone() if _is_of_size(value, parameter) else copy.deepcopy(value)
