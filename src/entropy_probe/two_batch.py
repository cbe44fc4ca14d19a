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
from entropy_probe.estimators.realized import noise_floor
from entropy_probe.estimators.uncertainty import Sampled, Units
from entropy_probe.isolation import parameters_at
from entropy_probe.losses import loss_coefficients
from entropy_probe.measurement import measure_change
from entropy_probe.named import add, norm
from entropy_probe.results import Estimate, PreconditionerReport, Prediction, ProbeResult
from entropy_probe.scoring.forward import Progress
from entropy_probe.session import Session, Subject
from entropy_probe.types import Rollouts, TokenCoefficients, TokenScores
from entropy_probe.updates.adamw import ClippedGradient, adamw_step, clip_gradient, shadow_step
from entropy_probe.updates.per_unit import Side, UnitGradients, unit_gradients

__all__ = ["TwoBatch"]


@dataclass(frozen=True, eq=False)
class _PlannedStep:
    """The next step: its parts, and how it depends on the update gradient."""

    gradient: ClippedGradient
    components: dict[str, dict[str, Tensor]]
    gradient_scale: dict[str, Tensor]
    preconditioner: PreconditionerReport | None = None

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
        self.same_batch = torch.equal(update.input_ids, evaluation.input_ids)
        if self.same_batch:
            self.messages.append(
                "update and evaluation are the same sequences: the step is fitted to the responses that it is judged "
                "on, so predicted and realized changes are biased by what they share; cross_prompt predicts without "
                "that bias, and other evaluation rollouts measure without it"
            )
        self.prompts = Units.prompts(update.prompt_ids)

    def result(self, *, predict: bool, measure: bool) -> ProbeResult:
        """The whole story."""
        fields: dict[str, Any] = {}
        predicted: Sampled | None = None
        with self.isolated():
            self.scorer.prepare(self.update, self.evaluation)
            before = self.reference_scores(self.evaluation, "score evaluation")
            self.check_sampler(before, self.evaluation)
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
        """The loss gradient of the whole step, with each prompt's share if it is wanted and fits."""
        size = self.prompts.count * sum(p.numel() * p.element_size() for p in self.parameters.values())
        fits = size <= self.config.max_stored_gradient_gib * 2**30
        if store and not fits:
            self.messages.append(
                "per-prompt update gradients exceed max_stored_gradient_gib: the update batch is passed over twice"
            )
        with self.clock.phase("update gradient") as progress:
            side = Side(self._loss_coefficients(), store=store and fits)
            return self._differentiate(self.update, self.prompts, side, taps=taps and side.store, progress=progress)

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
        parts = {name: fo.first_order(entropy_side.dots[k], weights) for k, name in enumerate(step.components)}
        by_prompt = self._by_update_prompt(gradients, entropy_side, weights.sum().item(), step, taps=taps)
        _check_sums(by_prompt, parts["gradient"].value)
        self._note_what_the_update_error_holds_fixed(step)
        se_update = fo.update_standard_error(by_prompt)
        prediction = Prediction(
            **self.estimate_fields(predicted, self.units, se_update),
            se_evaluation=predicted.standard_error,
            se_update=se_update,
        )
        components = {name: Estimate(**self.estimate_fields(part, self.units)) for name, part in parts.items()}
        components["gradient"] = Estimate(**self.estimate_fields(parts["gradient"], self.units, se_update))
        contributions = tuple((predicted.value + predicted.influence).tolist())
        return predicted, {"predicted": prediction, "components": components, "contributions": contributions}

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
        *,
        taps: bool,
    ) -> Tensor:
        """What each update prompt adds to the gradient part of the prediction, ``[B]``."""
        direction = _scaled(entropy_side.total, step.gradient_scale, -step.gradient.factor / total_weight)
        with self.clock.phase("update error") as progress:
            if gradients.stored is not None:
                return gradients.dot_stored(direction)
            side = Side(self._loss_coefficients(), directions=[direction])
            return self._differentiate(self.update, self.prompts, side, taps=taps, progress=progress).dots[0]

    def _realized(
        self, before: TokenScores, step: _PlannedStep, entropy: Sampled, predicted: Sampled | None
    ) -> dict[str, Any]:
        """Score the evaluation batch after the step, and the result fields that report the change."""
        floor = self._noise_floor(before)
        with parameters_at(self.parameters, self._stepped_parameters(step)):
            with self.clock.phase("score after step") as progress:
                after = self.scorer.score(self.evaluation, progress)
            measured = measure_change(before, after, self.units, self.config, self._score_fresh)
        if measured.note:
            self.messages.append(measured.note)
        realized = measured.report(self.units, self.unit, floor, "update" if self.same_batch else "evaluation")
        fields: dict[str, Any] = {"realized": realized}
        if predicted is not None and measured.change is not None:
            gap = measured.change.minus(predicted, entropy)
            fields["difference"] = Estimate(**self.estimate_fields(gap, self.units))
        return fields

    def _score_fresh(self) -> TokenScores:
        """Scores of fresh responses to the evaluation prompts, sampled and scored at the policy as it is."""
        resample = self.subject.resample
        assert resample is not None
        with self.clock.phase("resample"):
            fresh = resample(self.evaluation).cpu()
        if not torch.equal(fresh.prompt_ids, self.evaluation.prompt_ids):
            raise ValueError(
                f"resample: expected a response to each of the {len(self.evaluation)} evaluation prompts, in the same "
                f"order, got {len(fresh)} for others"
            )
        self.scorer.check_fits(fresh)
        with self.clock.phase("score resampled") as progress:
            return self.scorer.score(fresh, progress)

    def _noise_floor(self, before: TokenScores) -> float | None:
        """What rounding alone does to the realized change, seen on some of the sequences.

        They are scored again in another layout, with every trained parameter rounded differently: moved by a unit in
        its last place with probability 1/12, which has the variance of a rounding error.
        """
        config = self.config
        if not config.measure_noise_floor:
            return None
        count = len(self.evaluation)
        rows = torch.linspace(0, count - 1, min(count, NOISE_SEQUENCES)).long()
        few, units = self.evaluation.select(rows), Units.sequences(len(rows))
        plain = config.model_copy(update={"is_mode": "snis", "on_low_ess": "refuse"})
        spurious = []
        with self.clock.phase("noise floor"):
            for draw in range(NOISE_DRAWS):
                with parameters_at(self.parameters, self._rounded_differently(draw)):
                    again = self.scorer.score_again(few)
                change = measure_change(before.select(rows), again, units, plain).change
                if change is None:
                    raise ValueError(
                        "noise floor: expected log-probabilities that rounding leaves alone, got a change that "
                        "importance sampling cannot bridge; compute in a higher precision"
                    )
                spurious.append(change)
        return noise_floor(spurious, count)

    def _rounded_differently(self, seed: int) -> dict[str, Tensor]:
        nudged = {}
        for name, p in self.parameters.items():
            eps = torch.finfo(torch.bfloat16 if self.config.autocast == "bfloat16" else p.dtype).eps
            source = torch.Generator(p.device).manual_seed(seed)
            draw = torch.rand(p.shape, generator=source, device=p.device)
            sign = (draw < 1 / 24).to(p.dtype) - (draw > 23 / 24).to(p.dtype)
            nudged[name] = p.detach() * (1 + eps * sign)
        return nudged

    def _stepped_parameters(self, step: _PlannedStep) -> dict[str, Tensor]:
        """The parameters after the step: the optimizer's own kernel on copies, or the frozen move."""
        delta = step.delta
        if self.config.geometry == "frozen":
            return {name: (p.detach() + delta[name]).to(p.dtype) for name, p in self.parameters.items()}
        stepped = shadow_step(self.parameters, self.optimizer, step.gradient.values, self.config.learning_rate)
        lost: dict[str, Tensor] = {}
        for name, p in self.parameters.items():
            eps = torch.finfo(p.dtype).eps
            slack = 4 * eps * p.detach().abs() + max(1e-4, 16 * eps) * delta[name].abs().max()
            lost[name] = stepped[name] - p.detach() - delta[name]
            if bool((lost[name].abs() > slack).any()):
                raise RuntimeError(f"{name}: the optimizer's own step and its closed form disagree; please report this")
        share = norm(lost) / (norm(delta) or 1.0)
        if share > NOTABLE_ROUNDING:
            self.messages.append(
                f"rounding to the parameters' precision changes the step by {share:.1%} of its length: the realized "
                "change is that of the rounded step, as it is in training; use dtype float64 or a larger learning rate "
                "to compare it with the prediction"
            )
        return stepped


NOISE_SEQUENCES, NOISE_DRAWS = 8, 3
"""Enough for the size of rounding errors; more would cost time."""
NOTABLE_ROUNDING = 0.01
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


def _check_sums(by_prompt: Tensor, gradient_part: float) -> None:
    """The gradient part, summed over evaluation units, must equal its sum over update prompts."""
    error = abs(by_prompt.sum().item() - gradient_part)
    if error > 1e-3 * by_prompt.abs().sum().item() + 1e-12:
        raise RuntimeError(
            f"gradient part: {gradient_part:.6g} summed over evaluation units but {by_prompt.sum().item():.6g} summed "
            "over update prompts; please report this"
        )
