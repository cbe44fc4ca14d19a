"""Which tokens, prompts and layers the first-order change comes from.

The story of two batches up to the prediction; then one pass over the update batch along the entropy gradient gives
every token's contribution, and the step's inner products with it, parameter by parameter, those of the layers.
Formulas: ``docs/theory.md``, "Attribution".
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from entropy_probe.analyses.attribution import Attribution, LayerShare
from entropy_probe.analyses.before import LengthSample
from entropy_probe.analyses.layer_names import layer_and_module
from entropy_probe.analyses.session import Subject
from entropy_probe.analyses.two_batch import Start, TwoBatch
from entropy_probe.config import ProbeConfig
from entropy_probe.estimators.attribution import covariance_terms, fold_errors, rank_correlation
from entropy_probe.estimators.uncertainty import UnitSums
from entropy_probe.gradients.hooks import Taps
from entropy_probe.gradients.per_sample import Side, UnitGradients
from entropy_probe.parallel.batch import Part
from entropy_probe.results.attribution import AttributionSummary
from entropy_probe.rollouts.batch import Rollouts
from entropy_probe.scoring.cache import batch_digest
from entropy_probe.scoring.precision import precisions
from entropy_probe.scoring.slopes import TokenSlopes, token_slopes
from entropy_probe.steps.adamw import is_adam
from entropy_probe.steps.copied import optimizer_name
from entropy_probe.steps.plan import PlannedStep, scaled
from entropy_probe.types import TokenScores, Units

__all__ = ["AttributedBatch", "check_divides"]

PARTS = ("gradient", "momentum", "weight_decay")
UNITS_OF_ROUNDING = 8
"""How far sums may be off, relative to the sum of absolute terms: 1e-6 in float32."""
SUM_TOLERANCE = 1e-10
"""The least of that."""
TRIAL_TOLERANCE = 1e-4
"""How far forward mode may be off within a sequence or prompt. A wrong derivative is off by percents."""


def check_divides(optimizer: torch.optim.Optimizer, config: ProbeConfig) -> None:
    """Make sure that the step of an optimizer divides over gradient, momentum and tokens.

    Raises:
        ValueError: if it does not.
    """
    if config.geometry != "frozen" and not is_adam(optimizer):
        raise ValueError(
            "attribution: expected torch.optim.AdamW or Adam, whose step divides over gradient, momentum and tokens, "
            f"got {optimizer_name(optimizer)}; leave attribution out, or set geometry: frozen with "
            "identity_if_coverage_below"
        )


@dataclass(frozen=True, eq=False)
class _Gradients:
    """What the prediction was made of: its two sides' gradients, and the inner products by update prompt."""

    update: UnitGradients
    entropy: UnitGradients
    total_weight: float
    taps: Taps | None
    by_prompt: Tensor


