"""A proof in words."""

from __future__ import annotations

from collections.abc import Iterator

from ibp_deepspeed.models.proofs.proof import LIMITS, MEANINGS, Proof


def lines(proof: Proof) -> Iterator[str]:
    """A line for each check that was made, with its figures."""
    if proof.layers:
        yield f"a small model of type '{proof.model_type}', {proof.layers} layers, cut and uncut, in fp32:"
    for name, difference in proof.differences.items():
        yield f"  {name}: {difference:.1e}, at most {LIMITS[name]:.0e} ({MEANINGS[name].rstrip(',')})"
    for name, reason in proof.lacks.items():
        yield f"  {name}: not to be had: {reason}"
