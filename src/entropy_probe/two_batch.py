"""Two batches: predict and measure the entropy change of a step taken on one batch, on another.

The story, top to bottom: score -> update gradient -> step -> first-order change -> realized change -> result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from entropy_probe.estimators import first_order as fo
from entropy_probe.estimators.importance import sequence_importance_weights
from entropy_probe.estimators.jackknife import blocks_of, jackknife_standard_error
from entropy_probe.estimators.realized import per_decision, snis
from entropy_probe.estimators.uncertainty import Sampled, Units
from entropy_probe.isolation import evaluating, parameters_at
from entropy_probe.losses import loss_coefficients
from entropy_probe.named import add, dot, norm
from entropy_probe.results import Estimate, PreconditionerReport, Prediction, ProbeResult, Realized
from entropy_probe.scoring.forward import Progress
from entropy_probe.session import Session, Subject
from entropy_probe.types import Rollouts, TokenCoefficients, TokenScores
from entropy_probe.updates.adamw import ClippedGradient, adamw_step, clip_gradient, is_adam, shadow_step
from entropy_probe.updates.leave_out import reduced_gradients, renormalisation
from entropy_probe.updates.per_unit import Side, UnitGradients, unit_gradients
from entropy_probe.updates.shadow import check_repeatable, copied_step, moved, optimizer_name

__all__ = ["TwoBatch"]


@dataclass(frozen=True, eq=False)
class _PlannedStep:
    """The next step: its parts, and how it depends on the update gradient.

    Without a closed form there is one part, no ``gradient_scale``, and ``stepped`` holds the parameters after the step.
    """

    gradient: ClippedGradient
    components: dict[str, dict[str, Tensor]]
    gradient_scale: dict[str, Tensor] | None
    preconditioner: PreconditionerReport | None = None
    stepped: dict[str, Tensor] | None = None

    @property
    def delta(self) -> dict[str, Tensor]:
        return add(*self.components.values())


class TwoBatch(Session):
    """One probe of an update and an evaluation batch; the methods are the chapters of the story, in order."""

    def __init__(self, subject: Subject, update: Rollouts, evaluation: Rollouts) -> None:
        super().__init__(subject)
        update, evaluation = update.cpu(), evaluation.cpu()
        self.update, self.evaluation = update, evaluation
        self.unit_name: Literal["sequence", "prompt"]
        self.unit_name, self.units = self._evaluation_units()
        if torch.equal(update.input_ids, evaluation.input_ids):
            self.messages.append(
                "update and evaluation are the same sequences: predicted and realized changes are biased by what they "
                "share; give other evaluation rollouts, or use cross_prompt"
            )
        self.prompts = Units.prompts(update.prompt_ids)
        self.closed_form = self.config.geometry == "frozen" or is_adam(self.optimizer)
        self.shares = self.prompts if self.closed_form else blocks_of(self.prompts)

    def result(self, *, predict: bool, measure: bool) -> ProbeResult:
        """The whole story."""
        fields: dict[str, Any] = {}
        predicted: Sampled | None = None
        with evaluating(self.subject.model):
            self.scorer.prepare(self.update, self.evaluation)
            with self.clock.phase("score evaluation") as progress:
                before = self.scorer.score(self.evaluation, progress)
            self._note_mismatch(before)
            entropy = fo.entropy(before, self.units, self.config.normalization, self.config.entropy)
            taps = predict and self.choose_taps(self.update)
            gradients = self._update_gradient(store=predict, taps=taps)
            step = self._plan_step(gradients.total)
            if predict:
                predicted, fields = self._first_order(before, gradients, step, taps=taps)
            if measure:
                fields |= self._realized(before, step, entropy, predicted)
        return self.assemble(
            entropy,
            self.units,
            self.evaluation,
            self.update,
            {"gradient_norm": step.gradient.norm, "clip_factor": step.gradient.factor, "step_norm": norm(step.delta)},
            unit=self.unit_name,
            preconditioner=step.preconditioner,
            **fields,
        )

    def _note_mismatch(self, scores: TokenScores) -> None:
        """Say so if the sampler's log-probabilities are not those of the policy: another temperature, say."""
        sampled = self.evaluation.sampled_logprobs
        if sampled is None:
            return
        gap = (sampled.double() - scores.logprobs.double())[scores.response_mask].abs().mean().item()
        if gap > LARGEST_MISMATCH:
            self.messages.append(
                f"sampled_logprobs of the evaluation batch differ from the policy's by {gap:.3g} nats per token on "
                "average: the batch was sampled from another policy (weights, temperature or top_p), so results "
                "are biased"
            )

    def _evaluation_units(self) -> tuple[Literal["sequence", "prompt"], Units]:
        ids = self.evaluation.prompt_ids
        unit = self.config.evaluation_unit
        if unit == "auto":
            unit = "prompt" if _is_grouped(ids) else "sequence"
            if unit == "sequence" and self.evaluation.num_prompts < len(ids):
                self.messages.append(
                    "evaluation prompts repeat and are taken as drawn with replacement: every sequence counts as "
                    "independent (set evaluation_unit to change this)"
                )
        return unit, Units.sequences(len(ids)) if unit == "sequence" else Units.prompts(ids)

    def _update_gradient(self, *, store: bool, taps: bool) -> UnitGradients:
        """The loss gradient of the whole step, with the share of each prompt (or block) if it is wanted and fits."""
        size = self.shares.count * sum(p.numel() * p.element_size() for p in self.parameters.values())
        fits = size <= self.config.max_stored_gradient_gib * 2**30
        if store and not fits:
            self.messages.append(
                "per-prompt update gradients exceed max_stored_gradient_gib: the update batch is passed over twice"
            )
        with self.clock.phase("update gradient") as progress:
            side = Side(self._loss_coefficients(), store=store and fits)
            return self._differentiate(self.update, self.shares, side, taps=taps and side.store, progress=progress)

    def _loss_coefficients(self) -> TokenCoefficients:
        return loss_coefficients(self.update, self.config.loss_type, self.config.max_completion_length)

    def _differentiate(
        self, batch: Rollouts, units: Units, side: Side, *, taps: bool, progress: Progress
    ) -> UnitGradients:
        (found,) = unit_gradients(
            self.scorer, self.parameters, batch, units.index, [side], taps=taps, progress=progress
        )
        return found

    def _plan_step(self, gradient: dict[str, Tensor | None]) -> _PlannedStep:
        """The step that the optimizer would take with this loss gradient, in the configured geometry."""
        config = self.config
        if not self.closed_form:
            clipped = clip_gradient(gradient, config.max_grad_norm)
            given = (self.parameters, self.optimizer, clipped.values)
            stepped = copied_step(*given, config.learning_rate)
            check_repeatable(*given, stepped, config.learning_rate)
            return _PlannedStep(clipped, {"step": moved(self.parameters, stepped)}, None, stepped=stepped)
        if config.geometry == "adamw":
            clipped = clip_gradient(gradient, config.max_grad_norm)
            step = adamw_step(self.parameters, self.optimizer, clipped.values, config.learning_rate)
            return _PlannedStep(clipped, step.components, step.gradient_scale)
        unclipped = clip_gradient(gradient, None)
        scale, report = self.frozen_scale()
        return _PlannedStep(unclipped, {"gradient": _scaled(unclipped.values, scale, -1.0)}, scale, report)

    def _first_order(
        self, before: TokenScores, gradients: UnitGradients, step: _PlannedStep, *, taps: bool
    ) -> tuple[Sampled, dict[str, Any]]:
        """The prediction with its components, and the result fields that report it."""
        config, evaluation = self.config, self.evaluation
        surrogate = fo.entropy_coefficients(
            before, evaluation.prompt_ids, self.units, config.normalization, config.entropy
        )
        with self.clock.phase("evaluation gradient") as progress:
            side = Side(surrogate, directions=list(step.components.values()))
            entropy_side = self._differentiate(evaluation, self.units, side, taps=taps, progress=progress)
        weights = self.units.total(fo.sequence_weights(before, config.normalization))
        predicted = fo.first_order(entropy_side.dots.sum(0), weights)
        if step.gradient_scale is None:
            se_update, components = self._jackknife(gradients, entropy_side, weights.sum().item(), step), {}
        else:
            parts = {name: fo.first_order(entropy_side.dots[k], weights) for k, name in enumerate(step.components)}
            by_prompt = self._by_update_prompt(
                gradients, entropy_side, weights.sum().item(), step, step.gradient_scale, taps=taps
            )
            coarsest = max(torch.finfo(p.dtype).eps for p in self.parameters.values())
            _check_sums(by_prompt, parts["gradient"].value, max(1e-3, 8 * coarsest))
            self._note_what_the_update_error_holds_fixed(step)
            se_update = fo.update_standard_error(by_prompt)
            components = {name: Estimate(**self.estimate_fields(part, self.units)) for name, part in parts.items()}
            components["gradient"] = Estimate(**self.estimate_fields(parts["gradient"], self.units, se_update))
        prediction = Prediction(
            **self.estimate_fields(predicted, self.units, se_update),
            se_evaluation=predicted.standard_error,
            se_update=se_update,
            se_update_method="linear" if self.closed_form else "jackknife",
        )
        contributions = tuple((predicted.value + predicted.influence).tolist())
        return predicted, {"predicted": prediction, "components": components, "contributions": contributions}

    def _jackknife(
        self, gradients: UnitGradients, entropy_side: UnitGradients, total_weight: float, step: _PlannedStep
    ) -> float:
        """The error from the update batch of a step that is taken on copies: leave out a block, step again."""
        config, blocks, update = self.config, self.shares, self.update
        self.messages.append(
            f"{optimizer_name(self.optimizer)}: its own code takes the step on copies, so the prediction has no "
            f"components, and se_update is a jackknife over {blocks.count} blocks of update prompts (too large for "
            "steps that are not smooth in the gradient, such as signs or Muon's)"
        )
        factors = renormalisation(update, blocks.index, config.loss_type, config.max_completion_length)
        loss = self._loss_coefficients()
        direction = {
            name: torch.zeros_like(p) if (x := entropy_side.total[name]) is None else x / total_weight
            for name, p in step.delta.items()
        }
        left_out = []
        with self.clock.phase("update error") as progress:
            for reduced in reduced_gradients(
                self.scorer, self.parameters, update, blocks.index, loss, gradients, factors
            ):
                clipped = clip_gradient(reduced, config.max_grad_norm).values
                stepped = copied_step(self.parameters, self.optimizer, clipped, config.learning_rate)
                left_out.append(dot(direction, moved(self.parameters, stepped)))
                progress(len(left_out), blocks.count)
        sizes = torch.stack([self.prompts.index, blocks.index], 1).unique(dim=0)[:, 1].bincount()
        return jackknife_standard_error(dot(direction, step.delta), torch.tensor(left_out, dtype=torch.float64), sizes)

    def _note_what_the_update_error_holds_fixed(self, step: _PlannedStep) -> None:
        if self.config.geometry == "adamw" and any(not self.optimizer.state.get(p) for p in self.parameters.values()):
            self.messages.append(
                "se_update holds Adam's denominators fixed, but for parameters without a history the update batch "
                "itself sets them: the error from the update batch is overstated"
            )
        if step.gradient.factor < 1:
            self.messages.append(
                f"clipping scales the update gradient by {step.gradient.factor:.3g}; se_update holds that factor "
                "fixed, which overstates the error from the update batch when the factor is small"
            )

    def _by_update_prompt(
        self,
        gradients: UnitGradients,
        entropy_side: UnitGradients,
        total_weight: float,
        step: _PlannedStep,
        gradient_scale: dict[str, Tensor],
        *,
        taps: bool,
    ) -> Tensor:
        """What each update prompt adds to the gradient part of the prediction, ``[B]``."""
        direction = _scaled(entropy_side.total, gradient_scale, -step.gradient.factor / total_weight)
        with self.clock.phase("update error") as progress:
            if gradients.stored is not None:
                return gradients.dot_stored(direction)
            side = Side(self._loss_coefficients(), directions=[direction])
            return self._differentiate(self.update, self.prompts, side, taps=taps, progress=progress).dots[0]

    def _realized(
        self, before: TokenScores, step: _PlannedStep, entropy: Sampled, predicted: Sampled | None
    ) -> dict[str, Any]:
        """Score the evaluation batch after the step, and the result fields that report the change."""
        config = self.config
        with (
            self.clock.phase("score after step") as progress,
            parameters_at(self.parameters, self._stepped_parameters(step)),
        ):
            after = self.scorer.score(self.evaluation, progress)
        if config.realized == "per_decision":
            change = per_decision(before, after, self.units, config.normalization)
        else:
            change = snis(before, after, self.units, config.normalization, config.entropy)
        weights = sequence_importance_weights(before, after)
        low = weights.ess_fraction < config.min_ess_fraction
        if low:
            self.messages.append(
                f"the step moves the policy too far for these rollouts: effective sample size {weights.ess:.0f} of "
                f"{len(self.evaluation)}"
            )
        realized = Realized(
            **self.estimate_fields(change, self.units),
            status="low_ess" if low else "ok",
            estimator=config.realized,
            ess=weights.ess,
            ess_fraction=weights.ess_fraction,
            max_weight=weights.max_weight,
        )
        if predicted is None:
            return {"realized": realized}
        return {
            "realized": realized,
            "difference": Estimate(
                **self.estimate_fields(change.minus(predicted, entropy), self.units), status=realized.status
            ),
        }

    def _stepped_parameters(self, step: _PlannedStep) -> dict[str, Tensor]:
        """The parameters after the step: the optimizer's own kernel on copies, or the frozen move."""
        delta = step.delta
        if step.stepped is not None:
            return step.stepped
        if self.config.geometry == "frozen":
            return {name: (p.detach() + delta[name]).to(p.dtype) for name, p in self.parameters.items()}
        stepped = shadow_step(self.parameters, self.optimizer, step.gradient.values, self.config.learning_rate)
        for name, p in self.parameters.items():
            eps = torch.finfo(p.dtype).eps
            slack = 4 * eps * p.detach().abs() + max(1e-4, 16 * eps) * delta[name].abs().max()
            if bool(((stepped[name] - p.detach() - delta[name]).abs() > slack).any()):
                raise RuntimeError(f"{name}: the optimizer's own step and its closed form disagree; please report this")
        return stepped


