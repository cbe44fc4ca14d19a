"""Do contributions forecast real steps? Steps on random halves of the update batch, taken and measured.

This is the linear datamodeling score (Park et al., 2023) with the policy's entropy as the output. Formulas:
``docs/theory.md``, "Validation".
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from jaxtyping import Bool
from torch import Tensor

from entropy_probe.attribution import Attribution
from entropy_probe.estimators.attribution import rank_correlation, rank_correlation_interval
from entropy_probe.session import Subject
from entropy_probe.step import plan_step
from entropy_probe.two_batch import Start, TwoBatch
from entropy_probe.types import Rollouts
from entropy_probe.updates.leave_out import kept_gradient
from entropy_probe.updates.per_unit import UnitGradients
from entropy_probe.updates.shadow import optimizer_name
from entropy_probe.updates.taps import Taps
from entropy_probe.validation_results import LEAST_STEPS, RankCorrelation, SubsetStep, Validation

__all__ = ["HalfSteps", "check_halves", "distinct_halves"]

LEAST_PROMPTS = 4


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
        self._whole: UnitGradients | None = None

    def validation(self, subsets: int, seed: int) -> Validation:
        """The whole story; see :meth:`entropy_probe.EntropyProbe.validate`."""
        check_halves(self.prompts.count, subsets)
        moving = self.prompts.total(self.update.token_advantages.abs().sum(1)) > 0
        halves = distinct_halves(moving, subsets, seed)
        if len(halves) < subsets:
            self.messages.append(
                f"{int(moving.sum())} update prompts with an advantage have {len(halves)} different halves, fewer than "
                f"the {subsets} asked for"
            )
        found: list[tuple[float | None, str | None]] = []
        with self.isolated():
            start = self._start(predict=False)
            scale = self.frozen_scale() if self.config.geometry == "frozen" else None
            for kept in halves:
                found.append(self._change(start, kept, scale))
                if self.progress:
                    self.progress("subsets", len(found), len(halves))
        ids, prompts = self.attribution.prompt_ids, self.attribution.prompts
        covariances = self.prompts.total(self.attribution.covariances.sum(1))
        steps = tuple(
            SubsetStep(
                kept=tuple(ids[kept].tolist()),
                contribution=prompts[kept].sum().item(),
                covariance=covariances[kept].sum().item(),
                realized=change,
                failure=failure,
            )
            for kept, (change, failure) in zip(halves, found, strict=True)
        )
        return self._judged(steps, seed)

    def _judged(self, steps: tuple[SubsetStep, ...], seed: int) -> Validation:
        """The rank correlations over the steps that were measured, and what to know about the others."""
        measured = [step for step in steps if step.realized is not None]
        failures = [step.failure for step in steps if step.failure is not None]
        if failures:
            self.messages.append(
                f"{len(failures)} of {len(steps)} steps on halves could not be measured and are left out of the rank "
                f"correlations; the first because {failures[0]}"
            )
        if len(measured) < LEAST_STEPS:
            self.messages.append(
                f"no rank correlation: expected at least {LEAST_STEPS} measured steps on different halves, got "
                f"{len(measured)}"
            )
        changes = [step.realized for step in measured if step.realized is not None]
        notes = (note for of_rank in self.ranks.gather(self.scorer.messages) for note in of_rank)
        return Validation(
            unit=self.unit,
            num_prompts=self.prompts.count,
            seed=seed,
            contributions=_correlation([step.contribution for step in measured], changes),
            covariance=_correlation([-step.covariance for step in measured], changes),
            steps=steps,
            messages=tuple(dict.fromkeys((*self.messages, *notes))),
        )

    def _update_gradient(self, *, store: bool, taps: Taps | None) -> UnitGradients:
        """As for a prediction, whose gradients by prompt are what halves are put together from."""
        self._whole = super()._update_gradient(store=True, taps=self.choose_taps(self.update))
        return self._whole

    def _change(self, start: Start, kept: Tensor, frozen: tuple | None) -> tuple[float | None, str | None]:
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
            measured, _ = self._measure(replace(start, step=step), self.config.learning_rate, "score after steps")
        except ValueError as error:  # the same batch was scored before the step: what fails now is the step's doing
            return None, str(error)
        return (None, measured.note) if measured.change is None else (measured.change.value, None)


def _correlation(forecast: list[float], measured: list[float]) -> RankCorrelation | None:
    if len(forecast) < LEAST_STEPS:
        return None
    a, b = (torch.tensor(values, dtype=torch.float64) for values in (forecast, measured))
    value = rank_correlation(a, b)
    if value is None:
        return None
    low, high = rank_correlation_interval(value, len(forecast))
    return RankCorrelation(value=value, low=low, high=high)
