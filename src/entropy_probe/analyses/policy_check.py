"""Are rollouts the policy's own? What their tokens and the sampler's log-probabilities say.

Formulas: ``docs/theory.md``, "Do the rollouts fit the policy" and "The sampler".
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from entropy_probe.analyses.admission import Role
from entropy_probe.analyses.misfit import Misfit
from entropy_probe.analyses.old_policy import OldPolicy, old_policy
from entropy_probe.config import ProbeConfig
from entropy_probe.estimators.importance import sequence_importance_weights
from entropy_probe.estimators.policy_fit import MAX_Z, Fit, excess_sums, policy_fit
from entropy_probe.estimators.sampler import (
    MISTAKES,
    adapter_share,
    adapter_sums,
    mistake_sums,
    recorded_amiss,
    sampler_gaps,
    sampler_mismatch,
    squared_gaps,
)
from entropy_probe.parallel.batch import LocalRows
from entropy_probe.parallel.ranks import Ranks
from entropy_probe.results.note import Note
from entropy_probe.results.probe import BatchFit, SamplerMismatch
from entropy_probe.rollouts.batch import Rollouts
from entropy_probe.scoring.adapters import has_adapter, without_adapter
from entropy_probe.scoring.forward import Scorer
from entropy_probe.types import TokenScores

FEW = 96
"""Sequences that are scored at other temperatures, once something is wrong."""
NEWTON_STEPS = 5
WIDEST = 5.0
"""A temperature this many times off is no temperature."""
EXPLAINED = 0.2
"""A temperature explains log-probabilities if at most this share of their distance from the policy's is left."""
ROUNDING_FACTOR = 3.0
"""An engine in bfloat16 rounds in other places than this model would, at most this many times as far."""
SPREAD = 0.7
"""Root mean square per token, in units of ``max_mismatch``, that may be an engine's rounding even where this model
hardly rounds. Another policy's is larger beside its mean: it is far away on few tokens.
"""
ROUNDS = 1e-4
"""Nats per token, root mean square, that float32 stays below."""
TELLING = 32
"""Sequences that are scored without the adapter."""
MOST_OFF = 0.4
"""How much of what the adapter adds a sampler may lack or have too much of: one that lags a little behind does."""
UNMODELLED = "importance weights between the sampler and the policy in the trainer's loss, if it has any"


class StaleRolloutsError(ValueError):
    """Another policy sampled the rollouts, and weights do not make up for it."""


@dataclass(frozen=True, eq=False)
class Checked:
    """What a check found.

    Attributes:
        scores: of this rank's rows, with weights where the batch is to be reweighted.
        fit: the tokens against the policy.
        mismatch: the sampler's log-probabilities against the policy's; ``None`` without any.
        note: what a reader should know; ``None`` where all is well.
        not_modelled: what the trainer may do about it that the prediction leaves out.
    """

    scores: TokenScores
    fit: BatchFit
    mismatch: SamplerMismatch | None
    note: Note | None = None
    not_modelled: str | None = None


