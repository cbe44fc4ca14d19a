"""One batch: predict the entropy change of a step from the very rollouts it is taken on, without their shared bias."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from entropy_probe.analyses.admission import draws_of
from entropy_probe.analyses.assemble import assemble
from entropy_probe.analyses.batches import admitted
from entropy_probe.analyses.before import chosen_clusters
from entropy_probe.analyses.gradient import whole_scores
from entropy_probe.analyses.not_modelled import of_frozen_geometry, of_model
from entropy_probe.analyses.policy import Policy
from entropy_probe.analyses.reference import with_reference
from entropy_probe.config import ProbeConfig
from entropy_probe.estimators import first_order as fo
from entropy_probe.estimators.baselines import PositionSums
from entropy_probe.estimators.u_statistic import CrossStatistic, cross_statistic, influence_of_sums
from entropy_probe.gradients.cross import CrossProducts, cross_products, own_products
from entropy_probe.gradients.hooks import Hooks
from entropy_probe.gradients.per_sample import Side, sample_gradients
from entropy_probe.losses.pieces import gap, is_one
from entropy_probe.named import NamedVector, norm
from entropy_probe.parallel.batch import LocalRows, add_up
from entropy_probe.results.note import NoteKind
from entropy_probe.results.probe import CrossPrompt, PreconditionerReport, ProbeResult
from entropy_probe.rollouts.batch import Rollouts
from entropy_probe.types import Clusters, TokenCoefficients, TokenScores

MAX_CLUSTERS = 128
"""More prompts than this are put into blocks, unless asked otherwise."""
MIN_BLOCKS = 16
"""Fewer blocks than this would give a poor standard error; a number of prompts that allows no more is left whole."""
SHARE_FOR_LENGTH, MIN_FOR_LENGTH = 1 / 16, 4
"""The clusters, half of them at most, that the change of the mean length is taken from; it multiplies an error only."""
SUSPICIOUS_RATIO = 1e3
"""P should change the scale of the statistic by no more than this."""
LARGE_SCALE = NoteKind(
    "large_scale",
    "the preconditioner scales the product of the mean gradients by {ratio:.3g}: a few elements with tiny second "
    "moments may dominate; lower frozen_max_scale and compare",
    "Lower probe.frozen_max_scale and see whether the number moves.",
)


@dataclass(frozen=True, eq=False)
class _Batch:
    """The batch, as given and as counted, and its clusters: prompts, or blocks of them."""

    given: Rollouts
    rollouts: Rollouts
    prompts: Clusters
    block_size: int
    clusters: Clusters
    local: LocalRows


def one_batch(policy: Policy, batch: Rollouts) -> ProbeResult:
    """The U-statistic of a batch of prompts with a group of responses each, with H and the diagnostics."""
    config, ranks, whole = policy.config, policy.ranks, _admitted(policy, batch)
    clusters, local, own = whole.clusters, whole.local, whole.local.select(whole.rollouts)
    policy.prepare(whole.rollouts)
    whole = replace(whole, given=with_reference(policy, whole.given, whole.rollouts, local))
    hooks = policy.choose_hooks(whole.rollouts)
    scale, report = policy.frozen_scale()
    rate = max(policy.learning_rates)
    relative = {name: s / rate for name, s in scale.items()}
    before = _scores(policy, whole)
    by_prompt, positions = (
        add_up(ranks, fo.entropy(before, whole.prompts.select(local.rows), config.normalization, config.entropy)),
        add_up(ranks, PositionSums.of(before)),
    )
    how = (config.normalization, config.entropy, draws_of(whole.rollouts).select(local.rows))
    towards = fo.entropy_coefficients(before, own.prompt_ids, local.clusters, positions, *how)
    loss = _loss(policy, whole, before)
    left, right = _times(towards, -clusters.count / by_prompt.size.sum().item()), _times(loss, -float(clusters.count))
    with policy.clock.phase("cross-prompt gradients") as progress:
        products = cross_products(
            policy.scorer,
            policy.parameters,
            own,
            local.local_clusters,
            clusters.count,
            # mean X = -grad H and mean Y = -grad loss, over clusters
            left,
            right,
            relative,
            hooks=hooks,
            max_bytes=config.max_stored_gradient_gib * 2**30,
            progress=progress,
            ranks=ranks,
        )
    slope = _length_slope(policy, whole, before, positions, right, products, relative, hooks)
    by_cluster = local.by_cluster(torch.stack([products.left, products.right, products.diagonal]))
    x_side, y_side, diagonal = ranks.sum(by_cluster)
    statistic = cross_statistic(x_side, y_side, diagonal, _of_sums(policy, whole, before, slope))
    cross = _record(policy, whole, statistic, products, report)
    ascent = {name: g / clusters.count for name, g in products.right_total.items()}
    step = {name: scale[name] * g for name, g in ascent.items()}
    diagnostics = {"gradient_norm": norm(ascent), "clip_factor": 1.0, "step_norm": norm(step)}
    trained = (policy.parameters, policy.optimizer)
    policy.log.not_modelled += of_frozen_geometry(*trained, norm(ascent), config.max_grad_norm)
    given = (by_prompt.ratio(), whole.prompts, whole.rollouts, whole.rollouts, diagnostics)
    return assemble(policy, *given, unit="prompt", cross_prompt=cross)


def _loss(policy: Policy, whole: _Batch, before: TokenScores) -> TokenCoefficients:
    """Coefficients of this rank's rows, of a step that must be the first on these rollouts."""
    loss, given, local = policy.config.loss, whole.given, whole.local
    scores = None
    if loss.needs_scores(given):
        scores = whole_scores(policy, local, before)
        if given.old_logprobs is not None and not is_one(gap(scores.logprobs, given.old_logprobs, given.response_mask)):
            raise ValueError(
                "one batch: expected the first step on fresh rollouts, got old_logprobs that are not the policy's: "
                "earlier steps were fitted to these responses, which biases every number from them; predict from two "
                "batches"
            )
    policy.log.notes += loss.notes(given, scores)
    return loss.coefficients(given, scores).select(local.rows)


