"""A probe's own numbers against those that the trainer logged in its last steps.

Both are samples, and training moves what they measure, so only what neither explains is said: see :func:`against_log`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean, stdev

import torch
from jaxtyping import Float, Int
from torch import Tensor

from entropy_probe.results.note import Note, NoteKind
from entropy_probe.results.probe import ProbeResult
from entropy_probe.rollouts.batch import Rollouts

FACTOR = 4.0
"""Between the norm of the update gradient and the nearest of the logged ones."""
ERRORS, SHARE = 4.0, 0.1
"""A mean is off by more than so many of its errors, and by more than this share of what was logged."""

OTHER_NORM = NoteKind(
    "logged_gradient_norm",
    "the update gradient has norm {norm:.3g}, the trainer logged {low:.3g} to {high:.3g} in its last {steps} steps",
    "Compare loss, advantages, masks and the size of the batch with the trainer's: its gradient is another one.",
)
OTHER_ENTROPY = NoteKind(
    "logged_entropy",
    "entropy is {own:.4g} ± {error:.2g} nats/token, the trainer logged {logged:.4g} on average in its last {steps} "
    "steps",
    "Compare temperature, prompts and response masks with the trainer's.",
)
OTHER_LENGTH = NoteKind(
    "logged_length",
    "update responses have {own:.4g} ± {error:.2g} tokens, the trainer logged {logged:.4g} on average in its last "
    "{steps} steps",
    "Compare prompts, chat template, end tokens and max_completion_length with the trainer's.",
)
OTHER_REWARD = NoteKind(
    "logged_reward",
    "update responses have reward {own:.4g} ± {error:.2g}, the trainer logged {logged:.4g} on average in its last "
    "{steps} steps",
    "Compare reward functions, their weights, and prompts with the trainer's.",
)


def against_log(
    logged: Mapping[str, Sequence[float]], result: ProbeResult, update: Rollouts, *, selected: bool = False
) -> Iterator[Note]:
    """A note for each number that is not what the trainer logged.

    The gradient's norm (before clipping, as trainers log it) may be up to four times larger or smaller than the nearest
    of the logged ones. A mean is off if it is from the mean of the logged ones by more than a tenth, and by more than
    four times the root of its squared error plus their variance over steps, which is taken to be at least its own
    squared error.

    Args:
        logged: by the trainer's keys the numbers of its last steps.
        result: of the probe.
        update: the update batch.
        selected: whether its responses were kept or dropped by what they are, so that their means are not training's.
    """
    if norms := [norm for norm in logged.get("grad_norm", ()) if norm > 0]:
        own, low, high = result.diagnostics.gradient_norm, min(norms), max(norms)
        if not low / FACTOR <= own <= high * FACTOR:
            yield OTHER_NORM(norm=own, low=low, high=high, steps=len(norms))
    masked = not update.response_mask.any(1).all()  # then the trainer's entropy is that of the other responses alone
    if result.entropy.unit == "nats/token" and not masked:
        entropy = result.entropy.value, result.entropy.standard_error
        yield from _off(OTHER_ENTROPY, entropy, logged.get("entropy", ()))
    if selected:
        return
    lengths = _mean(update.response_mask.sum(1).double(), update.prompt_ids)
    yield from _off(OTHER_LENGTH, lengths, logged.get("completions/mean_length", ()))
    if update.rewards is not None:
        yield from _off(OTHER_REWARD, _mean(update.rewards.double(), update.prompt_ids), logged.get("reward", ()))


def _mean(values: Float[Tensor, " N"], prompt_ids: Int[Tensor, " N"]) -> tuple[float, float]:
    """The mean over sequences, and its error over prompts; of a single one it is not known."""
    _, prompt = prompt_ids.unique(return_inverse=True)
    mean, count = values.mean(), int(prompt.max()) + 1
    sums = torch.zeros(count, dtype=torch.float64).index_add(0, prompt, values - mean)
    if count == 1:
        return mean.item(), math.inf
    return mean.item(), math.sqrt(count / (count - 1) * sums.square().sum().item()) / len(values)


def _off(kind: NoteKind, own: tuple[float, float], logged: Sequence[float]) -> Iterator[Note]:
    if not logged:
        return
    (value, error), mean = own, fmean(logged)
    over_steps = stdev(logged) if len(logged) > 1 else 0.0
    away = abs(value - mean)
    if away > SHARE * abs(mean) and away > ERRORS * math.hypot(error, max(error, over_steps)):
        yield kind(own=value, error=error, logged=mean, steps=len(logged))
