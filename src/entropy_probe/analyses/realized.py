"""The realized change from scores before and after the step, with the estimator, diagnosis and fallback asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from entropy_probe.config import ProbeConfig
from entropy_probe.estimators.baselines import EntropyKind, PositionSums
from entropy_probe.estimators.first_order import Normalization, entropy
from entropy_probe.estimators.importance import SequenceWeights, sequence_importance_weights, sequence_log_weights
from entropy_probe.estimators.realized import Change, change, per_decision, snis
from entropy_probe.estimators.uncertainty import ClusterSums, Sampled, in_chunks
from entropy_probe.parallel.batch import LocalRows, add_up
from entropy_probe.parallel.ranks import ALONE, Ranks
from entropy_probe.results.note import Note, NoteKind
from entropy_probe.results.probe import Realized, Unit
from entropy_probe.results.student import degrees_of
from entropy_probe.types import Clusters, TokenScores

TOO_FAR = NoteKind(
    "policy_moves_too_far",
    "the step moves the policy too far for these rollouts: effective sample size {ess:.0f} of {sequences}{tail}; "
    "{outcome}",
    "Probe a smaller learning rate, or set probe.on_low_ess to resample (fresh responses after the step).",
)


@dataclass(frozen=True, eq=False)
class Measurement:
    """A realized change and how it came about.

    Attributes:
        change: the change; ``None`` when it was refused.
        estimator: which path produced it, or would have.
        diagnosis: whether the weights can be trusted.
        weights: of the sequences, after the step.
        after: scores of this rank's rows of the batch after the step.
        beyond: the change less the predicted one, where only a part of the batch was scored; weights and scores are
            then those of the part.
    """

    change: Change | None
    estimator: Literal["per_decision", "snis", "clip", "psis", "resampled"]
    diagnosis: Literal["ok", "low_ess", "high_pareto_k"]
    weights: SequenceWeights
    after: TokenScores
    beyond: Sampled | None = None

    @property
    def note(self) -> Note | None:
        """What a reader should know about weights that are not trusted."""
        if self.diagnosis == "ok":
            return None
        w, tail, of_tail = self.weights, "", {}
        if w.pareto_k is not None:
            tail = f", Pareto k {w.pareto_k:.2f} (at most {w.pareto_k_threshold:.2f})"
            of_tail = {"pareto_k": w.pareto_k, "pareto_k_threshold": w.pareto_k_threshold}
        what = {
            "psis": "the realized change is from Pareto-smoothed weights",
            "resampled": "the realized change is from responses sampled anew after the step",
        }
        outcome = "no realized change is given" if self.change is None else what[self.estimator]
        return TOO_FAR(ess=w.ess, sequences=w.normalized.numel(), tail=tail, outcome=outcome, **of_tail)

    def report(
        self,
        clusters: Clusters,
        unit: Unit,
        floor: float | None = None,
        batch: Literal["evaluation", "update", "own"] = "evaluation",
        step_rounding: float = 0.0,
    ) -> Realized:
        """The result's record of it."""
        change, status = self.change, "ok"
        if change is None:
            status = self.diagnosis
        elif floor is not None and abs(change.value) <= floor:
            status = "below_noise_floor"
        return Realized(
            value=None if change is None else change.value,
            standard_error=None if change is None else change.standard_error,
            num_clusters=clusters.count,
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
            degrees_of_freedom=None if change is None else degrees_of(clusters.count, change.skewness),
        )


def measure_change(
    before: TokenScores,
    after: TokenScores,
    local: LocalRows,
    batch: PositionSums,
    config: ProbeConfig,
    ranks: Ranks = ALONE,
    resample: Callable[[], TokenScores] | None = None,
) -> Measurement:
    """The realized change from scores of this rank's rows of a batch before and after the step.

    ``batch`` has the sums over the whole batch before it; ``resample`` scores fresh responses to the same prompts after
    it, where the config falls back to these.
    """
    clusters, normalization, kind = local.clusters, config.normalization, config.entropy

    def change_to(new: ClusterSums, kind: EntropyKind = kind) -> Change:
        return change(add_up(ranks, new), add_up(ranks, entropy(before, clusters, normalization, kind)))

    log_weights, base = ranks.sum(local.by_sequence(sequence_log_weights(before, after)))
    weights = sequence_importance_weights(
        log_weights,
        config.is_mode,
        base=base,
        log_weight_clamp=config.log_weight_clamp,
        weight_clip=config.weight_clip,
    )
    diagnosis = "ok"
    if weights.heavy_tailed:
        diagnosis = "high_pareto_k"
    elif weights.ess_fraction < config.min_ess_fraction and config.is_mode != "psis":
        diagnosis = "low_ess"
    if diagnosis != "ok" and config.on_low_ess == "resample":
        assert resample is not None
        fresh = entropy(resample(), clusters, normalization, kind)
        return Measurement(change_to(fresh), "resampled", diagnosis, weights, after)
    if diagnosis != "ok" and config.on_low_ess == "psis" and weights.pareto_k is not None:
        smoothed = sequence_importance_weights(log_weights, "psis", base=base, log_weight_clamp=config.log_weight_clamp)
        if smoothed.heavy_tailed:
            return Measurement(None, "psis", "high_pareto_k", weights, after)
        new = snis(after, smoothed.normalized[local.rows], clusters, normalization, kind)
        return Measurement(change_to(new), "psis", diagnosis, weights, after)
    estimator = "per_decision" if config.realized == "per_decision" else config.is_mode
    if diagnosis != "ok":
        return Measurement(None, estimator, diagnosis, weights, after)
    if estimator == "per_decision":
        with ranks.agreeing():
            new = per_decision_sums(before, after, clusters, batch, normalization)
        return Measurement(change_to(new, "rao_blackwell"), estimator, diagnosis, weights, after)
    new = snis(after, weights.normalized[local.rows], clusters, normalization, kind)
    return Measurement(change_to(new), estimator, diagnosis, weights, after)


def per_decision_sums(
    before: TokenScores,
    after: TokenScores,
    clusters: Clusters,
    positions: PositionSums,
    normalization: Normalization,
    into: Clusters | None = None,
) -> ClusterSums:
    """The sums of :func:`~entropy_probe.estimators.realized.per_decision`, a chunk of clusters at a time."""
    table = torch.zeros(2, (clusters if into is None else into).count, dtype=torch.float64)
    for rows in in_chunks(clusters):
        own, within = clusters.select(rows), None if into is None else into.select(rows)
        given = (before.select(rows), after.select(rows), own, positions, normalization)
        table += per_decision(*given, into=within).table
    return ClusterSums(table)
