"""What generate.py does with a draft: decode with and without it, and say what it brought."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ibp_deepspeed.models.exits.decoding import Decoded

Decode = Callable[[int], "Decoded"]
"""Takes the most new tokens."""


def compare(drafting: Decode, plain: Decode, tokens: int) -> tuple[Decoded, Decoded]:
    """Both ways, each after two tokens that nobody measures: first calls set up what later ones find."""
    drafting(2), plain(2)
    return drafting(tokens), plain(tokens)


def report(name: str, drafted: Decoded, plain: Decoded) -> str:
    """One line on acceptance, passes and speed; ``name``: of the draft."""
    share = f" ({drafted.accepted / drafted.drafted:.0%})" if drafted.drafted else ""
    apart = drafted.difference(plain)
    same = "the same tokens" if apart is None else f"other tokens from new token {apart + 1} on"
    return (
        f"{name}: {drafted.accepted} of {drafted.drafted} drafted tokens accepted{share}, {drafted.passes} passes of "
        f"the model for {len(drafted.tokens)} tokens in {drafted.seconds:.2f} s; greedy decoding without it: {same} in "
        f"{plain.seconds:.2f} s, a speed-up of {plain.seconds / drafted.seconds:.2f}x"
    )