class AttributedBatch(TwoBatch):
    """One probe of an update and an evaluation batch, with the prediction divided over its sources."""

    def __init__(self, subject: Subject, update: Rollouts, evaluation: Rollouts, folds: int | None = None) -> None:
        super().__init__(subject, update, evaluation)
        check_divides(self.optimizer, self.config)
        if folds is not None and not 2 <= folds <= self.units.count:
            raise ValueError(
                f"attribution_folds: expected 2 to {self.units.count}, the number of evaluation units, got {folds}"
            )
        self.folds = folds
        self._gradients: _Gradients | None = None
        self._lengths: UnitGradients | None = None

    def attribution(self, *, measure: bool) -> Attribution:
        """The whole story; ``measure`` adds the realized change."""
        with self.isolated():
            start = self._start(predict=True)
            began = time.perf_counter()
            slopes, tokens = self._tokens(start.step)
            layers = self._layers(start.step)
            errors = None if self.folds is None else self._fold_errors(start, self.folds)
            seconds = time.perf_counter() - began
            realized = self._realized(start) if measure else {}
        update = self.update
        covariances = covariance_terms(update.token_advantages, slopes.scores.logprobs, update.response_mask)
        parts = {name: start.fields["components"][name].value for name in start.step.components}
        self._check_sums(start, tokens, layers, parts)
        summary = self._summary(slopes.method, tokens, covariances, parts, seconds)
        result = self._finish(start, attribution=summary, **realized)
        prompts = self.prompts.total(tokens.sum(1))
        given, of = self.given_update, (update.prompt_ids, batch_digest(self.evaluation))
        return Attribution(result, given, *of, slopes.scores, tokens, covariances, prompts, errors, layers)

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
        """As for the prediction; both sides' gradients are kept, since the attribution goes on from here."""
        by_prompt = super()._by_update_prompt(gradients, entropy_side, total_weight, step, gradient_scale, taps=taps)
        self._gradients = _Gradients(gradients, entropy_side, total_weight, taps, by_prompt)
        return by_prompt

    def _rounding(self, dtypes: Iterable[torch.dtype]) -> float:
        """The relative spacing of numbers in the coarsest of some types, and of autocast."""
        also = [torch.bfloat16] if self.config.autocast == "bfloat16" else []
        return max(torch.finfo(dtype).eps for dtype in (*dtypes, *also))

    def _tokens(self, step: PlannedStep) -> tuple[TokenSlopes, Tensor]:
        """Slopes of the update batch's log-probabilities along the entropy gradient, and tokens' contributions."""
        found, scale = self._gradients, step.gradient_scale
        assert found is not None
        assert scale is not None
        direction = scaled(found.entropy.total, scale, -step.gradient.factor / found.total_weight)
        computes = (dtype for _, dtype in precisions(self.subject.model))
        trial = max(TRIAL_TOLERANCE, UNITS_OF_ROUNDING * self._rounding(computes))
        part = self.update_part
        with self.clock.phase("attribution") as progress, self.on_part(part):
            own = token_slopes(self.scorer, self.update, self.parameters, direction, trial, progress, part.rows)
        # adding 0 turns the -0 of a token without an advantage into 0
        own_tokens = self._loss_coefficients().logprobs.double() * own.slopes.double() + 0.0
        slopes, logprobs, entropies, tokens = (
            self.ranks.sum(part.by_sequence(x.T).T.contiguous())
            for x in (own.slopes, own.scores.logprobs, own.scores.entropies, own_tokens)
        )
        found_slopes = TokenSlopes(slopes, TokenScores(logprobs, entropies, self.update.response_mask), own.method)
        return found_slopes, _reconciled(tokens, self.prompts, found.by_prompt, trial)

    def _layers(self, step: PlannedStep) -> tuple[LayerShare, ...]:
        """Inner products of the entropy gradient with each part of the step, by layer and module."""
        found = self._gradients
        assert found is not None
        sums: dict[tuple[str, str], list[float]] = {}
        for name, p in self.parameters.items():
            row = sums.setdefault(layer_and_module(name), [0.0] * (1 + len(PARTS)))
            row[0] += p.numel()
            entropy = found.entropy.total[name]
            if entropy is None:
                continue
            x = entropy.reshape(-1).double() / found.total_weight
            for k, part in enumerate(PARTS, start=1):
                if part in step.components:
                    row[k] += torch.dot(x, step.components[part][name].reshape(-1).double()).item()
        return tuple(LayerShare(*key, int(count), *parts) for key, (count, *parts) in sums.items())

    def _fold_errors(self, start: Start, folds: int) -> Tensor:
        """Standard errors of the prompts' contributions, from the entropy gradient of one fold at a time."""
        found, part = self._gradients, self.part
        assert found is not None
        assert start.step.gradient_scale is not None
        surrogate = self._entropy_coefficients(start.before)
        fold_of = torch.arange(self.units.count) % folds
        table = start.before.sums.table
        sums = UnitSums(table.new_zeros(len(table), folds).index_add_(1, fold_of, table))
        numerators = []
        for fold in range(folds):
            rows = (fold_of[part.units.index] == fold).nonzero()[:, 0]
            own = Part(part.rows[rows], part.size, part.units.select(rows))
            with self.clock.phase("attribution folds") as progress:
                entropy = self._differentiate(
                    self.own_evaluation.select(rows), own, Side(surrogate.select(rows)), taps=None, progress=_unreported
                )
                progress(fold + 1, folds)
            numerators.append(
                super()._by_update_prompt(
                    found.update, entropy, 1.0, start.step, start.step.gradient_scale, taps=found.taps
                )
            )
        return fold_errors(torch.stack(numerators), sums, self._length_changes_by_prompt(start))

    def _length_gradient(self, lengths: LengthSample) -> UnitGradients:
        """As for the prediction, and kept."""
        self._lengths = super()._length_gradient(lengths)
        return self._lengths

    def _length_changes_by_prompt(self, start: Start) -> Tensor:
        """The relative first-order change of the mean length by each prompt's part of the step, ``[B]``."""
        found, lengths, own, step = self._gradients, start.before.lengths, self._lengths, start.step
        if lengths is None:
            return torch.zeros(self.prompts.count, dtype=torch.float64)
        assert found is not None
        assert own is not None
        assert step.gradient_scale is not None
        whole = replace(own, total=self.ranks.sum_vector(own.total, self.parameters))
        tokens = self.ranks.sum(torch.tensor([lengths.tokens], dtype=torch.float64)).item()
        return super()._by_update_prompt(found.update, whole, tokens, step, step.gradient_scale, taps=found.taps)

    def _check_sums(
        self, start: Start, tokens: Tensor, layers: tuple[LayerShare, ...], parts: Mapping[str, float]
    ) -> None:
        """Tokens and layers must sum to the parts of the prediction, which are sums over evaluation units."""
        tolerance = max(SUM_TOLERANCE, UNITS_OF_ROUNDING * self._rounding(p.dtype for p in self.parameters.values()))
        by_unit = torch.tensor(start.fields["contributions"], dtype=torch.float64).abs().mean()
        terms = {f"layers ({part})": (_column(layers, part), value) for part, value in parts.items()}
        for what, (values, total) in (terms | {"tokens": (tokens, parts["gradient"])}).items():
            found = values.sum().item()
            if abs(found - total) > tolerance * (values.abs().sum() + by_unit).item():
                raise RuntimeError(
                    f"attribution: {what} sum to {found:.9g}, not to {total:.9g} as predicted; please report this"
                )

    def _summary(
        self, method: str, tokens: Tensor, covariances: Tensor, parts: Mapping[str, float], seconds: float
    ) -> AttributionSummary:
        mask, advantages = self.update.response_mask, self.update.token_advantages
        return AttributionSummary(
            unit=self.unit,
            method=method,
            num_tokens=int(mask.sum()),
            **{part: parts.get(part, 0.0) for part in PARTS},
            positive_advantages=tokens[advantages > 0].sum().item(),
            negative_advantages=tokens[advantages < 0].sum().item(),
            rank_correlation_with_covariance=rank_correlation(tokens[mask], covariances[mask]),
            folds=self.folds,
            seconds=seconds,
        )


