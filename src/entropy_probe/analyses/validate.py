"""Do contributions forecast real steps? Steps on random halves of the update batch, taken and measured.

This is the linear datamodeling score (Park et al., 2023) with the policy's entropy as the output. Formulas:
``docs/theory.md``, "Validation".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache

import torch
from jaxtyping import Bool
from torch import Tensor

from entropy_probe.analyses.attribution import Contributions
from entropy_probe.analyses.batches import UpdateBatch, admit_batches
from entropy_probe.analyses.before import entropy_coefficients
from entropy_probe.analyses.evaluation_part import EvaluationPart, halved
from entropy_probe.analyses.gradient import differentiate, whole_scores
from entropy_probe.analyses.measure import after_step, fresh_scores
from entropy_probe.analyses.overlap import Contents, shared
from entropy_probe.analyses.own_batch import admit_own
from entropy_probe.analyses.own_influence import OwnInfluence
from entropy_probe.analyses.plan import Plan, plan
from entropy_probe.analyses.policy import Policy
from entropy_probe.analyses.predict import prompt_contributions
from entropy_probe.analyses.provenance import Clock
from entropy_probe.analyses.realized import Measurement, measure_change
from entropy_probe.analyses.reduced import step_on
from entropy_probe.estimators.attribution import rank_correlation
from entropy_probe.estimators.published import PUBLISHED
from entropy_probe.estimators.validation import Changes, Forecast, reliability, score, times_as_many
from entropy_probe.gradients.per_sample import SampleGradients, Side, stored_bytes
from entropy_probe.results.note import Note, NoteKind, distinct
from entropy_probe.results.validation import MIN_STEPS, MeasuredStep, RankCorrelation, SubsetStep, Validation
from entropy_probe.rollouts.batch import Rollouts
from entropy_probe.steps.adamw import is_adam
from entropy_probe.steps.copied import optimizer_name
from entropy_probe.steps.plan import PlannedStep

MIN_PROMPTS = 4
MIN_RELIABILITY, WANTED_RELIABILITY = 0.8, 0.9
ROUNDING = 1e-9
"""A sum over a prompt's tokens below this share of the sum of their sizes is none."""
FEW_HALVES = NoteKind(
    "few_halves",
    "{moving} update prompts with a gradient have {halves} different halves, fewer than the {asked} asked for",
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
    "Raise evaluation.total_sequences many times over; with mode one_batch, give evaluation rollouts.",
)
LOW_RELIABILITY = NoteKind(
    "low_reliability",
    "the measured changes have a reliability of {reliability:.2f}, which bounds what any forecast of them reaches; "
    "about {sequences:,.0f} evaluation sequences would bring it to {wanted:g}",
    "Use that many evaluation sequences (evaluation.total_sequences; with mode one_batch, give some), or read the "
    "correlations without noise.",
)


def check_halves(prompts: int, subsets: int) -> None:
    """Make sure that there is something to take halves of, and that enough are asked for."""
    if prompts < MIN_PROMPTS:
        raise ValueError(
            f"validate: expected at least {MIN_PROMPTS} update prompts to take halves of, got {prompts}; use a "
            "larger update batch"
        )
    if subsets < MIN_STEPS:
        raise ValueError(f"subsets: expected at least {MIN_STEPS}, got {subsets}")


