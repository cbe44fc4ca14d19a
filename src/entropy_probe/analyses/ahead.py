"""A step that the caller takes: predicted from the gradient that the optimizer is about to get, measured afterwards.

Formulas: ``docs/theory.md``, "A gradient from outside" and "One batch".
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from entropy_probe.analyses.assemble import result_of, with_realized
from entropy_probe.analyses.batches import admit_batches, admit_evaluation
from entropy_probe.analyses.coast import Rest, come_to_rest, measure_rest
from entropy_probe.analyses.given import checked_gradient
from entropy_probe.analyses.measure import measure_taken
from entropy_probe.analyses.own_batch import OwnPrediction, measure_own_taken, predict_own, without_own
from entropy_probe.analyses.plan import plan, plan_given
from entropy_probe.analyses.policy import Policy
from entropy_probe.analyses.predict import Prediction, predict
from entropy_probe.analyses.tried import Tried
from entropy_probe.results.probe import ProbeResult
from entropy_probe.rollouts.batch import Rollouts
from entropy_probe.steps.adamw import Gradient


@dataclass(frozen=True, eq=False)
class StepAhead:
    """The prediction of a step that is not taken yet.

    Attributes:
        prediction: what it will do, to first order.
        result: the same as a result.
        rest: where momentum alone leads after it, where that is asked for.
    """

    prediction: Prediction
    result: ProbeResult
    rest: Rest | None

    @classmethod
    def of(cls, prediction: Prediction) -> StepAhead:
        """With what has to be taken of parameters and optimizer before they move."""
        rest = come_to_rest(prediction.plan, prediction)
        return cls(prediction, result_of(prediction.plan, prediction), rest)

    def taken(self) -> ProbeResult:
        """The result with what the step did, once the optimizer has taken it; nothing else may have moved the policy.

        Raises:
            ValueError: if the policy after the step gives numbers that are not finite.
        """
        plan = self.prediction.plan
        with plan.policy.isolated():
            if not isinstance(self.prediction, OwnPrediction):
                measured = measure_taken(plan)
            elif self.rest is None:
                measured = measure_own_taken(self.prediction)
            else:  # the way to rest is measured on all prompts, and begins where the step ends
                measured = without_own(self.prediction, measure_taken(plan))
            coasted = measure_rest(plan, measured, self.rest, self.prediction)
        return with_realized(self.result, self.prediction, measured).model_copy(update={"coasted": coasted})


def look_ahead(policy: Policy, gradient: Gradient, batch: Rollouts | None, evaluation: Rollouts | None) -> StepAhead:
    """Predict the step that the optimizer takes with a gradient as it is, after clipping.

    The entropy is that of ``evaluation``, or without it of ``batch``, which the gradient is of. With both it
    costs a gradient, and the prediction divides over its prompts.

    How the model may be called is tried at its first step, and again only where a batch is longer or shorter.

    Raises:
        ValueError: for no batch at all, unusable rollouts or an unusable gradient.
    """
    policy = replace(policy, tried=Tried.of(policy.model))
    with policy.ranks.agreeing():
        checked = checked_gradient(policy.parameters, gradient)
    if evaluation is not None and batch is not None:
        planned = plan(policy, *admit_batches(policy, batch, evaluation, checked), clipped=checked)
    elif evaluation is not None:
        admitted = admit_evaluation(policy, evaluation)
        policy.check_ranks_agree(checked, evaluation=admitted.rollouts)
        planned = plan_given(policy, checked, None, admitted, clip=False)
    elif batch is not None:
        return StepAhead.of(predict_own(policy, batch, checked))
    else:
        raise ValueError("batch: expected the rollouts of the step, or evaluation rollouts, got neither; pass one")
    return StepAhead.of(predict(planned))
