"""How much to draw of the evaluation batch, and how, by what a pilot says.

The pilot is no part of the batch. Its size depends on what the pilot measured, and a mean that contains the pilot would
be pulled away from 0 by twice the square of the relative error asked for (``docs/theory.md``, "A size from a wish").
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from entropy_probe.cli.output import Pilot
from entropy_probe.estimators.draws import best_draws
from entropy_probe.report.numbers import format_percent
from entropy_probe.results.note import NOTHING_TO_DO, NoteKind
from entropy_probe.results.size import SAMPLING, seconds_per_sequence, size_for

if TYPE_CHECKING:
    from entropy_probe.results.probe import ProbeResult
    from entropy_probe.rollouts.batch import Rollouts
    from entropy_probe.sampling import EvaluationSettings

SIZED = NoteKind(
    "sized_by_pilot",
    "evaluation: by a pilot of {pilot} sequences {said}; {drawn}",
    f"{NOTHING_TO_DO} For a smaller error lower evaluation.relative_error, or raise evaluation.max_minutes where that "
    "is what stopped it.",
)


def decide(settings: EvaluationSettings, source: int, result: ProbeResult, pilot: Rollouts, seconds: float) -> Pilot:
    """What to draw of ``source`` prompts, by the probe of a pilot that took so many seconds to sample.

    Raises:
        ValueError: if the pilot does not say what is asked of it.
    """
    draws, said, scale = _draws(settings, result, pilot)
    sequences = settings.total_sequences or (settings.num_prompts or 0) * (draws or 1)
    if settings.relative_error is not None:
        sequences, words = _for_error(settings.relative_error, result, len(pilot), scale)
        said.append(words)
    if settings.max_minutes is not None:
        affordable = _affordable(settings.max_minutes, result, len(pilot), seconds)
        if settings.relative_error is None or affordable < sequences:
            said.append(f"{settings.max_minutes:g} minutes buy {affordable:,} sequences")
            sequences = affordable
    limit = ""
    if draws is not None and settings.num_prompts is None and sequences > source * draws:
        draws = math.ceil(sequences / source) if settings.draws_per_prompt == "auto" else draws
        sequences, limit = source * draws, f", all {source} prompts of the source"
    sized = settings.sized(sequences, draws)
    number = sized.num_clusters or 0
    drawn = f"{number:,} single draws" if draws is None else f"{number:,} prompts with {draws} draws each"
    note = SIZED(pilot=len(pilot), said="; ".join(said), drawn=f"{drawn} were taken{limit}")
    return Pilot(sequences=number * (draws or 1), draws=draws, notes=(note,))


def _for_error(relative_error: float, result: ProbeResult, pilot: int, scale: float) -> tuple[int, str]:
    size, share = size_for(result, relative_error), f"{relative_error:.3g}"
    if size is None:
        raise ValueError(
            "evaluation.relative_error: expected a change that the pilot predicts, got exactly 0; set total_sequences"
        )
    sequences = max(pilot, math.ceil(scale * size.sequences))
    if size.at_least:
        words = f"a relative error of {share} takes {sequences:,} sequences for the largest change it may be"
        return sequences, f"the change is not told from 0; {words}, more for a smaller one"
    return sequences, f"a relative error of {share} takes about {sequences:,} sequences"


def _draws(settings: EvaluationSettings, result: ProbeResult, pilot: Rollouts) -> tuple[int | None, list[str], float]:
    """Draws per prompt, what is to be said of that, and the variance of that many over that of the pilot's."""
    asked = settings.draws_per_prompt
    if asked != "auto":
        return asked, [], 1.0
    if result.draws is None:
        status = "none" if result.realized is None else result.realized.status
        raise ValueError(
            "evaluation.draws_per_prompt: expected a change of the pilot that per-decision weights measure, to compare "
            f"responses to one prompt on, got status {status}; set a number in place of auto, such as 4"
        )
    responses = pilot.response_lengths.double().mean().item()
    prompts = pilot.attention_mask.sum(1).double().mean().item() - responses
    share = result.draws.between_share
    draws = best_draws(share, prompts, responses)
    used = max(share, 0.0)
    scale = (1 + (draws - 1) * used) / (1 + (result.draws.per_prompt - 1) * used)
    said = (
        f"prompts explain {format_percent(share)} of the variance, and have {prompts:.0f} tokens to responses of "
        f"{responses:.0f}, for which {draws} draws per prompt are best"
    )
    return draws, [said], scale


def _affordable(minutes: float, result: ProbeResult, pilot: int, seconds: float) -> int:
    """Sequences that can be sampled and probed in what the pilot has left of a time; at least as many as it had."""
    each = seconds_per_sequence(result.model_copy(update={"timing": result.timing | {SAMPLING: seconds}}))
    left = 60 * minutes - seconds - sum(result.timing.values())
    return max(pilot, int(left / (each or 1.0)))
