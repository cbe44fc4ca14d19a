"""The story, top to bottom: rollouts -> update gradient -> step -> first-order change -> realized change -> result."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from entropy_probe.config import ProbeConfig
from entropy_probe.estimators import first_order as fo
from entropy_probe.estimators.importance import sequence_importance_weights
from entropy_probe.estimators.realized import per_decision, snis
from entropy_probe.estimators.uncertainty import Sampled, Units
from entropy_probe.isolation import evaluating, parameters_at
from entropy_probe.losses import token_weights
from entropy_probe.moments import summarize_moments
from entropy_probe.named import add, norm
from entropy_probe.provenance import Clock, Phase, library_versions, peak_memory
from entropy_probe.results import (
    Diagnostics,
    Estimate,
    OptimizerStateReport,
    PreconditionerReport,
    Prediction,
    ProbeResult,
    Realized,
)
from entropy_probe.scoring.forward import Progress, Scorer
from entropy_probe.types import Rollouts, TokenCoefficients, TokenScores
from entropy_probe.updates.adamw import (
    ClippedGradient,
    adamw_step,
    check_optimizer,
    clip_gradient,
    learning_rates,
    optimizer_parameters,
    shadow_step,
)
from entropy_probe.updates.per_unit import Side, UnitGradients, tappable, unit_gradients
from entropy_probe.updates.preconditioner import frozen_preconditioner

__all__ = ["EntropyProbe"]

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


class EntropyProbe:
    """Predicts and measures the entropy change of the next optimizer step, and leaves no trace.

    Args:
        model: the policy at the checkpoint; called as ``model(input_ids=..., attention_mask=...)`` and returning an
            object with ``.logits``.
        optimizer: ``torch.optim.AdamW`` or ``Adam`` over the model's parameters, holding its state.
        config: the settings.
        mapping: how the optimizer's state was matched to parameters, for the report.
        progress: called as ``progress(phase, done, total)`` while the probe works.

    Raises:
        ValueError: if the optimizer is not supported or not the model's, every learning rate is 0, or the model's
            precision is below ``config.dtype``.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: ProbeConfig | None = None,
        *,
        mapping: str = "live optimizer",
        progress: Phase | None = None,
    ) -> None:
        self.model = model
        self.config = config or ProbeConfig()
        # accelerate wraps the optimizer it prepares
        self.optimizer: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
        check_optimizer(self.optimizer)
        self.parameters = optimizer_parameters(model, self.optimizer)
        self.learning_rates = learning_rates(self.optimizer, self.config.learning_rate)
        self.mapping = mapping
        self.progress = progress
        _check_dtype(model, self.config)

    def run(self, *, update: Rollouts, evaluation: Rollouts) -> ProbeResult:
        """Predict the change of the next step on ``update`` and measure it, both on ``evaluation``.

        Raises:
            ValueError: for unusable rollouts (too long, too few units, no advantages) or non-finite numbers.
        """
        return _Run(self, update, evaluation).result(predict=True, measure=True)

    def predict(self, *, update: Rollouts, evaluation: Rollouts) -> ProbeResult:
        """The first-order part of :meth:`run` only."""
        return _Run(self, update, evaluation).result(predict=True, measure=False)

    def measure(self, *, update: Rollouts, evaluation: Rollouts) -> ProbeResult:
        """The realized part of :meth:`run` only."""
        return _Run(self, update, evaluation).result(predict=False, measure=True)


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


