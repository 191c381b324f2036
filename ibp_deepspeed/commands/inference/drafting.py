"""What generate.py does with a draft: decode with and without it, and say what it brought."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ibp_deepspeed.commands.inference.loading import Loaded
    from ibp_deepspeed.models.exits.decoding import Decoded

Decode = Callable[[int], "Decoded"]
"""Takes the most new tokens."""


def by_exit(loaded: Loaded, inputs: Any) -> tuple[Decode, Decode]:
    """With the model's own first layers, and without, both in a loop that does little else."""
    from ibp_deepspeed.models.exits.self_speculation import SelfSpeculation

    assert loaded.shared is not None
    decoding = SelfSpeculation(loaded.model, loaded.draft, loaded.shared)
    eos = loaded.model.generation_config.eos_token_id
    ends = frozenset(eos if isinstance(eos, list) else [] if eos is None else [eos])
    return (
        lambda tokens: decoding.decode(inputs, tokens, ends),
        lambda tokens: decoding.plain(inputs, tokens, ends),
    )


def by_model(loaded: Loaded, inputs: Any) -> tuple[Decode, Decode]:
    """With another model, and without, both by transformers' ``generate``."""
    from ibp_deepspeed.models.exits.decoding import assisted, greedy

    pad = {"pad_token_id": loaded.tokenizer.eos_token_id}
    return (
        lambda tokens: assisted(loaded.model, loaded.draft, inputs, max_new_tokens=tokens, **pad),
        lambda tokens: greedy(loaded.model, inputs, max_new_tokens=tokens, **pad),
    )


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
