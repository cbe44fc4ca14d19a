"""What an attribution says in ``results.json``. Reading it needs no model and no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from entropy_probe.results.record import Record


class AttributionSummary(Record):
    """How the first-order change divides over the update batch and over the step's parts.

    The rows are in ``tokens.parquet``, ``prompts.parquet`` and ``layers.parquet``.

    Attributes:
        unit: of every contribution.
        method: how tokens got their contributions: ``forward-mode``, or ``reverse-mode (WHY)``.
        horizon: how many tokens after a changed one count in every contribution; null for the whole response.
        correlation_with_whole: Pearson, over prompts, between these contributions and those to the whole response, on
            the same rollouts; null where they are these, or prompts are too few to tell.
        num_tokens: response tokens of the update batch.
        gradient: what this batch's gradient adds to the first-order change; the tokens' contributions sum to it.
        momentum: what earlier batches add, through Adam's first moment.
        weight_decay: what weight decay adds.
        rounding: what rounding to the precision that training keeps its weights in adds. The four sum to the predicted
            change within ``horizon``.
        positive_advantages: contributions of the tokens with an advantage above 0.
        negative_advantages: of those below 0. The two sum to ``gradient``.
        rank_correlation_with_covariance: Spearman, over tokens, between contributions and the covariance terms of Cui
            et al. (2025); near -1 where that theory orders tokens as the gradient does; null where one side is
            constant.
        folds: evaluation folds behind the prompts' standard errors; null if there are none.
        seconds: what the attribution took on top of the prediction.
    """

    unit: Literal["nats/token", "nats/sequence"]
    method: str
    horizon: int | None = Field(default=None, ge=0)
    correlation_with_whole: float | None = None
    num_tokens: int
    gradient: float
    momentum: float
    weight_decay: float
    rounding: float = 0.0
    positive_advantages: float
    negative_advantages: float
    rank_correlation_with_covariance: float | None
    folds: int | None = None
    seconds: float = Field(ge=0)
