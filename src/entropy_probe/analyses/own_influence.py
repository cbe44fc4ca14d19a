"""What prompts of a step's own batch do to the entropy of their own responses, which is left out of what is measured.

Formulas: ``docs/theory.md``, "Validation".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from entropy_probe.analyses.evaluation_part import EvaluationPart
from entropy_probe.analyses.gradient import over_clusters
from entropy_probe.analyses.plan import Plan
from entropy_probe.estimators.realized import Change
from entropy_probe.estimators.uncertainty import ratio
from entropy_probe.gradients.per_sample import SampleGradients
from entropy_probe.gradients.rows import dot_rows, flat
from entropy_probe.steps.plan import PlannedStep


@dataclass(frozen=True, eq=False)
class OwnInfluence:
    """Of the prompts of a part of the batch.

    Attributes:
        planned: the step on the whole batch.
        part: the part.
        products: ``(x_u - mean x) y_u`` by parameter, with the prompt's entropy gradient in the part and its share of
            the loss gradient, of this rank's prompts, ``[n, P]``.
    """

    planned: Plan
    part: EvaluationPart
    products: Float[Tensor, "n P"]

    @classmethod
    def of(cls, planned: Plan, part: EvaluationPart, slope: SampleGradients) -> OwnInfluence:
        """From the entropy gradients of the part's prompts.

        Raises:
            ValueError: if the prompts' gradients are not kept.
        """
        shares, update = planned.batch.gradient.stored, planned.batch.update.local
        if shares is None or slope.stored is None:
            raise ValueError(
                "validate: expected the prompts' gradients to fit into max_stored_gradient_gib where the batch of the "
                "step is judged by itself, got more; raise probe.max_stored_gradient_gib, or give evaluation rollouts"
            )
        total = {n: torch.zeros_like(p) if (x := slope.total[n]) is None else x
                 for n, p in planned.policy.parameters.items()}  # fmt: skip
        products = slope.stored - flat(total, total).to(slope.stored) / len(part.clusters)
        mine = torch.searchsorted(update.present_clusters, part.clusters[part.local.present_clusters])
        return cls(planned, part, products.mul_(shares[mine]))

    def along(self, step: PlannedStep) -> Float[Tensor, " u"]:
        """What each prompt's gradient, as a step scales it, adds to the prompt's product with the step beyond others'.

        With the clip factor and the denominators of the step held.
        """
        policy, count = self.planned.policy, len(self.part.clusters)
        assert step.gradient_scale is not None
        products = dot_rows(self.products, step.gradient_scale, policy.parameters)
        return -step.gradient.factor * count / (count - 1) * over_clusters(policy, self.part.local, products)

    def left_out(self, change: Change, step: PlannedStep, kept: Tensor) -> Change:
        """A change by the step on some prompts, without what these do to their own responses to first order."""
        on_itself = torch.where(torch.isin(self.part.clusters, kept), self.along(step), 0.0)
        own = ratio(on_itself, self.part.sizes(self.planned.policy))
        return Change(change.value - own.value, change.influence - own.influence, change.size_change)
