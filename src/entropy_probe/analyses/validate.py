"""Do contributions forecast real steps? Steps on random halves of the update batch, taken and measured.

This is the linear datamodeling score (Park et al., 2023) with the policy's entropy as the output. Formulas:
``docs/theory.md``, "Validation".
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from functools import cache

import torch
from jaxtyping import Bool
from torch import Tensor

from entropy_probe.analyses.attribution import Attribution
from entropy_probe.analyses.before import entropy_coefficients
from entropy_probe.analyses.evaluation_half import EvaluationHalf, halved
from entropy_probe.analyses.measure import Measurement, measure_change
from entropy_probe.analyses.session import Subject
from entropy_probe.analyses.two_batch import Start, TwoBatch
from entropy_probe.estimators.first_order import sequence_weights
from entropy_probe.estimators.realized import Change
from entropy_probe.estimators.validation import Changes, Forecast, reliability, score, times_as_many
from entropy_probe.gradients.hooks import Taps
from entropy_probe.gradients.leave_out import kept_gradient
from entropy_probe.gradients.per_sample import Side, UnitGradients
from entropy_probe.results.note import NoteKind, distinct
from entropy_probe.results.validation import LEAST_STEPS, RankCorrelation, SubsetStep, Validation
from entropy_probe.rollouts.batch import Rollouts
from entropy_probe.scoring.cache import batch_digest
from entropy_probe.steps.copied import optimizer_name
from entropy_probe.steps.plan import PlannedStep, plan_step

__all__ = ["HalfSteps", "check_halves", "distinct_halves"]

LEAST_PROMPTS = 4
LEAST_RELIABILITY, WANTED_RELIABILITY = 0.8, 0.9
ROUNDING = 1e-9
"""A sum of advantages below this share of the sum of their sizes is none."""
FEW_HALVES = NoteKind(
    "few_halves",
    "{moving} update prompts with an advantage have {halves} different halves, fewer than the {asked} asked for",
    "Use more update prompts: few halves leave the rank correlation uncertain.",
)
NOT_MEASURED = NoteKind(
    "halves_not_measured",
    "{failed} of {steps} steps on halves could not be measured and are left out of the rank correlations; the first "
    "because {reason}",
    "Set a smaller probe.learning_rate, or probe.on_low_ess to resample (fresh responses after the step).",
)
NO_CORRELATION = NoteKind(
    "no_rank_correlation",
    "no rank correlation: expected at least {least} measured steps on different halves, got {measured}",
    "Use more update prompts whose responses have different rewards.",
)
ONLY_NOISE = NoteKind(
    "halves_disagree",
    "changes measured on the two halves of the evaluation batch do not agree at all: what ranks the steps is noise; "
    "use many times as many evaluation sequences",
    "Raise evaluation.total_sequences many times over, or read the correlations without noise.",
)
LOW_RELIABILITY = NoteKind(
    "low_reliability",
    "the measured changes have a reliability of {reliability:.2f}, which bounds what any forecast of them reaches; "
    "about {sequences:,.0f} evaluation sequences would bring it to {wanted:g}",
    "Use that many evaluation sequences (evaluation.total_sequences), or read the correlations without noise.",
)


def check_halves(prompts: int, subsets: int) -> None:
    """Make sure that there is something to take halves of, and that enough are asked for.

    Args:
        prompts: of the update batch.
        subsets: how many halves.

    Raises:
        ValueError: if not.
    """
    if prompts < LEAST_PROMPTS:
        raise ValueError(
            f"validate: expected at least {LEAST_PROMPTS} update prompts to take halves of, got {prompts}; use a "
            "larger update batch"
        )
    if subsets < LEAST_STEPS:
        raise ValueError(f"subsets: expected at least {LEAST_STEPS}, got {subsets}")


def distinct_halves(moving: Bool[Tensor, " B"], subsets: int, seed: int) -> list[Tensor]:
    """Random halves of the prompts, rounded down, whose steps all differ.

    Halves that differ only in prompts whose advantages are 0 give the same step and count as one.

    Args:
        moving: which prompts have an advantage other than 0.
        subsets: how many halves.
        seed: of the draws.

    Returns:
        The kept prompts of each half in increasing order, ``[B // 2]``; all different halves where there are fewer
        than asked for.
    """
    prompts, count = len(moving), int(moving.sum())
    half = prompts // 2
    there_are = sum(math.comb(count, k) for k in range(max(0, half - (prompts - count)), min(count, half) + 1))
    source = torch.Generator().manual_seed(seed)
    halves: dict[tuple[int, ...], Tensor] = {}
    while len(halves) < min(subsets, there_are):
        kept = torch.randperm(prompts, generator=source)[:half].sort().values
        halves.setdefault(tuple(kept[moving[kept]].tolist()), kept)
    return list(halves.values())


@dataclass(frozen=True, eq=False)
class _Measured:
    """The change after one step on the whole evaluation batch and on its halves, or why there is none."""

    whole: Change
    halves: list[Change]


class HalfSteps(TwoBatch):
    """The update batch of an attribution, stepped on in random halves and measured on an evaluation batch."""

    def __init__(self, subject: Subject, attribution: Attribution, evaluation: Rollouts) -> None:
        # progress is that of the halves, not of each one's scoring
        super().__init__(replace(subject, progress=None), attribution.update, evaluation)
        self.progress = subject.progress
        if not self.closed_form:
            raise ValueError(
                "validate: expected the optimizer of the attribution, Adam or AdamW, got "
                f"{optimizer_name(self.optimizer)}; validate with the probe that attributed"
            )
        self.attribution = attribution
        self.crossed = batch_digest(self.evaluation) == attribution.evaluation
        self._whole: UnitGradients | None = None
        self._taps: Taps | None = None

    def validation(self, subsets: int, seed: int) -> Validation:
        """The whole story; see :meth:`entropy_probe.EntropyProbe.validate`."""
        check_halves(self.prompts.count, subsets)
        moving = self.prompts.total(self.update.token_advantages.abs().sum(1)) > 0
        kept_prompts = distinct_halves(moving, subsets, seed)
        if len(kept_prompts) < subsets:
            self.notes.append(FEW_HALVES(moving=int(moving.sum()), halves=len(kept_prompts), asked=subsets))
        found: list[_Measured | str] = []
        with self.isolated():
            start = self._start(predict=False)
            halves = halved(self.units, self.part, start.before.scores, self.ranks, seed)
            by_half = torch.stack([self._contributions(start.step, half) for half in halves])
            scale = self.frozen_scale() if self.config.geometry == "frozen" else None
            for kept in kept_prompts:
                found.append(self._change(start, halves, kept, scale))
                if self.progress:
                    self.progress("subsets", len(found), len(kept_prompts))
        return self._judged(kept_prompts, found, by_half, seed)

    def _forecasts(self) -> dict[str, Tensor]:
        """What each update prompt is said to add to the change, ``[B]``, by name."""
        advantages = self.update.token_advantages.double()
        sums, sizes = (self.prompts.total(x.sum(1)) for x in (advantages, advantages.abs()))
        return {
            "contributions": self.attribution.prompts,
            "covariance": -self.prompts.total(self.attribution.covariances.sum(1)),
            # what centring leaves of a sum over equal lengths is rounding
            "advantages": torch.where(sums.abs() > ROUNDING * sizes, sums, 0.0),
        }

    def _contributions(self, step: PlannedStep, half: EvaluationHalf) -> Tensor:
        """The contributions of the update prompts by one half of the evaluation batch, ``[B]``."""
        assert self._whole is not None
        assert step.gradient_scale is not None
        rollouts, units, config = self.own_evaluation.select(half.rows), half.part.units, self.config
        draws = self.draws.select(self.part.rows[half.rows])
        surrogate = entropy_coefficients(half.scores, rollouts.prompt_ids, units, draws, half.positions, config)
        with self.clock.phase("evaluation gradient") as progress:
            entropy = self._differentiate(rollouts, half.part, Side(surrogate), taps=None, progress=progress)
        weight = self.ranks.sum(sequence_weights(half.scores, config.normalization).double().sum()[None]).item()
        return self._by_update_prompt(self._whole, entropy, weight, step, step.gradient_scale, taps=self._taps)

    def _update_gradient(self, *, store: bool, taps: Taps | None) -> UnitGradients:
        """As for a prediction, whose gradients by prompt are what halves are put together from."""
        self._taps = self.choose_taps(self.update)
        self._whole = super()._update_gradient(store=True, taps=self._taps)
        return self._whole

    def _change(
        self, start: Start, halves: list[EvaluationHalf], kept: Tensor, frozen: tuple | None
    ) -> _Measured | str:
        """The entropy change measured after the step on some of the prompts, or why there is none."""
        assert self._whole is not None
        part, loss = self.update_part, self._loss_coefficients()
        own = torch.isin(part.present_units, kept).nonzero()[:, 0]
        with self.on_part(part):
            gradient = kept_gradient(
                self.scorer, self.parameters, self.own_update, part.local_units, own, loss, self._whole
            )
        gradient = self.ranks.sum_vector(gradient, self.parameters)
        step = plan_step(self.parameters, self.optimizer, gradient, self.config, lambda: frozen or self.frozen_scale())
        try:
            measured = self._measure_halves(replace(start, step=step), halves)
        except ValueError as error:  # the same batch was scored before the step: what fails now is the step's doing
            return str(error)
        for each in measured:
            if each.change is None:
                assert each.note is not None
                return each.note.text
        whole, *others = [each.change for each in measured if each.change is not None]
        return _Measured(whole, others)

    def _measure_halves(self, start: Start, halves: list[EvaluationHalf]) -> list[Measurement]:
        """The change on the whole evaluation batch, and on its halves, from one scoring."""
        before = start.before
        with self._after(start, self.config.learning_rate, "score after steps") as (after, _):
            fresh = cache(self._score_fresh)
            found = [measure_change(before.scores, after, self.part, before.positions, self.config, self.ranks, fresh)]
            for half in halves:
                given = (half.scores, after.select(half.rows), half.part, half.positions, self.config, self.ranks)
                found.append(measure_change(*given, lambda rows=half.rows: fresh().select(rows)))
        return found

    def _judged(
        self, kept_prompts: list[Tensor], found: list[_Measured | str], by_half: Tensor, seed: int
    ) -> Validation:
        """The rank correlations over the steps that were measured, and what to know about the others."""
        forecasts, ids = self._forecasts(), self.attribution.prompt_ids
        kept = torch.stack([torch.isin(torch.arange(self.prompts.count), rows) for rows in kept_prompts]).double()
        summed = {name: kept @ by_prompt for name, by_prompt in forecasts.items()}
        halves = kept @ by_half.T
        steps = tuple(
            SubsetStep(
                kept=tuple(ids[rows].tolist()),
                forecasts={name: sums[k].item() for name, sums in summed.items()},
                contributions_by_half=tuple(halves[k].tolist()),
                realized=None if isinstance(each, str) else each.whole.value,
                realized_by_half=None if isinstance(each, str) else (each.halves[0].value, each.halves[1].value),
                failure=each if isinstance(each, str) else None,
            )
            for k, (rows, each) in enumerate(zip(kept_prompts, found, strict=True))
        )
        measured = [each for each in found if isinstance(each, _Measured)]
        failures = [each for each in found if isinstance(each, str)]
        if failures:
            self.notes.append(NOT_MEASURED(failed=len(failures), steps=len(steps), reason=failures[0]))
        known, correlations = None, dict.fromkeys(forecasts)
        if len(measured) < LEAST_STEPS:
            self.notes.append(NO_CORRELATION(least=LEAST_STEPS, measured=len(measured)))
        else:
            rows = torch.tensor([k for k, each in enumerate(found) if isinstance(each, _Measured)])
            changes = _changes(measured)
            known = reliability(changes.halves, 1.0 if self.crossed else 2.0)
            self._note_reliability(known)
            correlations = {
                name: self._correlation(name, sums[rows], halves[rows].T, changes, seed)
                for name, sums in summed.items()
            }
        notes = (note for of_rank in self.ranks.gather(self.scorer.notes) for note in of_rank)
        return Validation(
            unit=self.unit,
            num_prompts=self.prompts.count,
            num_sequences=len(self.evaluation),
            seed=seed,
            measured_on="halves" if self.crossed else "others",
            reliability=known,
            correlations=correlations,
            steps=steps,
            notes=distinct((*self.notes, *notes)),
        )

    def _correlation(
        self, name: str, sums: Tensor, halves: Tensor, changes: Changes, seed: int
    ) -> RankCorrelation | None:
        forecast = Forecast(sums)
        if name == "contributions":
            times = 2 * self.attribution.result.diagnostics.num_evaluation_sequences / len(self.evaluation)
            forecast = Forecast(sums, halves, None if self.crossed else times)
        found = score(forecast, changes, crossed=self.crossed, seed=seed)
        return None if found is None else RankCorrelation(**asdict(found))

    def _note_reliability(self, known: float | None) -> None:
        """How many evaluation rollouts would do, where these do not."""
        if known is None or known >= LEAST_RELIABILITY:
            return
        if known <= 0:
            self.notes.append(ONLY_NOISE())
            return
        needed = times_as_many(known, WANTED_RELIABILITY) * len(self.evaluation)
        sequences = float(f"{needed:.2g}")
        self.notes.append(LOW_RELIABILITY(reliability=known, sequences=sequences, wanted=WANTED_RELIABILITY))


def _changes(measured: list[_Measured]) -> Changes:
    whole = torch.tensor([each.whole.value for each in measured], dtype=torch.float64)
    halves = torch.tensor([[half.value for half in each.halves] for each in measured], dtype=torch.float64).T
    first, second = (torch.stack([each.halves[k].influence for each in measured]) for k in (0, 1))
    return Changes(whole, halves.contiguous(), (first, second))