def _record(
    policy: Policy, whole: _Batch, statistic: CrossStatistic, products: CrossProducts, report: PreconditionerReport
) -> CrossPrompt:
    """The record of the statistic, as a change by one step."""
    rate, count = max(policy.learning_rates), whole.clusters.count
    return CrossPrompt(
        delta_h1=-rate * statistic.value,
        se_plugin=rate * statistic.se_plugin,
        se_jackknife=rate * statistic.se_jackknife,
        unit=policy.unit,
        u_cross=statistic.value,
        zeta_plugin=statistic.zeta_plugin,
        zeta_jackknife=statistic.zeta_jackknife,
        bars_dot=statistic.bars_dot,
        bars_dot_ratio=_ratio_to_unscaled(policy, statistic.bars_dot, products.unscaled_total / count**2),
        diagonal=statistic.diagonal,
        row_means=tuple(statistic.row_means.tolist()),
        num_clusters=count,
        mode="exact" if whole.block_size == 1 else "block",
        block_size=whole.block_size,
        learning_rate=rate,
        gradients=products.how,
        preconditioner=report,
    )


def _admitted(policy: Policy, batch: Rollouts) -> _Batch:
    given = batch.cpu()
    policy.config.loss.check_model(getattr(policy.model, "config", None))
    policy.log.not_modelled += of_model(policy.model)
    rollouts = admitted(policy, given, "batch")
    prompts = Clusters.prompts(rollouts.prompt_ids)
    block_size = _block_size(prompts.count, policy.config)
    clusters = Clusters(prompts.index // block_size, prompts.count // block_size)
    policy.check_ranks_agree(batch=rollouts)
    answered = prompts.index[rollouts.response_mask.any(1)]
    if policy.config.entropy == "surprisal" and bool((answered.bincount(minlength=prompts.count) < 2).any()):
        raise ValueError(
            "one batch: expected at least 2 responses per prompt for the surprisal baseline, got a prompt with 1; "
            "sample more, or use entropy='rao_blackwell'"
        )
    return _Batch(
        given, rollouts, prompts, block_size, clusters, LocalRows.of(rollouts, clusters, clusters, policy.ranks)
    )


def _scores(policy: Policy, whole: _Batch) -> TokenScores:
    """Of this rank's rows of the batch, which the policy itself must have sampled."""
    scores = policy.reference_scores(whole.rollouts, whole.local, "score batch")
    if policy.check_rollouts("batch", scores, whole.local, whole.rollouts).log_weights is not None:
        raise ValueError(
            "one batch: expected rollouts of the policy itself, got those of another: the update takes them as "
            "they are, so they cannot be reweighted; predict from two batches"
        )
    return scores


def _of_sums(policy: Policy, whole: _Batch, before: TokenScores, slope: float) -> Callable[[float], Tensor]:
    """What each cluster does to the statistic through the batch's sums, from the statistic."""
    config, of_loss = policy.config, whole.given.response_lengths.double()
    sums = add_up(policy.ranks, fo.entropy(before, whole.local.clusters, config.normalization, config.entropy))
    if not config.loss.per_token:
        of_loss = torch.ones_like(of_loss)
    return lambda value: influence_of_sums(value, sums.size, whole.clusters.total(of_loss), sums.ratio(), slope)


def _length_slope(
    policy: Policy,
    whole: _Batch,
    before: TokenScores,
    positions: PositionSums,
    right: TokenCoefficients,
    products: CrossProducts,
    relative: dict[str, Tensor],
    hooks: Hooks | None,
) -> float:
    """How the statistic changes per nat of H: some clusters' length gradients along ``P mean Y`` of all others."""
    if policy.config.normalization != "token":
        return 0.0
    count, local = whole.clusters.count, whole.local
    number = min(count // 2, max(MIN_FOR_LENGTH, round(SHARE_FOR_LENGTH * count)))
    some = chosen_clusters(whole.rollouts, whole.clusters, number)
    rows = torch.isin(local.clusters.index, some).nonzero()[:, 0]
    chosen, own = before.select(rows), local.select(whole.rollouts).select(rows)
    here, clusters = local.local_clusters[rows].unique(return_inverse=True)
    lengths = fo.length_coefficients(chosen, local.clusters.select(rows), positions)
    toward = {name: relative[name] * y for name, y in products.right_total.items()}
    given = (policy.scorer, policy.parameters, own)
    with policy.clock.phase("length gradient") as progress, policy.on_rank(local):
        if not len(rows):
            along = torch.zeros((), dtype=torch.float64)
        elif products.right_stored is not None:
            side = Side(lengths, directions=[toward], pair_with=products.right_stored[here][None])
            (of_length,) = sample_gradients(*given, clusters, [side], hooks=hooks, progress=progress)
            along = (of_length.dots - of_length.paired).sum()
        else:
            to_others = partial(_less_own, toward, relative)
            pairs, _ = own_products(*given, clusters, lengths, right.select(rows), {}, to_others)
            along = pairs.sum()
    tokens = fo.sequence_weights(chosen, "token").sum()
    along, tokens = policy.ranks.sum(torch.stack([along, tokens.double()])).tolist()
    return along / tokens / (count - 1)


def _less_own(toward: NamedVector, scale: NamedVector, _unit: int, own: NamedVector) -> list[NamedVector]:
    """``P sum Y`` without a cluster's own."""
    return [{name: t - scale[name] * own[name] if name in own else t for name, t in toward.items()}]


def _block_size(count: int, config: ProbeConfig) -> int:
    """Prompts per cluster."""
    asked = config.block_size
    if config.one_batch_units == "exact":
        if asked not in (None, 1):
            raise ValueError(f"block_size: expected 1 or nothing with one_batch_units 'exact', got {asked}")
        return 1
    divisors = [size for size in range(1, count + 1) if count % size == 0]
    if asked is not None:
        if asked > count or count % asked:
            raise ValueError(
                f"block_size: expected a divisor of the {count} prompts of the batch, got {asked}; use one of "
                f"{', '.join(map(str, divisors[:-1]))}"
            )
        return asked
    if config.one_batch_units == "auto" and count <= MAX_CLUSTERS:
        return 1
    fitting = [size for size in divisors if size > 1 and MIN_BLOCKS <= count // size <= MAX_CLUSTERS]
    if not fitting and config.one_batch_units == "block":
        raise ValueError(
            f"one_batch_units 'block': expected a number of prompts that makes {MIN_BLOCKS} to "
            f"{MAX_CLUSTERS} equal blocks, got {count}; set block_size, or use 'exact'"
        )
    return fitting[0] if fitting else 1


def _ratio_to_unscaled(policy: Policy, bars_dot: float, unscaled: float) -> float | None:
    """The product of the mean gradients over what it is without P."""
    if unscaled == 0:
        return None
    ratio = bars_dot / unscaled
    if abs(ratio) > SUSPICIOUS_RATIO:
        policy.log.notes.append(LARGE_SCALE(ratio=ratio))
    return ratio


def _times(coefficients: TokenCoefficients, factor: float) -> TokenCoefficients:
    entropies = None if coefficients.entropies is None else factor * coefficients.entropies
    return TokenCoefficients(factor * coefficients.logprobs, entropies)
