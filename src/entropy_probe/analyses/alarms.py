"""What the records of a run warn of: found from the steps up to each one, so the same in a live run and afterwards.

A rate is judged against three of its own standard errors, since it is looked at again at every step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from statistics import fmean, median
from typing import NamedTuple, TypeVar

from entropy_probe.results.estimate import Unit
from entropy_probe.results.live import Alarm, StepRecord
from entropy_probe.results.note import Note, NoteKind
from entropy_probe.results.probe import BatchFit

Picked = TypeVar("Picked")

WINDOW = 3
"""Probed steps that a rate is the mean of."""
SEVERAL = 5
"""Steps that make up the beginning of a run, or over which a batch's misfit is looked at."""
LOGGED_WINDOW = 20
"""Steps that a rate is the slope of the logged entropy over, where none of them was probed."""
ERRORS = 3.0
COLLAPSE_STEPS, EXPLOSION_STEPS = 25, 150
"""How far ahead a fall to nothing, and a doubling, are warned of: policy gradients rarely raise entropy."""
LEAST_ESS = 0.5
NORM_FACTOR = 10.0
LEAST_MISMATCH, MISMATCH_FACTOR = 0.02, 2.0
MISFIT_ERRORS = 5.0
MOST_DISTANCE = 0.5

COLLAPSE = NoteKind(
    "collapse_ahead",
    "step {step}: at {rate:.5f} ± {error:.5f} {unit} a step, entropy ({entropy:.3g}) is gone in {steps:.0f} steps",
    "Lower the learning rate, or probe that step with attribution, to see which prompts and tokens do it.",
)
EXPLOSION = NoteKind(
    "explosion_ahead",
    "step {step}: at +{rate:.5f} ± {error:.5f} {unit} a step, entropy ({entropy:.3g}) doubles in {steps:.0f} steps",
    "Unless an entropy bonus asks for it, check the sign of advantages, the sampler's temperature, the learning rate.",
)
TOO_FAR = NoteKind(
    "step_too_far",
    "step {step}: the step moved the policy so far that {ess:.0%} of its responses still count for the policy after it",
    "Lower the learning rate, or clip the gradient.",
)
NORM = NoteKind(
    "gradient_norm_jump",
    "step {step}: the gradient's norm is {norm:.3g}, {times:.0f} times the median of the steps before",
    "Look at the step's rollouts and rewards; clip the gradient (max_grad_norm).",
)
STATE = NoteKind(
    "optimizer_state_lost",
    "step {step}: the optimizer has counted {counted:.0f} of the {taken:.0f} steps since step {before:.0f}",
    "If the run went on from a checkpoint there, its optimizer state was not loaded.",
)
COVERAGE = NoteKind(
    "optimizer_state_missing",
    "step {step}: {share:.1%} of the trained elements have a second moment, {before:.1%} had before",
    "If the run went on from a checkpoint there, its optimizer state was not loaded, or not all of it.",
)
MISMATCH = NoteKind(
    "sampler_mismatch_grows",
    "step {step}: the sampler is {now:.2g} nats per token from the policy, {first:.2g} in the first steps",
    "Check that the sampler gets the weights after every step, at the trainer's temperature.",
)
MISFIT = NoteKind(
    "batch_is_not_the_policys",
    "step {step}: its responses are not the policy's own: surprisal and entropy differ by {excess:+.2g} nats/token, "
    "{z:.1f} errors away",
    "Check that sampler and trainer have one temperature, the same weights, and no top-p or top-k.",
)
OTHER_LOSS = NoteKind(
    "gradient_is_not_of_the_loss",
    "step {step}: the trainer's gradient is {distance:.0%} of its length away from that of the loss as configured",
    "Something changes advantages, masks or the loss on the way: compare them with the trainer's settings.",
)


def alarms(records: Sequence[StepRecord]) -> tuple[Alarm, ...]:
    """Every warning of a run, one of each kind, by the step that it was first given at."""
    given: dict[str, list[tuple[int, Note]]] = {}
    for end, record in enumerate(records, 1):
        for note in alarms_now(records[:end]):
            given.setdefault(note.code, []).append((record.step, note))
    return tuple(
        Alarm(first=notes[0][0], last=notes[-1][0], holds=notes[-1][0] == records[-1].step, note=notes[0][1])
        for notes in given.values()
    )


def alarms_now(records: Sequence[StepRecord]) -> tuple[Note, ...]:
    """What the last of these steps, with those before it, warns of."""
    return tuple(note for check in CHECKS for note in check(records))


def _last(records: Sequence[StepRecord], count: int, pick: Callable[[StepRecord], Picked | None]) -> list[Picked]:
    """What is picked of the last steps that have it, in order."""
    picked = (value for record in reversed(records) if (value := pick(record)) is not None)
    return list(islice(picked, count))[::-1]