def distinct_halves(moving: Bool[Tensor, " B"], subsets: int, seed: int) -> list[Tensor]:
    """Random halves of the prompts, rounded down, whose steps all differ.

    Halves that differ only in prompts without a gradient, those that are not ``moving``, give the same step and count
    as one.

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
class _Question:
    """The contributions in question, and what they are compared with."""

    contributions: Contributions
    plan: Plan
    crossed: bool  # whether half of the evaluation batch judges the other half, as where the attribution has it too
    by_token: dict[str, Tensor]  # what else is said to forecast the change, of each response token, [N, L], by name


def validate(
    policy: Policy,
    contributions: Contributions,
    evaluation: Rollouts | None,
    subsets: int,
    seed: int,
    *,
    finished: Sequence[MeasuredStep] = (),
    on_step: Callable[[MeasuredStep], None] | None = None,
) -> Validation:
    """Steps on random halves of the update batch; see :meth:`entropy_probe.EntropyProbe.validate`."""
    progress = policy.clock.progress
    policy = replace(policy, clock=Clock(None))  # progress is that of the halves, not of each one's scoring
    given = contributions.update
    update, batch = admit_own(policy, given) if evaluation is None else admit_batches(policy, given, evaluation)
    if policy.config.geometry != "frozen" and not is_adam(policy.optimizer):
        raise ValueError(
            "validate: expected the optimizer of the attribution, Adam or AdamW, got "
            f"{optimizer_name(policy.optimizer)}; validate with the probe that attributed"
        )
    check_halves(update.prompts.count, subsets)
    planned = plan(policy, update, batch)
    moving = policy.ranks.sum(update.local.clusters.total(planned.batch.loss.size.sum(1))) > 0
    kept_prompts = distinct_halves(moving, subsets, seed)
    if len(kept_prompts) < subsets:
        policy.log.notes.append(FEW_HALVES(moving=int(moving.sum()), halves=len(kept_prompts), asked=subsets))
    question = _Question(contributions, planned, _crossed(contributions, planned), _by_token(policy, update))
    scores, rows, own = planned.before.scores, torch.arange(len(batch.local.rows)), evaluation is None
    whole = EvaluationPart(rows, batch.local, scores, planned.before.positions, torch.arange(batch.clusters.count))
    halves = halved(batch.clusters, batch.local, scores, policy.ranks, seed)
    by_half = torch.stack([_contributions(planned, half, contributions.horizon, own=own) for half in halves])
    parts = [(part, _own_influence(planned, part) if own else None) for part in (whole, *halves)]
    known = _known(finished, kept_prompts, halves)
    measured: list[MeasuredStep] = []
    for kept in kept_prompts:
        step = known.get(tuple(kept.tolist()))
        if step is None:
            step = _measured(planned, parts, kept)
            if on_step:
                on_step(step)
        measured.append(step)
        if progress:
            progress("subsets", len(measured), len(kept_prompts))
    return _judged(question, kept_prompts, measured, by_half, seed)


def _known(
    finished: Sequence[MeasuredStep], kept_prompts: Sequence[Tensor], halves: Sequence[EvaluationPart]
) -> dict[tuple[int, ...], MeasuredStep]:
    """Steps of an interrupted validation, by the prompts they were taken on."""
    expected = {tuple(kept.tolist()) for kept in kept_prompts}
    sizes = [half.local.clusters.count for half in halves]
    for step in finished:
        influences = step.influences
        if step.kept not in expected or (influences and [*map(len, influences)] != sizes):
            raise ValueError(
                "finished: expected steps on halves of these batches, with the influences of their clusters, got "
                f"another on prompts {step.kept!s:.60}; validate again"
            )
    return {step.kept: step for step in finished}


def _crossed(given: Contributions, planned: Plan) -> bool:
    """Whether sequences that the changes are measured on are among those that the contributions are from."""
    evaluation, contents = planned.evaluation, Contents.of(planned.evaluation.rollouts)
    logprobs = planned.policy.sequence_logprobs(evaluation.local, planned.before.scores)
    return contents.same_as(given.evaluation) or shared(contents, logprobs, given.evaluation).significant


def _by_token(policy: Policy, update: UpdateBatch) -> dict[str, Tensor]:
    """What published scores and the advantages say of each update token, ``[N, L]``, by name."""
    own = policy.reference_scores(update.rollouts, update.local, "score update")
    scores, advantages = whole_scores(policy, update.local, own), update.rollouts.token_advantages.double()
    return {name: forecast(advantages, scores) for name, forecast in PUBLISHED.items()} | {"advantages": advantages}


def _forecasts(question: _Question, seed: int) -> dict[str, Tensor]:
    """What each update prompt is said to add to the change, ``[B]``, by name."""
    prompts = question.plan.batch.update.prompts
    forecasts = {"contributions": question.contributions.prompts}
    for name, tokens in question.by_token.items():
        sums, sizes = (prompts.total(x.sum(1)) for x in (tokens, tokens.abs()))
        # what centring leaves of a sum over equal lengths is rounding
        forecasts[name] = torch.where(sums.abs() > ROUNDING * sizes, sums, 0.0)
    generator = torch.Generator().manual_seed(seed)
    return forecasts | {"random": torch.randn(prompts.count, generator=generator, dtype=torch.float64)}


def _slope(planned: Plan, part: EvaluationPart, horizon: int | None, *, store: bool) -> SampleGradients:
    """The entropy gradient of a part of the evaluation batch, with that of each of its clusters to be kept."""
    policy, evaluation = planned.policy, planned.evaluation
    rollouts, draws = evaluation.own.select(part.rows), evaluation.draws.select(evaluation.local.rows[part.rows])
    given = (part.scores, rollouts.prompt_ids, part.local.clusters, draws, part.positions, policy.config)
    if store:  # beside the shares of the update gradient, and what is left of the whole batch and of the other half
        size = stored_bytes(policy.parameters, 4 * evaluation.clusters.count)
        store = size <= policy.config.max_stored_gradient_gib * 2**30
    side, hooks = Side(entropy_coefficients(*given, horizon), store=store), planned.hooks if store else None
    with policy.clock.phase("evaluation gradient") as progress:
        return differentiate(policy, rollouts, part.local, side, progress=progress, hooks=hooks)


def _own_influence(planned: Plan, part: EvaluationPart, horizon: int | None = None) -> OwnInfluence:
    return OwnInfluence.of(planned, part, _slope(planned, part, horizon, store=True))


def _contributions(planned: Plan, half: EvaluationPart, horizon: int | None, *, own: bool) -> Tensor:
    """The contributions of the update prompts by one half of the evaluation batch, ``[B]``.

    With ``own``, where that is the batch of the step, by the responses of others.
    """
    slope = _slope(planned, half, horizon, store=own)
    size = half.sizes(planned.policy).sum().item()
    contributions = prompt_contributions(planned, slope, size)
    if own:
        contributions[half.clusters] -= OwnInfluence.of(planned, half, slope).along(planned.step) / size
    return contributions


Parts = Sequence[tuple[EvaluationPart, OwnInfluence | None]]
"""The whole evaluation batch and its halves, each with what prompts do to their own responses where they are in it."""


def _measured(planned: Plan, parts: Parts, kept: Tensor) -> MeasuredStep:
    """The entropy change measured after the step on some of the prompts, or why there is none."""
    rows, step = tuple(kept.tolist()), step_on(planned, kept)
    try:
        measured = _measure_parts(planned, step, parts)
    except ValueError as error:  # the same batch was scored before the step: what fails now is the step's doing
        return MeasuredStep(kept=rows, failure=str(error))
    changes = []
    for (_, own), each in zip(parts, measured, strict=True):
        if each.change is None:
            assert each.note is not None
            return MeasuredStep(kept=rows, failure=each.note.text)
        changes.append(each.change if own is None else own.left_out(each.change, step, kept))
    whole, one, other = changes
    return MeasuredStep(
        kept=rows,
        change=whole.value,
        by_half=(one.value, other.value),
        influences=(tuple(one.influence.tolist()), tuple(other.influence.tolist())),
    )


def _measure_parts(planned: Plan, step: PlannedStep, parts: Parts) -> list[Measurement]:
    """The change on each part of the evaluation batch, from one scoring."""
    config, ranks, measured = planned.policy.config, planned.policy.ranks, []
    with after_step(planned, step, config.learning_rate, "score after steps") as (after, _):
        fresh = cache(lambda: fresh_scores(planned))
        for part, _ in parts:
            given = (part.scores, after.select(part.rows), part.local, part.positions, config, ranks)
            measured.append(measure_change(*given, lambda rows=part.rows: fresh().select(rows)))
    return measured


def _judged(
    question: _Question, kept_prompts: list[Tensor], results: list[MeasuredStep], by_half: Tensor, seed: int
) -> Validation:
    """The rank correlations over the steps that were measured, and what to know about the others."""
    policy, update, evaluation = question.plan.policy, question.plan.batch.update, question.plan.evaluation.rollouts
    forecasts, notes = _forecasts(question, seed), policy.log.notes
    kept = torch.stack([torch.isin(torch.arange(update.prompts.count), rows) for rows in kept_prompts]).double()
    summed = {name: kept @ by_prompt for name, by_prompt in forecasts.items()}
    halves = kept @ by_half.T
    steps = _steps(update.rollouts.prompt_ids.unique(), results, summed, halves)
    measured = [each for each in results if each.failure is None]
    failures = [each.failure for each in results if each.failure is not None]
    if failures:
        notes.append(NOT_MEASURED(failed=len(failures), steps=len(steps), reason=failures[0]))
    known, correlations = None, dict.fromkeys(forecasts)
    if len(measured) < MIN_STEPS:
        notes.append(NO_CORRELATION(least=MIN_STEPS, measured=len(measured)))
    else:
        rows = torch.tensor([k for k, each in enumerate(results) if each.failure is None])
        changes = _changes(measured)
        known = reliability(changes.halves, 1.0 if question.crossed else 2.0)
        notes += _about_reliability(known, len(evaluation))
        correlations = {
            name: _correlation(question, name, sums[rows], halves[rows].T, changes, seed)
            for name, sums in summed.items()
        }
    of_scorer = (note for of_rank in policy.ranks.gather(policy.scorer.notes) for note in of_rank)
    return Validation(
        unit=policy.unit,
        num_prompts=update.prompts.count,
        num_sequences=len(evaluation),
        seed=seed,
        measured_on="halves" if question.crossed else "others",
        reliability=known,
        correlations=correlations,
        over_tokens=_over_tokens(question),
        steps=steps,
        notes=distinct((*notes, *of_scorer)),
    )


def _steps(
    ids: Tensor, results: list[MeasuredStep], summed: dict[str, Tensor], halves: Tensor
) -> tuple[SubsetStep, ...]:
    """The record of every step."""
    return tuple(
        SubsetStep(
            kept=tuple(ids[list(each.kept)].tolist()),
            forecasts={name: sums[k].item() for name, sums in summed.items()},
            contributions_by_half=tuple(halves[k].tolist()),
            realized=each.change,
            realized_by_half=each.by_half,
            failure=each.failure,
        )
        for k, each in enumerate(results)
    )


def _correlation(
    question: _Question, name: str, sums: Tensor, halves: Tensor, changes: Changes, seed: int
) -> RankCorrelation | None:
    forecast = Forecast(sums)
    if name == "contributions":
        own = len(question.contributions.evaluation.sequences)
        times = 2 * own / len(question.plan.evaluation.rollouts)
        forecast = Forecast(sums, halves, None if question.crossed else times)
    correlation = score(forecast, changes, crossed=question.crossed, seed=seed)
    return None if correlation is None else RankCorrelation(**asdict(correlation))


def _over_tokens(question: _Question) -> dict[str, float | None]:
    """The rank correlation of each forecast of tokens with their contributions."""
    mask, contributions = question.plan.batch.update.rollouts.response_mask, question.contributions.tokens
    return {name: rank_correlation(values[mask], contributions[mask]) for name, values in question.by_token.items()}


def _about_reliability(known: float | None, sequences: int) -> list[Note]:
    """How many evaluation rollouts would do, where these do not."""
    if known is None or known >= MIN_RELIABILITY:
        return []
    if known <= 0:
        return [ONLY_NOISE()]
    needed = float(f"{times_as_many(known, WANTED_RELIABILITY) * sequences:.2g}")
    return [LOW_RELIABILITY(reliability=known, sequences=needed, wanted=WANTED_RELIABILITY)]


def _changes(measured: list[MeasuredStep]) -> Changes:
    whole = torch.tensor([each.change for each in measured], dtype=torch.float64)
    halves = torch.tensor([each.by_half for each in measured], dtype=torch.float64).T
    influences = [each.influences for each in measured if each.influences is not None]
    first, second = (torch.tensor([both[k] for both in influences], dtype=torch.float64) for k in (0, 1))
    return Changes(whole, halves.contiguous(), (first, second))
