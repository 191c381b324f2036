"""What an evaluation of exits found, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ibp_deepspeed.models.exits.confidence import Confidence, Threshold
from ibp_deepspeed.models.exits.early_exit import LEVELS, EarlyExit, cheapest
from ibp_deepspeed.models.exits.evaluation import Evaluation

_CONFIDENCE_NOTE = """\
agrees: how often the exit's likeliest token is the model's. calibration: expected error of that token's probability.
95% agree: at and above which probability so many positions agree, and how many positions these are; 99% likewise."""
_EARLY_NOTE = """\
Each position leaves at the first exit whose likeliest token has at least this probability; saved are decoder layers of
the model, on given text, whose states are all there. LM heads are not counted."""


def text_table(
    evaluation: Evaluation, unigram_entropy: float, confidences: Mapping[int, Confidence] | None = None
) -> str:
    """A row an exit, and what knowing the token frequencies alone would give.

    Args:
        evaluation: of the exits.
        unigram_entropy: of the data, in nats.
        confidences: exit → how far it can be believed, for more columns.
    """
    extra, note = "", "\n"
    if confidences is not None:
        levels = [f"{one.agreement:.0%} agree" for one in next(iter(confidences.values())).thresholds]
        extra = "".join([f" {'agrees':>8} {'calibration':>12}", *(f" {level:>15}" for level in levels)])
        note = f"\n{_CONFIDENCE_NOTE}\n"
    lines = [f"{'exit':>12} {'loss':>8} {'perplexity':>11}{extra}   held-out nats per token, on {evaluation.sample}"]
    for row in evaluation.rows():
        name = "model" if row["exit"] == len(evaluation.losses) else f"exit {row['exit']}"
        cells = "" if confidences is None else _cells(confidences[row["exit"]])
        lines.append(f"{name:>12} {row['loss']:>8.4f} {row['perplexity']:>11.2f}{cells}")
    unigrams = "entropy of the token frequencies: below it something was learned"
    return "\n".join([*lines, f"{'unigrams':>12} {unigram_entropy:>8.4f} {'':>11}   {unigrams}"]) + note.rstrip("\n")


def early_exit_table(points: Sequence[EarlyExit], perplexity: float) -> str:
    """For levels of agreement, the rule that saves most; ``perplexity``: the model's."""
    lines = [f"{'agrees':>12} {'probability':>12} {'layers saved':>13} {'perplexity':>11} {'of model':>9}"]
    for level in LEVELS:
        point = cheapest(points, level)
        if point is None or point.threshold is None:
            lines.append(f"{level:>11.0%}+ {'no threshold reaches it':>37}")
            continue
        ratio = point.perplexity / perplexity
        lines.append(
            f"{level:>11.0%}+ {point.threshold:>12.3f} {point.saved:>13.1%} {point.perplexity:>11.2f} {ratio:>8.3f}x"
        )
    return "\n".join([*lines, _EARLY_NOTE])


def _cells(confidence: Confidence) -> str:
    found = "".join(f" {_threshold(one):>15}" for one in confidence.thresholds)
    return f" {confidence.agreement:>8.1%} {confidence.calibration_error:>12.4f}{found}"


def _threshold(found: Threshold) -> str:
    return "none" if found.confidence is None else f"{found.confidence:.3f}: {found.share:.1%}"