LARGEST_MISMATCH = 0.05
"""Nats per token; engines in bfloat16 differ by about a tenth of this."""
LEAST_PROMPTS = 8
"""Draws with replacement give this many prompts equally often once in thousands of batches."""


def _is_grouped(prompt_ids: Tensor) -> bool:
    """Whether every prompt has the same number of responses, at least 2.

    With few prompts that can happen by chance under sampling with replacement; then only consecutive rows count.
    """
    prompts, counts = prompt_ids.unique(return_counts=True)
    size = int(counts[0])
    if size < 2 or not bool((counts == size).all()):
        return False
    blocks = prompt_ids.view(-1, size)
    return len(prompts) >= LEAST_PROMPTS or bool((blocks == blocks[:, :1]).all())


def _scaled(vector: Mapping[str, Tensor | None], scale: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    """``factor * scale * vector`` element by element; 0 for parameters the loss does not reach."""
    return {name: torch.zeros_like(s) if (x := vector[name]) is None else factor * s * x for name, s in scale.items()}


def _check_sums(by_prompt: Tensor, gradient_part: float, tolerance: float) -> None:
    """The gradient part, summed over evaluation units, must equal its sum over update prompts."""
    error = abs(by_prompt.sum().item() - gradient_part)
    if error > tolerance * by_prompt.abs().sum().item() + 1e-12:
        raise RuntimeError(
            f"gradient part: {gradient_part:.6g} summed over evaluation units but {by_prompt.sum().item():.6g} summed "
            "over update prompts; please report this"
        )
