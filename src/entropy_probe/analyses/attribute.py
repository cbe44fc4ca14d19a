"""Which tokens, prompts and layers the first-order change comes from.

One pass over the update batch along the entropy gradient gives every token's contribution, and the step's inner
products with that gradient, parameter by parameter, those of the layers.
Formulas: ``docs/theory.md``, "Attribution".
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from entropy_probe.analyses.assemble import result_of
from entropy_probe.analyses.attribute_own import OwnTerms, own_terms, token_contributions
from entropy_probe.analyses.attribution import Attribution, LayerShare
from entropy_probe.analyses.attribution_horizon import at_own_horizon
from entropy_probe.analyses.batches import EvaluationBatch
from entropy_probe.analyses.gradient import differentiate, over_tokens, whole_scores
from entropy_probe.analyses.layer_names import layer_and_module
from entropy_probe.analyses.measure import Measured
from entropy_probe.analyses.overlap import Contents
from entropy_probe.analyses.own_batch import OwnPrediction
from entropy_probe.analyses.policy import Policy
from entropy_probe.analyses.predict import Prediction, entropy_surrogate, prompt_contributions
from entropy_probe.config import ProbeConfig
from entropy_probe.estimators.attribution import covariance_terms, fold_errors, others_only, rank_correlation
from entropy_probe.estimators.uncertainty import ClusterSums
from entropy_probe.gradients.per_sample import Side
from entropy_probe.parallel.batch import LocalRows
from entropy_probe.results.attribution import AttributionSummary
from entropy_probe.scoring.precision import precisions
from entropy_probe.scoring.slopes import TokenSlopes, slope_method
from entropy_probe.steps.adamw import is_adam
from entropy_probe.steps.copied import optimizer_name
from entropy_probe.steps.plan import scaled
from entropy_probe.types import Clusters

Folds = int | Literal["auto"] | None
USUAL_FOLDS = 8
"""Their errors are themselves known to a quarter."""
PARTS = ("gradient", "momentum", "weight_decay", "rounding")
UNITS_OF_ROUNDING = 8
"""How far sums may be off, relative to the sum of absolute terms: 1e-6 in float32."""
SUM_TOLERANCE = 1e-10
"""The least of that."""
TRIAL_TOLERANCE = 1e-4
"""How far forward mode may be off within a sequence or prompt. A wrong derivative is off by percents."""


def check_divides(optimizer: torch.optim.Optimizer, config: ProbeConfig) -> None:
    """Make sure that the step of an optimizer divides over gradient, momentum and tokens."""
    if config.geometry != "frozen" and not is_adam(optimizer):
        raise ValueError(
            "attribution: expected torch.optim.AdamW or Adam, whose step divides over gradient, momentum and tokens, "
            f"got {optimizer_name(optimizer)}; leave attribution out, or set geometry: frozen with "
            "identity_if_coverage_below"
        )


def check_folds(folds: Folds, evaluation: EvaluationBatch, *, own: bool = False) -> None:
    """Make sure that the evaluation batch has that many folds.

    Args:
        folds: asked for.
        evaluation: the batch.
        own: whether it is that of the step, of which a prompt's own responses are left out.

    Raises:
        ValueError: if not.
    """
    count, what = evaluation.clusters.count, "the number of evaluation clusters"
    if own:  # a fold has others beside the prompt itself
        count, what = count // 2, "half the number of prompts"
    if isinstance(folds, int) and not 2 <= folds <= count:
        raise ValueError(f"attribution_folds: expected 2 to {count}, {what}, got {folds}")


def attribute(
    prediction: Prediction, folds: Folds = None, measured: Measured | None = None, **fields: Any
) -> Attribution:
    """Divide a prediction over its sources.

    Args:
        prediction: of a step in closed form, on the whole response; it is divided at a horizon of its own
            (:func:`~entropy_probe.analyses.attribution_horizon.at_own_horizon`).
        folds: of the evaluation batch, for standard errors of the prompts' contributions; ``auto`` for
            :data:`USUAL_FOLDS` where each prompt's share of the update gradient is kept, so that they cost one more
            gradient over the evaluation batch and no more.
        measured: the realized change, which joins the result.
        fields: further fields of the result.
    """
    began = time.perf_counter()
    plan, policy = prediction.plan, prediction.plan.policy
    if isinstance(prediction, OwnPrediction):
        check_folds(folds, plan.evaluation, own=True)
    within, alike = at_own_horizon(prediction)
    slopes, tokens, own = _tokens(within)
    layers = _layers(within, own)
    folds = _usual_folds(within) if folds == "auto" else folds
    errors = None if folds is None else _fold_errors(within, folds)
    seconds = time.perf_counter() - began
    update = plan.batch.update
    covariances = covariance_terms(
        update.rollouts.token_advantages, slopes.scores.logprobs, update.rollouts.response_mask
    )
    parts = {name: part.value for name, part in within.parts.items()}
    if isinstance(within, OwnPrediction):  # over pairs of prompts, with denominators and clipping held
        assert within.by_prompt is not None
        parts["gradient"] = within.by_prompt.sum().item()
    _check_sums(within, tokens, layers, parts)
    advantages, mask = update.rollouts.token_advantages, update.rollouts.response_mask
    summary = AttributionSummary(
        unit=policy.unit,
        method=slopes.method,
        horizon=within.horizon,
        correlation_with_whole=alike,
        num_tokens=int(mask.sum()),
        **{part: parts.get(part, 0.0) for part in PARTS},
        positive_advantages=tokens[advantages > 0].sum().item(),
        negative_advantages=tokens[advantages < 0].sum().item(),
        rank_correlation_with_covariance=rank_correlation(tokens[mask], covariances[mask]),
        folds=folds,
        seconds=seconds,
    )
    result = result_of(plan, prediction, measured, attribution=summary, **fields)
    prompts = update.prompts.total(tokens.sum(1))
    of = (update.rollouts.prompt_ids, Contents.of(plan.evaluation.rollouts))
    return Attribution(result, update.given, *of, slopes.scores, tokens, covariances, prompts, errors, layers)


def _rounding(policy: Policy, dtypes: Iterable[torch.dtype]) -> float:
    """The relative spacing of numbers in the coarsest of some types, and of autocast."""
    also = [torch.bfloat16] if policy.config.autocast == "bfloat16" else []
    return max(torch.finfo(dtype).eps for dtype in (*dtypes, *also))


def _tokens(prediction: Prediction) -> tuple[TokenSlopes, Tensor, OwnTerms | None]:
    """Slopes along the entropy gradient, contributions of tokens, and, by one batch, what was left out of these."""
    plan, policy, update = prediction.plan, prediction.plan.policy, prediction.plan.batch.update
    step, total_weight, local = plan.step, plan.before.sums.size.sum().item(), update.local
    assert step.gradient_scale is not None
    assert prediction.by_prompt is not None
    direction = scaled(prediction.slope.total, step.gradient_scale, -step.gradient.factor / total_weight)
    trial = max(
        TRIAL_TOLERANCE, UNITS_OF_ROUNDING * _rounding(policy, (dtype for _, dtype in precisions(policy.model)))
    )
    with policy.clock.phase("attribution") as progress, policy.on_rank(local):
        method = slope_method(policy.scorer, update.rollouts, policy.parameters, direction, trial)
        own = method.along(direction, update.own, progress)
    own_tokens, left_out = token_contributions(plan.batch.loss, own.slopes), None
    if isinstance(prediction, OwnPrediction):
        left_out = own_terms(prediction, method)
        own_tokens = left_out.others(own_tokens)
    slopes, scores = whole_scores(policy, local, own.slopes), whole_scores(policy, local, own.scores)
    tokens = over_tokens(policy, local, own_tokens)
    tokens = _reconciled(tokens, update.prompts, prediction.by_prompt, trial)
    return TokenSlopes(slopes, scores, own.method), tokens, left_out


def _layers(prediction: Prediction, left_out: OwnTerms | None) -> tuple[LayerShare, ...]:
    """Inner products of the entropy gradient with each part of the step, by layer and module."""
    plan = prediction.plan
    components, total_weight = plan.step.components, plan.before.sums.size.sum().item()
    sums: dict[tuple[str, str], list[float]] = {}
    for name, p in plan.policy.parameters.items():
        row = sums.setdefault(layer_and_module(name), [0.0] * (1 + len(PARTS)))
        row[0] += p.numel()
        slope = prediction.slope.total[name]
        if slope is None:
            continue
        x = slope.reshape(-1).double() / total_weight
        for k, part in enumerate(PARTS, start=1):
            if part in components:
                share = torch.dot(x, components[part][name].reshape(-1).double()).item()
                if part == "gradient" and left_out is not None:
                    share = left_out.others_of(name, share)
                row[k] += share
    return tuple(LayerShare(*key, int(count), *parts) for key, (count, *parts) in sums.items())


def _usual_folds(prediction: Prediction) -> int | None:
    plan = prediction.plan
    kept = all(plan.policy.ranks.gather(plan.batch.gradient.stored is not None))
    least = 2 * USUAL_FOLDS if isinstance(prediction, OwnPrediction) else USUAL_FOLDS
    return USUAL_FOLDS if kept and plan.evaluation.clusters.count >= least else None


def _fold_errors(prediction: Prediction, folds: int) -> Tensor:
    """Standard errors of the prompts' contributions, from the entropy gradient of one fold at a time."""
    plan, policy, evaluation = prediction.plan, prediction.plan.policy, prediction.plan.evaluation
    local, table = evaluation.local, plan.before.sums.table
    surrogate, fold_of = entropy_surrogate(plan, prediction.horizon), torch.arange(evaluation.clusters.count) % folds
    sums = ClusterSums(table.new_zeros(len(table), folds).index_add_(1, fold_of, table))
    numerators = []
    for fold in range(folds):
        rows = (fold_of[local.clusters.index] == fold).nonzero()[:, 0]
        own, side = LocalRows(local.rows[rows], local.size, local.clusters.select(rows)), Side(surrogate.select(rows))
        with policy.clock.phase("attribution folds") as progress:
            slope = differentiate(policy, evaluation.own.select(rows), own, side, progress=_unreported)
            progress(fold + 1, folds)
        numerators.append(prompt_contributions(plan, slope, 1.0))
    products, lengths = torch.stack(numerators), _length_changes_by_prompt(prediction)
    if not isinstance(prediction, OwnPrediction):
        return fold_errors(products, [sums] * products.shape[1], lengths)
    assert prediction.by_prompt is not None
    others = others_only(products, sums, plan.before.sums, prediction.by_prompt, fold_of)
    return fold_errors(*others, lengths)