def _rates(records: Sequence[StepRecord]) -> Iterator[Note]:
    """Entropy that falls to nothing, or doubles, at the present rate."""
    probed = any(record.change for record in records[-LOGGED_WINDOW:])
    rate = _probed_rate(records) if probed else _logged_rate(records[-LOGGED_WINDOW:])
    if rate is None or abs(rate.value) <= ERRORS * rate.standard_error or rate.entropy <= 0:
        return
    steps = rate.entropy / abs(rate.value)
    values = {"step": records[-1].step, "rate": rate.value, "error": rate.standard_error, "unit": rate.unit}
    if rate.value < 0 and steps <= COLLAPSE_STEPS:
        yield COLLAPSE(**values, entropy=rate.entropy, steps=math.ceil(steps))
    elif rate.value > 0 and steps <= EXPLOSION_STEPS:
        yield EXPLOSION(**values, entropy=rate.entropy, steps=math.ceil(steps))


class _Rate(NamedTuple):
    """Change of entropy per step, with the entropy itself."""

    value: float
    standard_error: float
    entropy: float
    unit: Unit


def _probed_rate(records: Sequence[StepRecord]) -> _Rate | None:
    """The mean change of the last probed steps; None where the last was not probed."""
    last = records[-1]
    if last.change is None or last.entropy is None:
        return None
    changes = _last(records, WINDOW, lambda record: record.change)
    error = math.hypot(*(change.standard_error for change in changes)) / len(changes)
    return _Rate(fmean(change.value for change in changes), error, last.entropy.value, last.change.unit)


def _logged_rate(records: Sequence[StepRecord]) -> _Rate | None:
    """The slope of the logged entropy over these steps, its error by the scatter about the line, and the line's end."""
    points = [(record.step, h) for record in records if (h := record.logged("entropy")) is not None]
    if len(points) < LOGGED_WINDOW // 2 or points[-1][0] != records[-1].step:
        return None
    middle, mean = fmean(step for step, _ in points), fmean(h for _, h in points)
    across = sum((step - middle) ** 2 for step, _ in points)
    slope = sum((step - middle) * (h - mean) for step, h in points) / across
    scatter = sum((h - mean - slope * (step - middle)) ** 2 for step, h in points) / (len(points) - 2)
    return _Rate(slope, math.sqrt(scatter / across), mean + slope * (points[-1][0] - middle), "nats/token")


def _step_size(records: Sequence[StepRecord]) -> Iterator[Note]:
    last = records[-1]
    if last.ess is not None and last.ess < LEAST_ESS:
        yield TOO_FAR(step=last.step, ess=last.ess)
    *norms, now = _last(records, LOGGED_WINDOW, lambda record: record.number("gradient_norm")) or [0.0]
    usual = median(norms) if len(norms) >= SEVERAL else 0.0
    if usual and now > NORM_FACTOR * usual and last.number("gradient_norm") is not None:
        yield NORM(step=last.step, norm=now, times=now / usual)


def _optimizer(records: Sequence[StepRecord]) -> Iterator[Note]:
    """Steps that it did not count, and elements without a second moment."""
    last, state = records[-1], records[-1].optimizer_state
    if state is None:
        return
    for step, before in _last(records[:-1], 1, lambda r: r.optimizer_state and (r.step, r.optimizer_state)):
        if state.coverage < before.coverage:
            yield COVERAGE(step=last.step, share=state.coverage, before=before.coverage)
        counted, taken = state.steps[1] - before.steps[1], last.step - step
        if before.steps[1] and counted != taken:
            yield STATE(step=last.step, counted=max(0, counted), taken=taken, before=step)


def _sampler(records: Sequence[StepRecord]) -> Iterator[Note]:
    """A sampler that goes away from the policy, by its own log-probabilities or by the responses themselves."""
    last, now = records[-1], records[-1].number("mismatch")
    first = list(islice((m for record in records[:-1] if (m := record.number("mismatch")) is not None), SEVERAL))
    if now is not None and len(first) == SEVERAL:
        before = median(first)
        if now > max(MISMATCH_FACTOR * before, before + LEAST_MISMATCH):
            yield MISMATCH(step=last.step, now=now, first=before)
    fits = _last(records, SEVERAL, _own_fit) if _own_fit(last) is not None else []
    ends = (fits[-count:] for count in range(1, len(fits) + 1))
    fits, z = max(((end, sum(fit.z for fit in end) / math.sqrt(len(end))) for end in ends),
                  key=lambda pair: abs(pair[1]), default=([], 0.0))  # fmt: skip
    if abs(z) > MISFIT_ERRORS:
        yield MISFIT(step=last.step, excess=fmean(fit.excess for fit in fits), z=z)


def _own_fit(record: StepRecord) -> BatchFit | None:
    """That of a batch which the policy as it is should have drawn."""
    return None if record.fit is None or record.fit.status == "selected" else record.fit


def _loss(records: Sequence[StepRecord]) -> Iterator[Note]:
    last = records[-1]
    if last.loss_distance is not None and last.loss_distance > MOST_DISTANCE:
        yield OTHER_LOSS(step=last.step, distance=last.loss_distance)


CHECKS: tuple[Callable[[Sequence[StepRecord]], Iterator[Note]], ...] = (
    _rates,
    _step_size,
    _optimizer,
    _sampler,
    _loss,
)
