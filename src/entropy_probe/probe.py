"""The public face: one class that predicts and measures, and leaves model and optimizer as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import nn

from entropy_probe.analyses.ahead import StepAhead, look_ahead
from entropy_probe.analyses.assemble import result_of
from entropy_probe.analyses.attribute import Folds, attribute, check_divides
from entropy_probe.analyses.attribution import Attribution, Contributions
from entropy_probe.analyses.coast import come_to_rest, measure_rest, measured_beside
from entropy_probe.analyses.given import checked_past
from entropy_probe.analyses.measure import measure as measure_step
from entropy_probe.analyses.one_batch import one_batch
from entropy_probe.analyses.own_batch import measure_own, predict_own
from entropy_probe.analyses.policy import (
    Policy,
    Resample,
    check_differentiable,
    check_own_step,
    checked_optimizer,
    open_policy,
)
from entropy_probe.analyses.pooled import pooled
from entropy_probe.analyses.predict import predict
from entropy_probe.analyses.provenance import Phase
from entropy_probe.analyses.replay import batch_gradient, take_step
from entropy_probe.analyses.sweep import check_finished, check_learning_rates, sweep
from entropy_probe.analyses.validate import validate
from entropy_probe.config import ProbeConfig
from entropy_probe.parallel.ranks import ALONE, SameWork, joined_ranks
from entropy_probe.parallel.shards import check_shards, is_sharded, reshard
from entropy_probe.questions.base import answer_all, check_questions, plan_asked
from entropy_probe.results.probe import CrossPrompt, ProbeResult
from entropy_probe.results.record import SavedRecord
from entropy_probe.results.sweep import Sweep, SweepPoint
from entropy_probe.results.validation import MeasuredStep, Validation
from entropy_probe.rollouts.batch import Rollouts
from entropy_probe.scoring.cache import ScoreCache
from entropy_probe.scoring.isolation import untrained
from entropy_probe.steps.adamw import Gradient, learning_rates, optimizer_parameters
from entropy_probe.steps.moments import check_moments
from entropy_probe.steps.precision import NARROW

__all__ = ["EntropyProbe"]


class EntropyProbe:
    """Predicts and measures the entropy change of the next optimizer step, and leaves no trace.

    Args:
        model: the policy at the checkpoint; called as ``model(input_ids=..., attention_mask=...)`` and returning an
            object with ``.logits``.
        optimizer: over the model's parameters, holding its state: ``torch.optim.AdamW`` or ``Adam``, or another
            optimizer whose step a copy of it reproduces (``docs/theory.md``, "Other optimizers").
        config: the settings.
        mapping: how the optimizer's state was matched to parameters, for the report.
        progress: called as ``progress(phase, done, total)`` while the probe works.
        resample: called with the evaluation rollouts while the model is at the parameters after the step, for fresh
            responses to the same prompts in the same order; needed for ``on_low_ess="resample"`` only.
        reference: the reference policy of a loss with a KL term, where it is a model of its own. Log-probabilities in
            the rollouts (``reference_logprobs``) go before it; without either a policy with an adapter is scored with
            the adapter switched off.
        distributed: share the work among the ranks of torch's default process group. Every rank must hold the whole
            policy and optimizer, be given whole batches, and call the same methods; every rank returns the result. A
            model sharded by FSDP2 (``fully_shard``) needs no such asking; there every rank works on the whole batches.
        end_token_ids: tokens that end a response, besides those of the model's generation config (or its config).
            Rollouts are checked against them.
        stop_texts: whether responses may end at a stop text instead.
        past_gradients: of the last steps, the latest first, as the optimizer got them (clipped): predictions then
            divide the momentum part over them (``result.origins``). Each is one more direction to take the entropy's
            slope along, in the memory of the parameters.

    Raises:
        ValueError: if the optimizer is not supported or not the model's, every learning rate is 0, the model's
            precision is below ``config.dtype``, it is spread over several devices other than by FSDP2, a ``resample``
            function is needed and missing, or there is no process group to share the work.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: ProbeConfig | None = None,
        *,
        mapping: str = "live optimizer",
        progress: Phase | None = None,
        resample: Resample | None = None,
        reference: nn.Module | None = None,
        distributed: bool = False,
        end_token_ids: Sequence[int] = (),
        stop_texts: bool = False,
        past_gradients: Sequence[Gradient] = (),
    ) -> None:
        config = config or ProbeConfig()
        optimizer = checked_optimizer(model, optimizer, config, resample)
        ranks = joined_ranks() if distributed or is_sharded(model) else ALONE
        self._model, self._optimizer, self._config = model, optimizer, config
        self._shared: dict[str, Any] = {
            "mapping": mapping,
            "progress": progress,
            "resample": resample,
            "reference": reference,
            "cache": ScoreCache(),
            "ranks": SameWork(ranks) if is_sharded(model) else ranks,
            "end_ids": tuple(end_token_ids),
            "stop_texts": stop_texts,
        }
        parameters = self._policy().parameters
        if past_gradients:
            self._shared["past"] = checked_past(parameters, optimizer, past_gradients)

    @contextmanager
    def _opened(self, **settings: Any) -> Iterator[Policy]:
        """The policy ready to be scored and differentiated for one run, with these settings, and left as it was."""
        check_differentiable(self._model)
        # what is made without a device belongs in host memory, whatever default device the caller has set
        other = torch.get_default_device().type != "cpu"
        with torch.device("cpu") if other else nullcontext():
            policy = self._policy(**settings)
            with untrained(policy.parameters.values(), self._optimizer), policy.isolated():
                yield policy

    def _policy(self, **settings: Any) -> Policy:
        """The policy and its optimizer as they are now: a scheduler may have changed the rates since the last call."""
        model, optimizer, config = self._model, self._optimizer, self._config.model_copy(update=settings)
        reshard(model)
        parameters = optimizer_parameters(model, optimizer)
        check_moments(parameters, optimizer)
        check_shards(model, parameters.items())
        check_own_step(model, optimizer, config)
        rates = learning_rates(optimizer, config.learning_rate)
        return open_policy(model, optimizer, parameters, config, learning_rates=rates, **self._shared)

    def run(
        self,
        *,
        update: Rollouts | None = None,
        evaluation: Rollouts,
        gradient: Gradient | None = None,
        questions: Mapping[str, Mapping[str, Any]] | None = None,
        pool: bool = False,
    ) -> ProbeResult:
        """Predict the change of the next step and measure it, both on ``evaluation``.

        Args:
            update: the batch the step is taken on.
            evaluation: the batch whose entropy is predicted and measured.
            gradient: of the trainer's own loss before clipping, by the names of the trained parameters in
                ``model.named_parameters()``, such as ``.grad`` after the backward pass; ``None`` where the loss does
                not reach one. The step is then this gradient's, clipped to ``max_grad_norm``, and errors are from
                ``evaluation`` alone; of ``update`` beside it the gradient is compared
                (``diagnostics.gradient_agreement``). Every rank gives the same, or its shards.
            questions: what else to ask of the prediction, as :meth:`ask`: settings by the question's name. Answers are
                in ``result.answers``.
            pool: also take both changes from ``update`` itself, as :meth:`one_batch` does, and weight the two by their
                variances (``result.pooled``). Costs a gradient and two scorings of ``update``.

        Raises:
            ValueError: for unusable rollouts (too long, too few clusters, no advantages), a gradient of other names or
                shapes, non-finite numbers, or questions that do not fit.
        """
        asked = check_questions(questions or {})
        if asked and gradient is not None:
            raise ValueError(
                f"questions: expected the step of update rollouts, which {next(iter(asked))} divides, got that of a "
                "gradient from outside; leave one of the two out"
            )
        with self._opened() as policy:
            planned = plan_asked(policy, update, evaluation, gradient, asked=asked)
            prediction, measured = predict(planned), measure_step(planned)
            both = pooled(prediction, measured) if pool else None
            fields = {"answers": answer_all(prediction, asked), "pooled": both}
            return result_of(planned, prediction, measured, **fields, **measured_beside(prediction, measured))

    def predict(
        self, *, update: Rollouts | None = None, evaluation: Rollouts, gradient: Gradient | None = None
    ) -> ProbeResult:
        """The first-order part of :meth:`run` only."""
        with self._opened() as policy:
            prediction = predict(plan_asked(policy, update, evaluation, gradient))
            return result_of(prediction.plan, prediction)

    def measure(
        self, *, update: Rollouts | None = None, evaluation: Rollouts, gradient: Gradient | None = None
    ) -> ProbeResult:
        """The realized part of :meth:`run` only."""
        with self._opened() as policy:
            planned = plan_asked(policy, update, evaluation, gradient, shares=False)
            measured = measure_step(planned)
            return result_of(planned, measured=measured, coasted=measure_rest(planned, measured, come_to_rest(planned)))

    def ahead(
        self, *, gradient: Gradient, batch: Rollouts | None = None, evaluation: Rollouts | None = None
    ) -> StepAhead:
        """Predict a step right before the optimizer takes it; :meth:`StepAhead.taken` measures it right after.

        The parameters are what the optimizer writes to, so a step of ``float32`` ones is not rounded, whatever they
        hold, unless ``step_dtype`` names another type.

        Args:
            gradient: as the optimizer gets it, after clipping; its step is predicted as it is.
            batch: the rollouts it is of.
            evaluation: the batch the change is taken on; ``None`` for ``batch`` itself, as :meth:`one_batch`.

        Raises:
            ValueError: as :meth:`run` and :meth:`one_batch`.
        """
        parameters = optimizer_parameters(self._model, self._optimizer).values()
        wide = self._config.step_dtype == "auto" and not any(p.dtype in NARROW for p in parameters)
        with self._opened(**({"step_dtype": "float32"} if wide else {})) as policy:
            return look_ahead(policy, gradient, batch, evaluation)

    def attribute(
        self,
        *,
        update: Rollouts,
        evaluation: Rollouts | None = None,
        folds: Folds = None,
        measure: bool = False,
        questions: Mapping[str, Mapping[str, Any]] | None = None,
        pool: bool = False,
    ) -> Attribution:
        """Divide the prediction over the tokens, responses and prompts of ``update``, and over the model's layers.

        Beyond what :meth:`predict` costs: one forward-mode pass over the update batch, about two forward passes.

        Args:
            update: the batch the step is taken on.
            evaluation: the batch whose entropy is explained; by default ``update`` itself, as :meth:`one_batch` has it:
                of every prompt what it adds to the entropy of the others. Then without questions and pooling.
            folds: standard errors of the prompts' contributions from this many folds of the evaluation batch. Costs
                one more gradient over the evaluation batch, and one more over the update batch for each fold where
                its per-prompt gradients are not kept (``max_stored_gradient_gib``); ``auto`` takes 8 where they are.
            measure: also measure the change, as :meth:`run` does.
            questions: what else to ask of the prediction, as :meth:`run`.
            pool: as :meth:`run`.

        Raises:
            ValueError: as :meth:`run`, for an optimizer other than Adam, a sharded model, or unusable folds.
        """
        if is_sharded(self._model):
            raise ValueError("model: expected whole parameters to attribute to, got shards; load it on one device")
        check_divides(self._optimizer, self._config)
        asked = check_questions(questions or {})
        if evaluation is None and (asked or pool):
            raise ValueError("evaluation: expected rollouts beside questions or pool, got none; pass them")
        with self._opened() as policy:
            if evaluation is None:
                prediction = own = predict_own(policy, update)
                measured = measure_own(own) if measure else None
            else:
                prediction = predict(plan_asked(policy, update, evaluation, asked=asked, folds=folds))
                measured = measure_step(prediction.plan) if measure else None
            beside = {} if measured is None else measured_beside(prediction, measured)
            both = pooled(prediction, measured) if pool else None
            return attribute(prediction, folds, measured, answers=answer_all(prediction, asked), pooled=both, **beside)

    def validate(
        self,
        attribution: Attribution | Contributions,
        *,
        evaluation: Rollouts | None = None,
        subsets: int = 40,
        seed: int = 0,
        finished: Sequence[MeasuredStep] = (),
        on_step: Callable[[MeasuredStep], None] | None = None,
    ) -> Validation:
        """Take real steps on random halves of the attribution's prompts, and compare with their contributions.

        Each half costs one scoring of the evaluation batch, and a gradient over the half where the prompts' gradients
        are not kept (``max_stored_gradient_gib``).

        Args:
            attribution: of the update batch, by :meth:`attribute` of this probe, or what is taken of it.
            evaluation: the batch the changes are measured on; by default the update batch, less self-influence.
            subsets: how many different halves, at least 4; all there are where the prompts have fewer.
            seed: of the random halves.
            finished: steps of an interrupted validation with the same inputs, which are taken as they are.
            on_step: called with every other step as soon as it is there.

        Raises:
            ValueError: as :meth:`run`, or with fewer than 4 prompts or subsets. A step whose change cannot be measured
                is left out of the correlations, with a message.
        """
        given = attribution.contributions if isinstance(attribution, Attribution) else attribution
        with self._opened() as policy:
            return validate(policy, given, evaluation, subsets, seed, finished=finished, on_step=on_step)

    def sweep(
        self,
        *,
        update: Rollouts,
        evaluation: Rollouts | None = None,
        learning_rates: Sequence[float],
        direct_curvature: bool = False,
        finished: Sequence[SweepPoint] = (),
        on_point: Callable[[SweepPoint], None] | None = None,
    ) -> Sweep:
        """Measure the change at many learning rates, and say up to which of them the prediction describes it.

        Costs what :meth:`predict` costs, and for each rate one scoring of the evaluation batch. Steps are not rounded
        to the precision that training keeps its weights in, whatever ``step_dtype`` says.

        Args:
            update: the batch the step is taken on.
            evaluation: the batch the change is measured on; by default ``update``, as :meth:`one_batch`.
            learning_rates: at least two, in any order; each takes the place of ``config.learning_rate``.
            direct_curvature: also differentiate every score twice along the step, by nested forward mode, which costs
                several scorings of the evaluation batch.
            finished: points of an interrupted sweep with the same inputs, which are taken as they are.
            on_point: called with every other point as soon as it is there.

        Raises:
            ValueError: as :meth:`run`, or for unusable learning rates.
        """
        rates = check_learning_rates(learning_rates)
        check_finished(finished, rates)
        # rounded steps are not in proportion to the rate
        with self._opened(learning_rate=rates[-1], step_dtype="float32") as policy:
            own = evaluation is None
            prediction = predict_own(policy, update) if own else predict(plan_asked(policy, update, evaluation))
            return sweep(prediction, rates, direct_curvature=direct_curvature, finished=finished, on_point=on_point)

    def ask(self, question: str, *, update: Rollouts, evaluation: Rollouts, **settings: Any) -> SavedRecord:
        """The ``Answer`` to a question of the prediction, as ``without_prompts`` with ``prompts=[[3], [5, 8]]``.

        Args:
            question: a module of :mod:`entropy_probe.questions`.
            update: the batch the step is taken on.
            evaluation: the batch whose entropy is predicted.
            settings: of the question; see its ``Settings``.

        Raises:
            ValueError: as :meth:`run`, for an unknown question, or settings that do not fit.
        """
        asked = check_questions({question: settings})
        with self._opened() as policy:
            return answer_all(predict(plan_asked(policy, update, evaluation, asked=asked)), asked)[question]

    def one_batch(self, batch: Rollouts, *, geometry: Literal["adamw", "frozen"] | None = None) -> ProbeResult:
        """Predict the change of the next step on a batch, and measure it, from that batch alone.

        The step is fitted to the responses that it is judged on. So it is taken again without each prompt, and what
        the prompt did to it is left out of the prompt's own product with it. From the realized change the first-order
        influence of the responses on themselves is subtracted. ``predicted.standard_error`` is over batches of this
        kind, ``se_evaluation`` that of this step. In the frozen geometry this is :meth:`cross_prompt`, with H beside.

        Args:
            batch: the batch the step is taken on.
            geometry: in place of ``config.geometry``.

        Raises:
            ValueError: for unusable rollouts, or fewer than three distinct prompts.
        """
        with self._opened() as policy:
            if (geometry or policy.config.geometry) == "frozen":
                return one_batch(policy, batch)
            prediction = predict_own(policy, batch)
            measured = measure_own(prediction)
            return result_of(prediction.plan, prediction, measured, **measured_beside(prediction, measured))

    def take(self, batch: Rollouts, *, rate_factor: float = 1.0) -> float:
        """Step parameters and optimizer for good, as the trainer did; returns the gradient's norm before clipping.

        Args:
            batch: the batch the step was taken on.
            rate_factor: the step's learning rate, over those that the optimizer has now.

        Raises:
            ValueError: for unusable rollouts, or a gradient that is not finite.
        """
        with self._opened() as policy:
            gradient = batch_gradient(policy, batch)
        take_step(policy, gradient, rate_factor)
        self._shared["cache"] = ScoreCache()
        return gradient.norm

    def cross_prompt(self, batch: Rollouts) -> CrossPrompt:
        """Predict from one batch that is both update and evaluation, by the cross-prompt U-statistic.

        The geometry is the frozen one, whatever ``config.geometry`` says: no momentum, weight decay or clipping.

        Raises:
            ValueError: for unusable rollouts, fewer than three clusters, blocks that do not divide the prompts, a
                surprisal baseline without a group, or second moments that cover too little.
        """
        with self._opened() as policy:
            cross_prompt = one_batch(policy, batch).cross_prompt
        assert cross_prompt is not None
        return cross_prompt
