"""The seam of analyses: a question about a prediction, answered by a record that shows itself.

An analysis is a module of this folder, of which it takes the name; it has ``Settings``, ``Answer``, ``check``,
``run`` and ``section``. Its key in a config, its file, and its part of the console and the page follow from these.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, Protocol, runtime_checkable

from pydantic import BaseModel, ValidationError

from entropy_probe.analyses.attribute import Folds, check_folds
from entropy_probe.analyses.batches import UpdateBatch, admit_batches, admit_evaluation
from entropy_probe.analyses.given import checked_gradient
from entropy_probe.analyses.plan import Plan, plan, plan_given
from entropy_probe.analyses.policy import Policy
from entropy_probe.analyses.predict import Prediction
from entropy_probe.report.sections.base import Section
from entropy_probe.results.record import SavedRecord
from entropy_probe.rollouts.batch import Rollouts
from entropy_probe.steps.adamw import Gradient


@runtime_checkable
class Analysis(Protocol):
    """A question about a prediction."""

    Settings: type[BaseModel]
    """What is asked; frozen, unknown keys are errors. Messages about others quote each field's ``examples``."""
    Answer: type[SavedRecord]
    """The answer, which has a file of its own."""

    def check(self, policy: Policy, update: UpdateBatch, settings: Any) -> None:
        """Make sure that the question fits the step, before anything is computed.

        Raises:
            ValueError: if not.
        """
        ...

    def run(self, prediction: Prediction, settings: Any) -> SavedRecord:
        """The answer; called while the policy may be scored and differentiated."""
        ...

    def section(self, answer: Any) -> Section:
        """The answer for people."""
        ...


@cache
def questions() -> dict[str, Analysis]:
    """All questions by name."""
    package = __name__.rpartition(".")[0]
    names = (module.name for module in iter_modules(import_module(package).__path__) if module.name != "base")
    members: dict[str, Any] = {name: import_module(f"{package}.{name}") for name in names}
    return members


def check_questions(asked: Mapping[str, Mapping[str, Any]]) -> dict[str, BaseModel]:
    """The settings of each question.

    Raises:
        ValueError: for an unknown question, or settings that it refuses.
    """
    checked = {}
    for name, settings in asked.items():
        if name not in questions():
            raise ValueError(f"questions: expected one of {', '.join(questions())}, got {name!r}; rename it")
        try:
            checked[name] = questions()[name].Settings(**settings)
        except ValidationError as error:
            first, fields = error.errors()[0], questions()[name].Settings.model_fields
            where = ".".join(map(str, ("questions", name, *first["loc"])))
            example = {key: field.examples[0] for key, field in fields.items() if field.examples}
            raise ValueError(f"{where}: {first['msg']}, got {first['input']!r}; write as {example}") from error
    return checked


def check_fit(asked: Mapping[str, BaseModel], policy: Policy, update: UpdateBatch) -> None:
    """Make sure that questions fit the step that they are about.

    Raises:
        ValueError: if one does not.
    """
    for name, settings in asked.items():
        questions()[name].check(policy, update, settings)


def answer_all(prediction: Prediction, asked: Mapping[str, BaseModel]) -> dict[str, SavedRecord]:
    """The answers to questions that fit, by name."""
    return {name: questions()[name].run(prediction, settings) for name, settings in asked.items()}


def plan_asked(
    policy: Policy,
    update: Rollouts | None,
    evaluation: Rollouts,
    gradient: Gradient | None = None,
    *,
    asked: Mapping[str, BaseModel] | None = None,
    folds: Folds = None,
    shares: bool = True,
) -> Plan:
    """The step on a batch, or with a gradient from outside, once it is sure that what is asked of it fits.

    Args:
        policy: whose step it is.
        update: the batch it is taken on, or is compared with.
        evaluation: the batch that entropy is taken on.
        gradient: from outside.
        asked: questions by name.
        folds: of the evaluation batch, for attribution.
        shares: keep each update prompt's share of the gradient, if they fit.

    Raises:
        ValueError: for neither a batch nor a gradient, unusable rollouts, or questions that do not fit.
    """
    checked = None
    if gradient is not None:
        with policy.ranks.agreeing():
            checked = checked_gradient(policy.parameters, gradient)
    if update is None:
        if checked is None:
            raise ValueError("update: expected rollouts to take the step on, or a gradient, got neither; pass one")
        batch = admit_evaluation(policy, evaluation)
        policy.check_ranks_agree(checked, evaluation=batch.rollouts)
        return plan_given(policy, checked, None, batch, shares=shares)
    batches = admit_batches(policy, update, evaluation, checked)
    if checked is not None:
        return plan_given(policy, checked, *batches, shares=shares)
    check_fit(asked or {}, policy, batches[0])
    check_folds(folds, batches[1])
    return plan(policy, *batches, shares=shares)