class PolicyCheck:
    """Checks of batches against the policy as it is."""

    def __init__(self, scorer: Scorer, config: ProbeConfig, ranks: Ranks) -> None:
        self.scorer, self.config, self.ranks = scorer, config, ranks

    def __call__(self, role: Role, scores: TokenScores, local: LocalRows, rollouts: Rollouts) -> Checked:
        """Check one batch by the scores of this rank's rows of it.

        Raises:
            ValueError: if it does not fit and the config refuses that, or it cannot be reweighted.
        """
        config = self.config
        if rollouts.sampled_logprobs is None and config.on_mismatch == "reweight" and role != "update":
            raise ValueError(
                "on_mismatch reweight: expected sampled_logprobs in the rollouts, got none; record the sampler's "
                "log-probabilities, or use on_mismatch: report"
            )
        sums = self._sum(local, excess_sums(scores))
        fit = policy_fit(sums)
        add_up = partial(self._sum, local)
        if (older := old_policy(role, scores, local, rollouts, add_up, config.max_mismatch)) is not None:
            return self._of_older(scores, fit, older, rollouts)
        gaps, mismatch, record, rms, rounding, adapter = None, None, None, 0.0, None, None
        if rollouts.sampled_logprobs is not None:
            gaps = self._sum(local, sampler_gaps(scores, rollouts.sampled_logprobs[local.rows]))
            answered = rollouts.response_mask.any(1)  # a response that is masked out has no weight to compare
            mismatch = sampler_mismatch(gaps[:, answered], int(rollouts.response_mask.sum()))
            share = mismatch.ess / int(answered.sum())
            record = SamplerMismatch(mean=mismatch.mean, max=mismatch.max, ess_fraction=share)
            rms = _root_mean_square(self._sum(local, squared_gaps(scores, rollouts.sampled_logprobs[local.rows])))
            if rms > SPREAD * config.max_mismatch:
                rounding = self._rounding(*_few(local, rollouts))
            if rms > ROUNDS:
                adapter = self._adapter_of_sampler(scores, local, rollouts)
        selected = role != "evaluation" and config.update_selected
        misfit = Misfit(
            fit,
            strange=not fit.holds and not selected,
            mismatch=mismatch,
            share=1.0 if record is None else record.ess_fraction,
            differ=(mismatch is not None and mismatch.mean > config.max_mismatch)
            or (rounding is not None and rms > ROUNDING_FACTOR * rounding)
            or adapter is not None,
            corrected=config.loss.weighs_sampler,
            spread=None if rounding is None else (rms, rounding),
            adapter=adapter,
        )
        checked = Checked(scores, _record(fit, selected=selected), record)
        if config.on_mismatch == "reweight" and not config.max_mismatch and role == "evaluation" and gaps is not None:
            return self._reweighted(checked, misfit, misfit.said(role, config.temperature), (sums, gaps[0]), local)
        if not (misfit.strange or misfit.differ):
            return checked
        misfit = self._investigated(misfit, scores, local, rollouts)
        said = misfit.said(role, config.temperature)
        if config.on_mismatch == "refuse":
            raise ValueError(
                f"{said}; on_mismatch refuse: expected at most {config.max_mismatch:g} nats per token, no more spread "
                f"than rounding has, and |z| of at most {MAX_Z:g}, so {misfit.remedy}, or use on_mismatch: report"
            )
        if config.on_mismatch == "reweight" and role != "update" and misfit.differ and gaps is not None:
            return self._reweighted(checked, misfit, said, (sums, gaps[0]), local)
        return replace(
            checked,
            note=misfit.note(role, said),
            not_modelled=None
            if role == "evaluation" or misfit.only_logprobs or config.loss.weighs_sampler
            else UNMODELLED,
        )

    def _of_older(self, scores: TokenScores, fit: Fit, older: OldPolicy, rollouts: Rollouts) -> Checked:
        """A batch that an older policy sampled, which its tokens are not held against the policy for."""
        if older.notes and self.config.on_mismatch == "refuse":
            raise ValueError(f"{older.notes[0].text}; on_mismatch refuse: {older.notes[0].remedy}")
        record = None
        if (sampled := older.sampled) is not None:
            share = sampled.ess / int(rollouts.response_mask.any(1).sum())
            record = SamplerMismatch(mean=sampled.mean, max=sampled.max, ess_fraction=share)
        note = older.notes[0] if older.notes else None
        return Checked(scores, _record(fit, selected=True), record, note)

    def _sum(self, local: LocalRows, values: Tensor) -> Tensor:
        return self.ranks.sum(local.by_sequence(values))

    def _reweighted(
        self, checked: Checked, misfit: Misfit, said: str, sums: tuple[Tensor, Tensor], local: LocalRows
    ) -> Checked:
        """The scores with each sequence's weight, from sums over all of them."""
        if misfit.blame_logprobs:
            raise ValueError(
                f"{said}; weights from them would bias the results instead of correcting them, so {misfit.remedy}, or "
                "use on_mismatch: report"
            )
        excess, log_weights = sums
        weights, least = sequence_importance_weights(log_weights), self.config.min_ess_fraction
        if weights.heavy_tailed or weights.ess_fraction < least:
            tail = "" if weights.pareto_k is None else f" (Pareto k {weights.pareto_k:.2f})"
            raise StaleRolloutsError(
                f"{said}; to reweight it, expected an effective sample size of at least {least:.0%} and a Pareto k "
                f"of at most {weights.pareto_k_threshold:.2f}, got {weights.ess_fraction:.1%}{tail}; sample from the "
                "policy itself"
            )
        normalized = log_weights - log_weights.logsumexp(0) + math.log(len(log_weights))
        fit = policy_fit(excess, normalized)
        if not fit.holds:
            raise StaleRolloutsError(
                f"{said}; reweighted by pi / pi_sampler it still does not fit the policy (z = {fit.z:+.1f}), so the "
                "log-probabilities are not those that it was drawn with: sample from the policy itself"
            )
        return replace(
            checked,
            scores=replace(checked.scores, log_weights=normalized[local.rows]),
            fit=_record(fit),
            note=misfit.reweighted(said),
        )

    def _investigated(self, misfit: Misfit, scores: TokenScores, local: LocalRows, rollouts: Rollouts) -> Misfit:
        """With what the likely causes would explain."""
        sampled, amiss, of_logprobs = rollouts.sampled_logprobs, None, None
        some, own = _few(local, rollouts)
        if misfit.mismatch is not None and sampled is not None and misfit.differ:
            amiss = recorded_amiss(self._sum(local, mistake_sums(scores, sampled[local.rows])), misfit.mismatch)
            if amiss == MISTAKES[0] and misfit.strange and misfit.fit.z < 0:
                amiss = None  # of greedy decoding they are 0
            if amiss is None:
                of_logprobs = self._temperature_of_logprobs(some, own, misfit.mismatch.mean)
        of_tokens = self._temperature_of_tokens(some, own) if misfit.strange else None
        return replace(misfit, amiss=amiss, of_tokens=of_tokens, of_logprobs=of_logprobs)

    def _rounding(self, few: Rollouts, local: LocalRows) -> float:
        """Root mean square of what bfloat16 makes of a token's log-probability, nats; autocast is switched for it."""
        device = self.scorer.device.type
        with self.ranks.agreeing():
            scores = self.scorer.score(few)
            with torch.autocast(device, torch.bfloat16, not torch.is_autocast_enabled(device), cache_enabled=False):
                rounded = self.scorer.score(few)
        return _root_mean_square(self._sum(local, squared_gaps(scores, rounded.logprobs)))

    def _adapter_of_sampler(self, scores: TokenScores, local: LocalRows, rollouts: Rollouts) -> float | None:
        """How much of what the policy's adapter adds the sampler had; ``None`` where that may be all of it."""
        model, scorer = self.scorer.model, self.scorer
        if not has_adapter(model):
            return None
        few, own = _few(local, rollouts, TELLING)
        assert few.sampled_logprobs is not None
        with self.ranks.agreeing(), without_adapter(model):
            base = Scorer(model, scorer.temperature, scorer.max_tokens)
            base.prepare(rollouts.select(_evenly(rollouts, TELLING)))
            alone = base.score(few)
        here = scores.select(torch.isin(local.rows, own.rows).nonzero()[:, 0])
        share, z = adapter_share(self._sum(own, adapter_sums(here, alone, few.sampled_logprobs)))
        return share if abs(share - 1) > MOST_OFF and abs(z) > MAX_Z else None

    def _temperature_of_tokens(self, few: Rollouts, local: LocalRows) -> tuple[float, float] | None:
        """The temperature at which the tokens are likeliest, surprisal minus entropy sums to 0, with its error."""

        def sums(scores: TokenScores) -> Tensor:
            return self._sum(local, excess_sums(scores)).sum(1)

        def step(scores: TokenScores) -> float:
            x, _, variance, _ = sums(scores)
            return (-x / variance).item()

        temperature, scores = self._temperature(few, step)
        return None if temperature is None else (temperature, temperature / sums(scores)[2].sqrt().item())

    def _temperature_of_logprobs(self, few: Rollouts, local: LocalRows, mismatch: float) -> float | None:
        """The temperature at which the policy has the sampler's log-probabilities, if there is one."""
        sampled, mask = few.sampled_logprobs, few.response_mask
        assert sampled is not None

        def step(scores: TokenScores) -> float:
            slope = torch.where(mask, scores.logprobs.double() + scores.entropies.double(), 0.0)
            gap = torch.where(mask, sampled.double() - scores.logprobs.double(), 0.0)
            along, size = self._sum(local, torch.stack([(slope * gap).sum(1), slope.square().sum(1)])).sum(1)
            return (along / size).item()

        temperature, scores = self._temperature(few, step)
        gap = torch.where(mask, (sampled.double() - scores.logprobs.double()).abs(), 0.0)
        left, tokens = self._sum(local, torch.stack([gap.sum(1), mask.sum(1).double()])).sum(1)
        return temperature if bool(left <= EXPLAINED * mismatch * tokens) else None

    def _temperature(self, few: Rollouts, step: Callable[[TokenScores], float]) -> tuple[float | None, TokenScores]:
        """Newton's method for a temperature, and the scores there; each step is in the logarithm of its inverse."""
        own, temperature = self.config.temperature, self.config.temperature
        with self.ranks.agreeing():
            scores = _at(self.scorer, temperature).score(few)
        for _ in range(NEWTON_STEPS):
            move = step(scores)
            if not math.isfinite(move):
                return None, scores
            temperature *= math.exp(-max(-0.7, min(0.7, move)))
            if not own / WIDEST <= temperature <= own * WIDEST:
                return None, scores
            with self.ranks.agreeing():
                scores = _at(self.scorer, temperature).score(few)
        return temperature, scores


def _evenly(rollouts: Rollouts, count: int) -> Tensor:
    """Places of so many sequences, evenly over the batch."""
    return torch.arange(0, len(rollouts), max(1, len(rollouts) // count))[:count]


def _few(local: LocalRows, rollouts: Rollouts, count: int = FEW) -> tuple[Rollouts, LocalRows]:
    """Some of the sequences of this rank, evenly over the batch."""
    keep = torch.isin(local.rows, _evenly(rollouts, count)).nonzero()[:, 0]
    own = LocalRows(local.rows[keep], local.size, local.clusters.select(keep))
    return own.select(rollouts), own


def _root_mean_square(sums: Tensor) -> float:
    squares, tokens = sums.sum(1).tolist()
    return math.sqrt(squares / max(tokens, 1))


def _at(scorer: Scorer, temperature: float) -> Scorer:
    other = copy.copy(scorer)
    other.temperature = temperature
    return other


def _record(fit: Fit, *, selected: bool = False) -> BatchFit:
    status = "ok" if fit.holds else "selected" if selected else "off_policy"
    return BatchFit(z=fit.z, excess=fit.excess, num_sequences=fit.num_sequences, status=status)
