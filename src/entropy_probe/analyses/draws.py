"""What several draws of one prompt have in common, on the realized change.

Formulas: ``docs/theory.md``, "Draws per prompt".
"""

from __future__ import annotations

import torch

from entropy_probe.analyses.measure import Measured
from entropy_probe.analyses.plan import Plan
from entropy_probe.analyses.realized import per_decision_sums
from entropy_probe.estimators.draws import between
from entropy_probe.estimators.first_order import entropy
from entropy_probe.estimators.realized import change
from entropy_probe.parallel.batch import add_up
from entropy_probe.results.probe import Draws
from entropy_probe.types import Clusters


def measured_draws(plan: Plan, measured: Measured) -> Draws | None:
    """The between-prompt share and the design effect, where prompts are clusters of several draws.

    ``None`` where they are not, where the change was not measured by per-decision weights, or where nothing varies.
    """
    evaluation, before, policy = plan.evaluation, plan.before, plan.policy
    draws, clusters, measurement = evaluation.draws, evaluation.clusters, measured.measurement
    plain = measurement.estimator == "per_decision" and measurement.change is not None
    if evaluation.is_update or evaluation.cluster_name != "prompt" or draws.count == clusters.count or not plain:
        return None
    normalization, local = policy.config.normalization, evaluation.local
    own = draws.select(local.rows)
    with policy.ranks.agreeing():
        given = (before.scores, measurement.after, local.clusters, before.positions, normalization)
        new, old = per_decision_sums(*given, into=own), entropy(before.scores, own, normalization)
    influence = change(add_up(policy.ranks, new), add_up(policy.ranks, old)).influence
    prompt_of_draw = torch.zeros(draws.count, dtype=torch.long).scatter(0, draws.index, clusters.index)
    parts = between(influence, Clusters(prompt_of_draw, clusters.count))
    if parts is None:
        return None
    return Draws(
        num_prompts=clusters.count,
        per_prompt=draws.count / clusters.count,
        between_share=parts.share,
        design_effect=parts.design_effect,
    )
