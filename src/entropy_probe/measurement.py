"""The realized change with the estimator, the diagnosis and the fallback that were asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from entropy_probe.config import ProbeConfig
from entropy_probe.estimators.importance import SequenceWeights, sequence_importance_weights
from entropy_probe.estimators.realized import Change, per_decision, resampled, snis
from entropy_probe.estimators.uncertainty import Units
from entropy_probe.results import Realized, Unit
from entropy_probe.types import TokenScores

__all__ = ["Measurement", "measure_change"]


@dataclass(frozen=True, eq=False)
class Measurement:
    """A realized change and how it came about.

    Attributes:
        change: the change; ``None`` when it was refused.
        estimator: which path produced it, or would have.
        diagnosis: whether the weights can be trusted.
        weights: of the sequences, after the step.
    """

    change: Change | None
    estimator: Literal["per_decision", "snis", "clip", "psis", "resampled"]
    diagnosis: Literal["ok", "low_ess", "high_pareto_k"]
    weights: SequenceWeights

    @property
    def note(self) -> str | None:
        """What a reader should know about weights that are not trusted."""
        if self.diagnosis == "ok":
            return None
        w = self.weights
        found = f"effective sample size {w.ess:.0f} of {w.normalized.numel()}"
        if w.pareto_k is not None:
            found += f", Pareto k {w.pareto_k:.2f} (at most {w.pareto_k_threshold:.2f})"
        what = {
            "psis": "the realized change is from Pareto-smoothed weights",
            "resampled": "the realized change is from responses sampled anew after the step",
        }
        outcome = "no realized change is given" if self.change is None else what[self.estimator]
        return f"the step moves the policy too far for these rollouts: {found}; {outcome}"

    def report(
        self,
        units: Units,
        unit: Unit,
        floor: float | None = None,
        batch: Literal["evaluation", "update"] = "evaluation",
        step_rounding: float = 0.0,
    ) -> Realized:
        """The result's record of it.

        Args:
            units: the sampling units.
            unit: of the change.
            floor: what rounding does to the change.
            batch: which rollouts it was measured on.
            step_rounding: what rounding of the parameters adds to the step, relative to its length.
        """
        change, status = self.change, "ok"
        if change is None:
            status = self.diagnosis
        elif floor is not None and abs(change.value) <= floor:
            status = "below_noise_floor"
        return Realized(
            value=None if change is None else change.value,
            standard_error=None if change is None else change.standard_error,
            num_units=units.count,
            unit=unit,
            status=status,
            estimator=self.estimator,
            batch=batch,
            ess=self.weights.ess,
            ess_fraction=self.weights.ess_fraction,
            max_weight=self.weights.max_weight,
            pareto_k=self.weights.pareto_k,
            pareto_k_threshold=self.weights.pareto_k_threshold,
            noise_floor=floor,
            step_rounding=step_rounding,
        )


def measure_change(
    before: TokenScores,
    after: TokenScores,
    units: Units,
    config: ProbeConfig,
    resample: Callable[[], TokenScores] | None = None,
) -> Measurement:
    """The realized change from scores of the same responses before and after the step.

    Args:
        before: scores before the step.
        after: scores after it.
        units: the sampling units.
        config: the estimator, its options, and what to do when the weights are not trusted.
        resample: scores, after the step, of fresh responses to the same prompts; needed for that fallback only.
    """
    weights = sequence_importance_weights(
        before,
        after,
        config.is_mode,
        log_weight_clamp=config.log_weight_clamp,
        weight_clip=config.weight_clip,
    )
    normalization, kind = config.normalization, config.entropy
    diagnosis = "ok"
    if weights.heavy_tailed:
        diagnosis = "high_pareto_k"
    elif weights.ess_fraction < config.min_ess_fraction and config.is_mode != "psis":
        diagnosis = "low_ess"
    if diagnosis != "ok" and config.on_low_ess == "resample":
        assert resample is not None
        return Measurement(resampled(before, resample(), units, normalization, kind), "resampled", diagnosis, weights)
    if diagnosis != "ok" and config.on_low_ess == "psis" and weights.pareto_k is not None:
        smoothed = sequence_importance_weights(before, after, "psis", log_weight_clamp=config.log_weight_clamp)
        change = None if smoothed.heavy_tailed else snis(before, after, smoothed, units, normalization, kind)
        return Measurement(change, "psis", "high_pareto_k" if change is None else diagnosis, weights)
    if config.realized == "per_decision":
        estimator = "per_decision"
        change = per_decision(before, after, units, normalization) if diagnosis == "ok" else None
    else:
        estimator = config.is_mode
        change = snis(before, after, weights, units, normalization, kind) if diagnosis == "ok" else None
    return Measurement(change, estimator, diagnosis, weights)