def _length_changes_by_prompt(prediction: Prediction) -> Tensor:
    """The relative first-order change of the mean length by each prompt's part of the step, ``[B]``."""
    plan, ranks, own = prediction.plan, prediction.plan.policy.ranks, prediction.length_slope
    lengths = plan.before.lengths
    if lengths is None or own is None:
        return torch.zeros(plan.batch.update.prompts.count, dtype=torch.float64)
    whole = replace(own, total=ranks.sum_vector(own.total, plan.policy.parameters))
    tokens = ranks.sum(torch.tensor([lengths.tokens], dtype=torch.float64)).item()
    return prompt_contributions(plan, whole, tokens)


def _check_sums(
    prediction: Prediction, tokens: Tensor, layers: tuple[LayerShare, ...], parts: Mapping[str, float]
) -> None:
    """Tokens and layers must sum to the parts of the prediction, which are sums over evaluation clusters."""
    policy, change = prediction.plan.policy, prediction.change
    dtypes = (p.dtype for p in policy.parameters.values())
    tolerance = max(SUM_TOLERANCE, UNITS_OF_ROUNDING * _rounding(policy, dtypes))
    by_cluster = (change.value + change.influence).abs().mean()
    terms = {f"layers ({part})": (_column(layers, part), value) for part, value in parts.items()}
    for what, (values, total) in (terms | {"tokens": (tokens, parts["gradient"])}).items():
        sum_of_values = values.sum().item()
        if abs(sum_of_values - total) > tolerance * (values.abs().sum() + by_cluster).item():
            raise RuntimeError(
                f"attribution: {what} sum to {sum_of_values:.9g}, not to {total:.9g} as predicted; please report this"
            )


def _unreported(done: int, total: int) -> None:
    """Progress within a fold, which nobody needs to see."""


def _reconciled(tokens: Tensor, prompts: Clusters, by_prompt: Tensor, tolerance: float) -> Tensor:
    """Tokens that sum to what backward passes say of each prompt, once it is sure that only rounding is in between.

    The rest is spread over the prompt's tokens in proportion to their size, below each one's own rounding.
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