class _Run:
    """One probe of one pair of batches; the methods are the chapters of the story, in order."""

    def __init__(self, probe: EntropyProbe, update: Rollouts, evaluation: Rollouts) -> None:
        self.model, self.optimizer, self.parameters = probe.model, probe.optimizer, probe.parameters
        self.learning_rates, self.mapping, self.config = probe.learning_rates, probe.mapping, probe.config
        self.update, self.evaluation = update, evaluation
        self.clock = Clock(probe.progress)
        self.messages: list[str] = []
        self.scorer = Scorer(self.model, self.config.temperature, self.config.max_tokens_per_microbatch)
        self.unit: Literal["sequence", "prompt"]
        self.unit, self.units = self._evaluation_units()
        self.prompts = Units.prompts(update.prompt_ids)

    def result(self, *, predict: bool, measure: bool) -> ProbeResult:
        """The whole story."""
        fields: dict[str, Any] = {}
        predicted: Sampled | None = None
        with evaluating(self.model):
            for batch in (self.update, self.evaluation):
                self.scorer.prepare(batch)
            with self.clock.phase("score evaluation") as progress:
                before = self.scorer.score(self.evaluation, progress)
            entropy = fo.entropy(before, self.units, self.config.normalization, self.config.entropy)
            untappable = tappable(self.scorer, self.parameters, self.update) if predict else "not needed"
            gradients = self._update_gradient(store=predict, taps=untappable is None)
            step = self._plan_step(gradients.total)
            if predict:
                predicted, fields = self._first_order(before, gradients, step, taps=untappable is None)
            if measure:
                fields |= self._realized(before, step, entropy, predicted)
            optimizer_state = self._optimizer_report()
        return ProbeResult(
            entropy=Estimate(**self._fields(entropy)),
            optimizer_state=optimizer_state,
            preconditioner=step.preconditioner,
            diagnostics=Diagnostics(
                evaluation_unit=self.unit,
                num_evaluation_sequences=len(self.evaluation),
                num_update_sequences=len(self.update),
                num_update_prompts=self.prompts.count,
                gradient_norm=step.gradient.norm,
                clip_factor=step.gradient.factor,
                step_norm=norm(step.delta),
                head=self.scorer.head_path,
                per_unit_gradients="linear-layer taps" if untappable is None else f"per unit ({untappable})",
                messages=tuple(self.messages),
            ),
            timing=self.clock.seconds,
            memory=peak_memory(self.scorer.device),
            config=self.config.model_dump(mode="json"),
            versions=library_versions(),
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
        elements = self.prompts.count * sum(p.numel() for p in self.parameters.values())
        fits = elements * 4 <= self.config.max_stored_gradient_gib * 2**30
        if store and not fits:
            self.messages.append(
                "per-prompt update gradients exceed max_stored_gradient_gib: the update batch is passed over twice"
            )
        with self.clock.phase("update gradient") as progress:
            side = Side(self._loss_coefficients(), store=store and fits)
            return self._differentiate(self.update, self.prompts, side, taps=taps and side.store, progress=progress)

    def _loss_coefficients(self) -> TokenCoefficients:
        """The loss at the sampling point is ``sum_it -omega_it A_it s_it``."""
        update, config = self.update, self.config
        omega = token_weights(update.response_mask, update.prompt_ids, config.loss_type, config.max_completion_length)
        return TokenCoefficients(-omega * update.token_advantages, None)

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
        frozen = frozen_preconditioner(
            self.parameters, self.optimizer, config.frozen_max_scale, config.frozen_min_coverage
        )
        if frozen.report.num_clamped or frozen.report.num_identity:
            self.messages.append(
                f"frozen preconditioner: {frozen.report.num_clamped} elements clamped to "
                f"{config.frozen_max_scale:g}, {frozen.report.num_identity} without a second moment"
            )
        groups = zip(self.optimizer.param_groups, self.learning_rates, strict=True)
        rates = {id(p): rate for group, rate in groups for p in group["params"]}
        scale = {name: frozen.scale[name] * rates[id(p)] for name, p in self.parameters.items()}
        return _PlannedStep(unclipped, {"gradient": _scaled(unclipped.values, scale, -1.0)}, scale, frozen.report)

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
        se_update = fo.update_standard_error(by_prompt)
        prediction = Prediction(
            **self._fields(predicted, se_update),
            se_evaluation=predicted.standard_error,
            se_update=se_update,
        )
        components = {name: Estimate(**self._fields(part)) for name, part in parts.items()}
        components["gradient"] = Estimate(**self._fields(parts["gradient"], se_update))
        contributions = tuple((predicted.value + predicted.influence).tolist())
        return predicted, {"predicted": prediction, "components": components, "contributions": contributions}

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
            **self._fields(change),
            status="low_ess" if low else "ok",
            estimator=config.realized,
            ess=weights.ess,
            ess_fraction=weights.ess_fraction,
            max_weight=weights.max_weight,
        )
        if predicted is None:
            return {"realized": realized}
        return {"realized": realized, "difference": Estimate(**self._fields(change.minus(predicted, entropy)))}

    def _stepped_parameters(self, step: _PlannedStep) -> dict[str, Tensor]:
        """The parameters after the step: the optimizer's own kernel on copies, or the frozen move."""
        delta = step.delta
        if self.config.geometry == "frozen":
            return {name: (p.detach() + delta[name]).to(p.dtype) for name, p in self.parameters.items()}
        stepped = shadow_step(self.parameters, self.optimizer, step.gradient.values, self.config.learning_rate)
        for name, p in self.parameters.items():
            rounding = 4 * torch.finfo(p.dtype).eps
            slack = rounding * p.detach().abs() + 1e-4 * delta[name].abs().max()
            if bool(((stepped[name] - p.detach() - delta[name]).abs() > slack).any()):
                raise RuntimeError(f"{name}: the optimizer's own step and its closed form disagree; please report this")
        return stepped

    def _fields(self, sampled: Sampled, se_update: float = 0.0) -> dict[str, Any]:
        """What every estimate over evaluation units has, with the update batch's error added in quadrature."""
        return {
            "value": sampled.value,
            "standard_error": math.hypot(sampled.standard_error, se_update),
            "num_units": self.units.count,
            "unit": "nats/token" if self.config.normalization == "token" else "nats/sequence",
        }

    def _optimizer_report(self) -> OptimizerStateReport:
        """What the moments cover, with a message where they leave something open."""
        group = {id(p): g for g in self.optimizer.param_groups for p in g["params"]}
        entries = ((p.numel(), self.optimizer.state.get(p, {}), group[id(p)]) for p in self.parameters.values())
        report = summarize_moments(entries, self.mapping, self.learning_rates)
        if report.coverage < 1:
            self.messages.append(
                f"{1 - report.coverage:.1%} of the trained elements have no usable second moment: for those this is "
                "Adam's first step"
            )
        return report


def _check_dtype(model: nn.Module, config: ProbeConfig) -> None:
    wanted = _DTYPES[config.dtype]
    for name, parameter in model.named_parameters():
        dtype = parameter.dtype
        if dtype.is_floating_point and torch.promote_types(dtype, wanted) != dtype:
            raise ValueError(
                f"model: expected parameters of at least {config.dtype}, got {dtype} in {name}; convert the model "
                "(model.float()) or lower ProbeConfig.dtype, knowing that low-precision log-probabilities are "
                "quantised more coarsely than one step changes them"
            )


def _is_grouped(prompt_ids: Tensor) -> bool:
    """Whether the batch is distinct prompts with a group of one size, at least 2, in consecutive rows each."""
    size = int((prompt_ids == prompt_ids[0]).long().cumprod(0).sum())
    if size < 2 or len(prompt_ids) % size:
        return False
    blocks = prompt_ids.view(-1, size)
    return bool((blocks == blocks[:, :1]).all()) and len(blocks) == prompt_ids.unique().numel()


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
