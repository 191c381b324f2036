"""What the learning study measured of kinds of heads, and which of them speaks for the heads of a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any

from ibp_deepspeed.config.interlocking import AuxHeadConfig
from ibp_deepspeed.config.objectives import OBJECTIVES

_OF_A_MODEL = {"negatives": "vocabulary", "rank": "width"}


@dataclass(frozen=True)
class Sizes:
    """Of a model; what numbers of ``aux_head`` are compared as parts of.

    Attributes:
        vocabulary: tokens.
        width: of the hidden states.
    """

    vocabulary: int
    width: int

    def compared(self, options: Mapping[str, Any]) -> float | None:
        """What the one number of ``aux_head``'s options is compared by; None: there is none.

        Tokens and dimensions count as a part of the model's. Tokens beside a copied LM head count by themselves: how
        far their gradient is from the exact one is a matter of how many they are, not of the vocabulary
        (docs/learning.md, ``benchmarks.quality sampling``).
        """
        words, numbers = divided(options)
        if not numbers:
            return None
        ((option, value),) = numbers.items()
        whole = None if words.get("readout") == "shared" and option == "negatives" else _OF_A_MODEL.get(option)
        return value / getattr(self, whole) if whole else value


@dataclass(frozen=True)
class LearnedHead:
    """Held-out loss of the last exit with a kind of heads against the same with private ones, as a share of it.

    Attributes:
        options: of ``aux_head`` that are not the defaults; one of them at most is a number.
        compared: what heads of other models are compared with it by (:meth:`Sizes.compared`); None: no number.
        exits: losses along the model that was trained, the last one among them.
        mean, low, high: of the paired differences over the seeds.
        seeds: how many.
        or_more: it stands for heads with less, which were not measured.
    """

    options: dict[str, Any]
    compared: float | None
    exits: int
    mean: float
    low: float
    high: float
    seeds: int
    or_more: bool = False

    def sentence(self) -> str:
        """For the reader."""
        head = ", ".join(f"{option} = {value}{self._whole(option, value)}" for option, value in self.options.items())
        more = " or more" if self.or_more else ""
        known = over_seeds(self.low, self.high, self.seeds)
        return f"{self.mean:+.1%}{more} of it by heads with {head} at {self.exits} exits ({known})"

    def _whole(self, option: str, value: float) -> str:
        if self.compared is None or option not in _OF_A_MODEL or self.compared == value:
            return ""
        return f" of {value / self.compared:,.0f}"


def over_seeds(low: float, high: float, seeds: int) -> str:
    """A range for the reader."""
    return "one seed" if seeds == 1 else f"{low:+.1%} to {high:+.1%} over {seeds} seeds"


@cache
def heads() -> tuple[LearnedHead, ...]:
    """All kinds of heads that were measured (``learned_heads.json``, written with ``learned.json``)."""
    text = files("ibp_deepspeed.planner").joinpath("learned_heads.json").read_text(encoding="utf-8")
    return tuple(LearnedHead(**row) for row in json.loads(text))


def head_options(options: AuxHeadConfig | None) -> dict[str, Any]:
    """Those that are not the defaults and that what is learned depends on; borrowed layers have rows of their own."""
    same = {"borrow", "aux_tokens_seed", "chunk_tokens"}
    return {} if options is None else options.model_dump(exclude_defaults=True, exclude=same)


def learned_head(options: AuxHeadConfig | None, exits: int, sizes: Sizes | None) -> LearnedHead | None:
    """The measurement of heads whose options beside the defaults are the same, at the nearest number of exits.

    Of numbers (one at most) it is the largest (:meth:`Sizes.compared`) that is not above what is asked for: more
    positions, tokens or dimensions do not learn worse. Below all that were measured it is the smallest one, "or more".
    None: not measured, or private and whole.

    Args:
        options: of ``aux_head``.
        exits: losses along the model.
        sizes: of the model; None: not known, then no number is compared.
    """
    given = head_options(options)
    if options is not None and options.objective == OBJECTIVES[options.objective.name]():
        given = {key: options.objective.name if key == "objective" else value for key, value in given.items()}
    words, numbers = divided(given)
    alike = [row for row in heads() if row.options.keys() == given.keys() and divided(row.options)[0] == words]
    if not numbers:
        return min(alike, key=lambda row: abs(row.exits - exits), default=None)
    if sizes is None or len(numbers) > 1:
        return None
    asked = sizes.compared(given)
    return None if asked is None else _nearest(alike, asked, exits)


def divided(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, float]]:
    """Options that are words (or objects), and those that are numbers."""
    numbers = {key: value for key, value in options.items() if isinstance(value, int | float)}
    return {key: value for key, value in options.items() if key not in numbers}, numbers


def _nearest(measured: list[LearnedHead], asked: float, exits: int) -> LearnedHead | None:
    """The largest that is not above what is asked for, or the smallest; both at the nearest number of exits."""
    known = [(row.compared, row) for row in measured if row.compared is not None]
    below = [(of, row) for of, row in known if of <= asked]
    if below:
        return max(below, key=lambda found: (-abs(found[1].exits - exits), found[0]))[1]
    least = min(known, key=lambda found: (abs(found[1].exits - exits), found[0]), default=None)
    return None if least is None else replace(least[1], or_more=True)
