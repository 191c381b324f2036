"""Perplexity from losses that were computed already: a metric of the ``evaluate`` library that needs no network."""

from __future__ import annotations

import math
from typing import Any

import datasets
import evaluate

_DESCRIPTION = "exp of the mean loss a token, over batches of different sizes."
_INPUTS = "predictions: mean loss of each batch in nats per token; references: tokens of each batch."


class ExitPerplexity(evaluate.Metric):  # type: ignore[misc]
    """Perplexity of one exit: add a batch's mean loss and its number of tokens."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(predictions=datasets.Value("float64"), references=datasets.Value("int64"))
        return evaluate.MetricInfo(description=_DESCRIPTION, inputs_description=_INPUTS, citation="", features=features)

    def _compute(self, predictions: list[float], references: list[int]) -> dict[str, Any]:
        tokens = sum(references)
        loss = sum(p * r for p, r in zip(predictions, references, strict=True)) / tokens
        return {"loss": loss, "perplexity": math.exp(loss), "tokens": tokens}