def _unreported(done: int, total: int) -> None:
    """Progress within a fold, which nobody needs to see."""


def _reconciled(tokens: Tensor, prompts: Units, by_prompt: Tensor, tolerance: float) -> Tensor:
    """Tokens that sum to what backward passes say of each prompt, once it is sure that only rounding is in between.

    The rest is spread over the prompt's tokens in proportion to their size, below each one's own rounding.

    Args:
        tokens: contributions by forward mode, ``[N, L]``.
        prompts: the prompt of each sequence.
        by_prompt: each prompt's contribution by backward passes, ``[B]``.
        tolerance: what rounding may do, relative to the sum of a prompt's absolute contributions.
    """
    sums, sizes = prompts.total(tokens.sum(1)), prompts.total(tokens.abs().sum(1))
    rest = by_prompt - sums
    allowed = tolerance * (sizes + sizes.mean())
    if bool((rest.abs() > allowed).any()):
        worst = int((rest.abs() - allowed).argmax())
        raise RuntimeError(
            f"attribution: prompt {worst} (by increasing id) contributes {sums[worst]:.6g} summed over tokens but "
            f"{by_prompt[worst]:.6g} by backward passes; please report this"
        )
    share = torch.where(sizes > 0, rest / sizes.clamp(min=torch.finfo(sizes.dtype).tiny), 0.0)
    return tokens + tokens.abs() * share[prompts.index, None]


def _column(layers: tuple[LayerShare, ...], part: str) -> Tensor:
    return torch.tensor([getattr(layer, part) for layer in layers], dtype=torch.float64)
