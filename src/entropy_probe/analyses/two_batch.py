"""Two batches: predict and measure the entropy change of a step taken on one batch, on another.

The story, top to bottom: score -> update gradient -> step -> first-order change -> realized change -> result.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from entropy_probe.analyses.admission import SAME_BATCH, UnitName, draws_of, evaluation_units, in_groups
from entropy_probe.analyses.before import Before, LengthSample, entropy_coefficients
from entropy_probe.analyses.measure import STEP_ROUNDED, Measurement, measure_change
from entropy_probe.analyses.noise import measured_noise_floor
from entropy_probe.analyses.not_modelled import of_frozen_geometry, of_rounding
from entropy_probe.analyses.session import Session, Subject
from entropy_probe.estimators import first_order as fo
from entropy_probe.estimators.baselines import PositionSums
from entropy_probe.estimators.jackknife import blocks_of, jackknife_standard_error
from entropy_probe.estimators.uncertainty import Sampled
from entropy_probe.gradients.hooks import Taps
from entropy_probe.gradients.leave_out import reduced_gradients, renormalisation
from entropy_probe.gradients.per_sample import Side, UnitGradients, stored_bytes, unit_gradients
from entropy_probe.losses import loss_coefficients
from entropy_probe.named import dot, norm
from entropy_probe.parallel.batch import Part, add_up
from entropy_probe.results.note import NOTHING_TO_DO, NoteKind
from entropy_probe.results.probe import Estimate, Prediction, ProbeResult, Realized
from entropy_probe.rollouts.batch import Rollouts
from entropy_probe.scoring.forward import Progress
from entropy_probe.scoring.isolation import parameters_at
from entropy_probe.scoring.sheet import ScoreSheet
from entropy_probe.steps.adamw import clip_gradient, is_adam
from entropy_probe.steps.copied import STEP_ON_COPIES, copied_step, moved, optimizer_name
from entropy_probe.steps.plan import PlannedStep, plan_step, scaled, stepped_parameters
from entropy_probe.types import TokenCoefficients, TokenScores, Units

__all__ = ["TwoBatch"]

PASSED_OVER_TWICE = NoteKind(
    "passed_over_twice",
    "per-prompt update gradients exceed max_stored_gradient_gib: the update batch is passed over twice",
    f"{NOTHING_TO_DO} Raise probe.max_stored_gradient_gib to pass over the batch once.",
)
NO_HISTORY = NoteKind(
    "no_history",
    "se_update holds Adam's denominators fixed, but for parameters without a history the update batch itself sets "
    "them: the error from the update batch is overstated",
    "Trust the error from the evaluation rollouts; probe a checkpoint some steps later for both.",
)
CLIPPED = NoteKind(
    "clipped",
    "clipping scales the update gradient by {factor:.3g}; se_update holds that factor fixed, which overstates the "
    "error from the update batch when the factor is small",
    "Compare with probe.max_grad_norm: null to see what clipping does.",
)


@dataclass(frozen=True, eq=False)
class Start:
    """What is known before anything is measured after the step.

    Attributes:
        before: the evaluation batch at the checkpoint.
        step: the next step.
        predicted: the first-order change; ``None`` unless asked for.
        fields: the result fields that report it.
    """

    before: Before
    step: PlannedStep
    predicted: fo.FirstOrder | None
    fields: dict[str, Any]


class TwoBatch(Session):
    """One probe of an update and an evaluation batch; the methods are the chapters of the story, in order."""

    def __init__(self, subject: Subject, update: Rollouts, evaluation: Rollouts) -> None:
        super().__init__(subject)
        self.given_update, evaluation = update.cpu(), evaluation.cpu()
        self.same_batch = torch.equal(self.given_update.input_ids, evaluation.input_ids)
        update = self.update = self.admit(self.given_update, "update")
        given, evaluation = evaluation, self.admit(evaluation, "batch" if self.same_batch else "evaluation")
        grouped = in_groups(given) or in_groups(evaluation)
        answered = evaluation.response_mask.any(1)
        evaluation = self.evaluation = evaluation if bool(answered.all()) else evaluation.select(answered)
        self.draws = draws_of(evaluation)
        self.unit_name: UnitName
        self.unit_name, self.units, notes = evaluation_units(evaluation, self.config.evaluation_unit, grouped=grouped)
        self.notes += notes
        if self.same_batch:
            self.notes.append(SAME_BATCH())
        self.prompts = Units.prompts(update.prompt_ids)
        self.closed_form = self.config.geometry == "frozen" or is_adam(self.optimizer)
        self.shares = self.prompts if self.closed_form else blocks_of(self.prompts)
        self.check_ranks_agree(update=update, evaluation=evaluation)
        self.part = Part.of(evaluation, Units.prompts(evaluation.prompt_ids), self.units, self.ranks)
        self.update_part = Part.of(update, self.shares, self.shares, self.ranks)
        self.own_evaluation, self.own_update = self.part.select(evaluation), self.update_part.select(update)

    def result(self, *, predict: bool, measure: bool) -> ProbeResult:
        """The whole story."""
        with self.isolated():
            start = self._start(predict=predict)
            fields = self._realized(start) if measure else {}
        return self._finish(start, **fields)

    def _start(self, *, predict: bool) -> Start:
        """Everything up to the prediction."""
        fields: dict[str, Any] = {}
        predicted: fo.FirstOrder | None = None
        self.prepare(self.update, self.evaluation)
        before = self._before()
        taps = self.choose_taps(self.update) if predict else None
        gradients = self._update_gradient(store=predict, taps=taps)
        step = plan_step(self.parameters, self.optimizer, gradients.total, self.config, self.frozen_scale)
        trained = (self.parameters, self.optimizer)
        self.not_modelled += of_rounding(*trained, step.delta)
        if self.config.geometry == "frozen":
            self.not_modelled += of_frozen_geometry(*trained, step.gradient.norm, self.config.max_grad_norm)
        if predict:
            predicted, fields = self._first_order(before, gradients, step, taps=taps)
        return Start(before, step, predicted, fields)

    def _before(self) -> Before:
        scores = self.reference_scores(self.evaluation, self.part, "score evaluation")
        scores = self.check_rollouts("batch" if self.same_batch else "evaluation", scores, self.part, self.evaluation)
        positions = add_up(self.ranks, PositionSums.of(scores))
        own = fo.entropy(scores, self.part.units, self.config.normalization, self.config.entropy)
        sums = add_up(self.ranks, own)
        whole, per_token = (self.evaluation, self.units), self.config.normalization == "token"
        lengths = LengthSample.of(*whole, self.part, scores, positions) if per_token else None
        return Before(scores, positions, sums, sums.ratio(), lengths)

    def _finish(self, start: Start, **fields: Any) -> ProbeResult:
        """The result with these fields beside those of the prediction."""
        step = start.step
        return self.assemble(
            start.before.entropy,
            self.units,
            self.evaluation,
            self.update,
            {"gradient_norm": step.gradient.norm, "clip_factor": step.gradient.factor, "step_norm": norm(step.delta)},
            unit=self.unit_name,
            preconditioner=step.preconditioner,
            **start.fields,
            **fields,
        )

    def _update_gradient(self, *, store: bool, taps: Taps | None) -> UnitGradients:
        """The loss gradient of the whole step, with the share of each prompt (or block) if it is wanted and fits."""
        fits = stored_bytes(self.parameters, self.shares.count) <= self.config.max_stored_gradient_gib * 2**30
        if store and not fits:
            self.notes.append(PASSED_OVER_TWICE())
        with self.clock.phase("update gradient") as progress:
            side, sheet = Side(self._loss_coefficients(), store=store and fits), self._sheet()
            given = (self.own_update, self.update_part, side)
            found = self._differentiate(*given, taps=taps if side.store else None, progress=progress, sheet=sheet)
        if sheet is not None:
            with self.on_part(self.update_part):
                scores = sheet.read()
            self.check_rollouts("update", scores, self.update_part, self.update)
        return found

    def _sheet(self) -> ScoreSheet | None:
        """Where the update gradient leaves the scores of its batch, unless that is the one that was scored already."""
        return None if self.same_batch else ScoreSheet(self.own_update, self.subject.model)

    def _loss_coefficients(self) -> TokenCoefficients:
        """Of this rank's part of the update batch."""
        # by the trainer's own groups
        whole = loss_coefficients(self.given_update, self.config.loss_type, self.config.max_completion_length)
        return whole.select(self.update_part.rows)

    def _differentiate(
        self,
        own: Rollouts,
        part: Part,
        side: Side,
        *,
        taps: Taps | None,
        progress: Progress,
        total: bool = True,
        sheet: ScoreSheet | None = None,
    ) -> UnitGradients:
        """The total, if wanted, over the whole batch; everything else of this rank's units."""
        with self.on_part(part):
            (found,) = unit_gradients(
                self.scorer, self.parameters, own, part.local_units, [side], taps=taps, progress=progress, sheet=sheet
            )
        if not total:
            return found
        if found.stored is None:
            return replace(found, total=self.ranks.sum_vector(found.total, self.parameters))
        # in float64, so that the step does not depend on which sequences share a microbatch or a rank
        named = self.parameters.items()
        double = {name: torch.zeros((), dtype=torch.float64, device=p.device).expand(p.shape) for name, p in named}
        exact = self.ranks.sum_vector(found.total_of_stored(self.parameters), double)
        dtypes = {name: torch.promote_types(p.dtype, torch.float32) for name, p in named}
        return replace(found, total={name: None if x is None else x.to(dtypes[name]) for name, x in exact.items()})

    def _over_units(self, part: Part, values: Tensor) -> Tensor:
        """Values of this rank's units, ``[..., u]``, with those of all others in their places, ``[..., U]``."""
        return self.ranks.sum(part.by_unit(values))

    def _first_order(
        self, before: Before, gradients: UnitGradients, step: PlannedStep, *, taps: Taps | None
    ) -> tuple[fo.FirstOrder, dict[str, Any]]:
        """The prediction with its components, and the result fields that report it."""
        surrogate = self._entropy_coefficients(before)
        with self.clock.phase("evaluation gradient") as progress:
            side = Side(surrogate, directions=list(step.components.values()))
            entropy_side = self._differentiate(self.own_evaluation, self.part, side, taps=taps, progress=progress)
        weights = before.sums.size
        dots = self._over_units(self.part, entropy_side.dots)
        lengths = self._length_changes(before, step)
        predicted = fo.first_order(dots.sum(0), weights, before.entropy, float(lengths.sum()))
        if step.gradient_scale is None:
            se_update, components = self._jackknife(gradients, entropy_side, weights.sum().item(), step), {}
        else:
            parts = {
                name: fo.first_order(dots[k], weights, before.entropy, float(lengths[k]))
                for k, name in enumerate(step.components)
            }
            by_prompt = self._by_update_prompt(
                gradients, entropy_side, weights.sum().item(), step, step.gradient_scale, taps=taps
            )
            coarsest = max(torch.finfo(p.dtype).eps for p in self.parameters.values())
            fo.check_sums(by_prompt, parts["gradient"].value, max(1e-3, 8 * coarsest))
            self._note_what_the_update_error_holds_fixed(step)
            se_update = fo.update_standard_error(by_prompt)
            update = (se_update, self.shares.count)
            components = {name: Estimate(**self.estimate_fields(part, self.units)) for name, part in parts.items()}
            components["gradient"] = Estimate(**self.estimate_fields(parts["gradient"], self.units, update))
        prediction = Prediction(
            **self.estimate_fields(predicted, self.units, (se_update, self.shares.count)),
            se_evaluation=predicted.standard_error,
            se_update=se_update,
            se_update_method="linear" if self.closed_form else "jackknife",
        )
        contributions = tuple((predicted.value + predicted.influence).tolist())
        return predicted, {"predicted": prediction, "components": components, "contributions": contributions}

    def _length_changes(self, before: Before, step: PlannedStep) -> Tensor:
        """The relative first-order change of the mean length by each part of the step, ``[K]``; 0 per sequence."""
        lengths = before.lengths
        if lengths is None:
            return torch.zeros(len(step.components), dtype=torch.float64)
        return lengths.along(list(step.components.values()), self._length_gradient(lengths), self.ranks)

    def _length_gradient(self, lengths: LengthSample) -> UnitGradients:
        """Of this rank's share of some sequences."""
        own = self.own_evaluation.select(lengths.rows)
        with self.clock.phase("length gradient") as progress:
            side = Side(lengths.coefficients())
            return self._differentiate(own, lengths.part, side, taps=None, progress=progress, total=False)

    def _entropy_coefficients(self, before: Before) -> TokenCoefficients:
        """Of this rank's part of the evaluation batch."""
        ids, own = self.own_evaluation.prompt_ids, (self.part.units, self.draws.select(self.part.rows))
        return entropy_coefficients(before.scores, ids, *own, before.positions, self.config)

    def _jackknife(
        self, gradients: UnitGradients, entropy_side: UnitGradients, total_weight: float, step: PlannedStep
    ) -> float:
        """The error from the update batch of a step that is taken on copies: leave out a block, step again."""
        config, blocks, update = self.config, self.shares, self.given_update
        self.notes.append(STEP_ON_COPIES(optimizer=optimizer_name(self.optimizer), blocks=blocks.count))
        factors = renormalisation(update, blocks.index, config.loss_type, config.max_completion_length)
        part, loss = self.update_part, self._loss_coefficients()
        own_factors = [factors[block] for block in part.present_units.tolist()]
        direction = {
            name: torch.zeros_like(p) if (x := entropy_side.total[name]) is None else x / total_weight
            for name, p in step.delta.items()
        }
        left_out = []
        with self.clock.phase("update error") as progress, self.on_part(part):
            for reduced in reduced_gradients(
                self.scorer, self.parameters, self.own_update, part.local_units, loss, gradients, own_factors
            ):
                clipped = clip_gradient(reduced, config.max_grad_norm).values
                stepped = copied_step(self.parameters, self.optimizer, clipped, config.learning_rate)
                left_out.append(dot(direction, moved(self.parameters, stepped)))
                progress(len(left_out), len(own_factors))
        found = self._over_units(part, torch.tensor(left_out, dtype=torch.float64))
        sizes = torch.stack([self.prompts.index, blocks.index], 1).unique(dim=0)[:, 1].bincount()
        return jackknife_standard_error(dot(direction, step.delta), found, sizes)

    def _note_what_the_update_error_holds_fixed(self, step: PlannedStep) -> None:
        if self.config.geometry == "adamw" and any(not self.optimizer.state.get(p) for p in self.parameters.values()):
            self.notes.append(NO_HISTORY())
        if step.gradient.factor < 1:
            self.notes.append(CLIPPED(factor=step.gradient.factor))

    def _by_update_prompt(
        self,
        gradients: UnitGradients,
        entropy_side: UnitGradients,
        total_weight: float,
        step: PlannedStep,
        gradient_scale: dict[str, Tensor],
        *,
        taps: Taps | None,
    ) -> Tensor:
        """What each update prompt adds to the gradient part of the prediction, ``[B]``."""
        direction = scaled(entropy_side.total, gradient_scale, -step.gradient.factor / total_weight)
        with self.clock.phase("update error") as progress:
            if gradients.stored is not None:
                return self._over_units(self.update_part, gradients.dot_stored(direction))
            side = Side(self._loss_coefficients(), directions=[direction])
            found = self._differentiate(
                self.own_update, self.update_part, side, taps=taps, progress=progress, total=False
            )
            return self._over_units(self.update_part, found.dots[0])

    def _realized(self, start: Start) -> dict[str, Any]:
        """Score the evaluation batch after the step, and the result fields that report the change."""
        measured, rounding = self._measure(start, self.config.learning_rate, "score after step")
        if measured.note:
            self.notes.append(measured.note)
        if rounding > NOTABLE_ROUNDING:
            self.notes.append(STEP_ROUNDED(share=rounding))
        realized, difference = self._report(
            measured, rounding, self._noise_floor(start.before), self._gap(measured, start.predicted, start.before)
        )
        return {"realized": realized} if difference is None else {"realized": realized, "difference": difference}

    def _measure(self, start: Start, learning_rate: float | None, phase: str) -> tuple[Measurement, float]:
        """The change after the step at the given rate (``None`` for each group's own), and the step's rounding."""
        with self._after(start, learning_rate, phase) as (after, rounding):
            before, fresh = start.before, self._score_fresh
            given = (before.scores, after, self.part, before.positions, self.config, self.ranks, fresh)
            return measure_change(*given), rounding

    @contextmanager
    def _after(self, start: Start, learning_rate: float | None, phase: str) -> Iterator[tuple[TokenScores, float]]:
        """The policy after the step, for as long as this lasts: scores of this rank's part, and the step's rounding."""
        stepped, rounding = stepped_parameters(self.parameters, self.optimizer, start.step, self.config, learning_rate)
        with parameters_at(self.parameters, stepped):
            with self.clock.phase(phase) as progress, self.on_part(self.part):
                after = self.scorer.score(self.own_evaluation, progress)
            yield after, rounding

    def _report(
        self,
        measured: Measurement,
        rounding: float,
        floor: float | None,
        gap: Sampled | None,
    ) -> tuple[Realized, Estimate | None]:
        """The records of a measured change and of its difference from the prediction, where there are both."""
        batch = "update" if self.same_batch else "evaluation"
        realized = measured.report(self.units, self.unit, floor, batch, rounding)
        return realized, None if gap is None else Estimate(**self.estimate_fields(gap, self.units))

    def _gap(self, measured: Measurement, predicted: fo.FirstOrder | None, before: Before) -> Sampled | None:
        """The measured change minus the predicted one, where there are both."""
        if predicted is None or measured.change is None:
            return None
        beyond = 0.0
        if before.lengths is not None and measured.estimator == "per_decision":
            beyond = before.lengths.beyond(measured.after, predicted.length_change, self.ranks)
        if measured.estimator == "resampled":  # other responses, so the change does not contain the influence of H
            beyond = measured.change.size_change - predicted.length_change
        return measured.change.minus(predicted, before.entropy, beyond)

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
        self.scorer.check_also(fresh)
        self.check_ranks_agree(resampled=fresh)
        with self.clock.phase("score resampled") as progress, self.on_part(self.part):
            return self.scorer.score(fresh.select(self.part.rows), progress)

    def _noise_floor(self, before: Before) -> float | None:
        if not self.config.measure_noise_floor:
            return None
        with self.clock.phase("noise floor"):
            return measured_noise_floor(
                self.scorer, self.parameters, self.evaluation, self.part, before.scores, self.config, self.ranks
            )


NOTABLE_ROUNDING = 0.01
