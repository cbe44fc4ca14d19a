"""Do contributions forecast real steps? Steps on random halves of the update batch, taken and measured.

This is the linear datamodeling score (Park et al., 2023) with the policy's entropy as the output. Formulas:
``docs/theory.md``, "Validation".
"""

from __future__ import annotations

from dataclasses import replace

import torch
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
from entropy_probe.validation_results import RankCorrelation, SubsetStep, Validation

__all__ = ["HalfSteps"]

LEAST_PROMPTS = 4
LEAST_SUBSETS = 4


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
        if self.prompts.count < LEAST_PROMPTS:
            raise ValueError(
                f"validate: expected at least {LEAST_PROMPTS} update prompts to take halves of, got "
                f"{self.prompts.count}; use a larger update batch"
            )
        self.attribution = attribution
        self._whole: UnitGradients | None = None

    def validation(self, subsets: int, seed: int) -> Validation:
        """The whole story; see :meth:`entropy_probe.EntropyProbe.validate`."""
        if subsets < LEAST_SUBSETS:
            raise ValueError(f"subsets: expected at least {LEAST_SUBSETS}, got {subsets}")
        source = torch.Generator().manual_seed(seed)
        count = self.prompts.count
        halves = [torch.randperm(count, generator=source)[: count // 2].sort().values for _ in range(subsets)]
        with self.isolated():
            start = self._start(predict=False)
            scale = self.frozen_scale() if self.config.geometry == "frozen" else None
            changes = []
            for k, kept in enumerate(halves):
                changes.append(self._change(start, kept, scale))
                if self.progress:
                    self.progress("subsets", k + 1, subsets)
        ids, prompts = self.attribution.prompt_ids, self.attribution.prompts
        covariances = self.prompts.total(self.attribution.covariances.sum(1))
        steps = tuple(
            SubsetStep(
                kept=tuple(ids[kept].tolist()),
                contribution=prompts[kept].sum().item(),
                covariance=covariances[kept].sum().item(),
                realized=change,
            )
            for kept, change in zip(halves, changes, strict=True)
        )
        return Validation(
            unit=self.unit,
            num_prompts=count,
            seed=seed,
            contributions=_correlation([step.contribution for step in steps], changes),
            covariance=_correlation([-step.covariance for step in steps], changes),
            steps=steps,
            messages=(*self.messages, *self.scorer.messages),
        )

    def _update_gradient(self, *, store: bool, taps: Taps | None) -> UnitGradients:
        """As for a prediction, whose gradients by prompt are what halves are put together from."""
        self._whole = super()._update_gradient(store=True, taps=self.choose_taps(self.update))
        return self._whole

    def _change(self, start: Start, kept: Tensor, frozen: tuple | None) -> float:
        """The entropy change measured after the step on some of the prompts."""
        assert self._whole is not None
        part, loss = self.update_part, self._loss_coefficients()
        own = torch.isin(part.present_units, kept).nonzero()[:, 0]
        with self.on_part(part):
            gradient = kept_gradient(
                self.scorer, self.parameters, self.own_update, part.local_units, own, loss, self._whole
            )
        gradient = self.ranks.sum_vector(gradient, self.parameters)
        step = plan_step(self.parameters, self.optimizer, gradient, self.config, lambda: frozen or self.frozen_scale())
        measured, _ = self._measure(replace(start, step=step), self.config.learning_rate, "score after steps")
        if measured.change is None:
            raise ValueError(f"validate: {measured.note}; lower the learning rate or set on_low_ess")
        return measured.change.value


def _correlation(forecast: list[float], measured: list[float]) -> RankCorrelation | None:
    a, b = (torch.tensor(values, dtype=torch.float64) for values in (forecast, measured))
    value = rank_correlation(a, b)
    if value is None:
        return None
    low, high = rank_correlation_interval(value, len(forecast))
    return RankCorrelation(value=value, low=low, high=high)
