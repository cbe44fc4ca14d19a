"""The sequences of a batch that a way of calling the policy is tried on, and what it says of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import Parameter

from entropy_probe.named import add_to, gradient_of
from entropy_probe.rollouts.batch import Rollouts
from entropy_probe.scoring.calls import PolicyCalls
from entropy_probe.scoring.isolation import without_gradient_hooks
from entropy_probe.scoring.packing import Microbatch, row_tokens, shared_groups
from entropy_probe.scoring.precision import precisions

REFUSALS = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What models raise where they cannot be called in some way: on masks of four dimensions, on more than one sequence."""
MIN_RESPONSE = 3
"""A response of fewer tokens hardly sees what stands between it and its prompt."""


@dataclass(frozen=True)
class Tolerance:
    """What rounding may do.

    Attributes:
        scores: to scores, root mean square, relative to 1 nat and their size.
        gradient: to a gradient, relative to its length, or to that of a gradient that may vanish but for rounding.
        share: how long the latter is, relative to the longest.
    """

    scores: float
    gradient: float
    share: float

    @classmethod
    def of(cls, calls: PolicyCalls) -> Tolerance:
        """By the coarsest type that anything of the model is held or computed in."""
        dtypes = [dtype for _, dtype in precisions(calls.model)]
        if torch.is_autocast_enabled(calls.device.type):
            dtypes.append(torch.get_autocast_dtype(calls.device.type))
        coarsest = max(torch.finfo(dtype).eps for dtype in dtypes)
        if coarsest > torch.finfo(torch.float32).eps:
            return cls(0.1, 0.1, 0.1)
        # parts of a model in float64 may compute in float32
        return cls(1e-4, 1e-3, 1e-2) if coarsest == torch.finfo(torch.float32).eps else cls(1e-5, 1e-4, 1e-2)


@dataclass(frozen=True, eq=False)
class Seen:
    """Log-probabilities and entropies of some sequences, ``[2, T]`` each, and a gradient over all of them."""

    scores: dict[int, Tensor] = field(default_factory=dict)
    gradient: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Sample:
    """The sequences of a batch that stand for it, shortest first, and what the whole model says of each alone."""

    rollouts: Rollouts
    rows: Tensor
    parameters: Mapping[str, Parameter]
    expected: Seen

    @property
    def lengths(self) -> Tensor:
        """Tokens of each of the sequences, which are shorter than they were where the memory was too small."""
        return self.rollouts.attention_mask[self.rows].sum(1)


def name_of(calls: PolicyCalls) -> str:
    """The class of the model, without what adapters put around it."""
    return type(getattr(calls.model, "get_base_model", lambda: calls.model)()).__name__


def take_sample(
    calls: PolicyCalls, rollouts: Rollouts, parameters: Mapping[str, Parameter], width: int | None
) -> Sample:
    """The shortest and the longest sequence and the last one of the most packed row, each called alone.

    One whose logits do not fit the memory as a whole gives up the later half of its response.
    """
    lengths = rollouts.attention_mask.sum(1)
    packed = None if width is None else most_packed(calls, rollouts, width)
    longest = int(lengths.where(rollouts.response_lengths > 0, 0).argmax())
    shortest = int(lengths.where(rollouts.response_lengths > 0, lengths.max() + 1).argmin())
    chosen = {shortest, longest, *([] if packed is None else [packed])}
    rows = torch.tensor(sorted(chosen, key=lambda row: int(lengths[row])))
    calls.lay_out(None, alone=True)
    expected = Seen()
    for row in rows:
        while True:
            try:
                add(expected, look(calls, rollouts, row[None], parameters))
                break
            except (torch.OutOfMemoryError, ValueError):
                raise
            except REFUSALS as error:
                raise ValueError(
                    "model: expected one to call as model(input_ids=..., attention_mask=...) and to differentiate, but "
                    f"{name_of(calls)} raises {words_of(error)}; see that it runs on a sequence by itself"
                ) from error
            except MemoryError:
                shorter = _without_later_half(rollouts, int(row))
                if shorter is None:
                    raise
            rollouts = shorter
    return Sample(rollouts, rows, parameters, expected)


def most_packed(calls: PolicyCalls, rollouts: Rollouts, width: int) -> int | None:
    """The sequence with most tokens of others between its response and its prompt, if there would be any."""
    groups, _ = shared_groups(rollouts, torch.arange(len(rollouts)), width, calls.max_tokens, calls.context)
    enough = rollouts.response_lengths >= MIN_RESPONSE
    ends = {
        int(group[k]): row_tokens(rollouts, group[: k + 1])
        for group in groups
        for k in range(1, len(group))
        if enough[group[k]]
    }
    return max(ends, key=lambda row: ends[row], default=None)


def _without_later_half(rollouts: Rollouts, row: int) -> Rollouts | None:
    response = rollouts.response_mask[row].nonzero()[:, 0]
    kept = max(MIN_RESPONSE, len(response) // 2)
    return cut(rollouts, row, int(response[kept - 1]) + 1) if kept < len(response) else None


def cut(rollouts: Rollouts, row: int, column: int) -> Rollouts:
    """The batch with one sequence ended before a column."""
    attention, response = rollouts.attention_mask.clone(), rollouts.response_mask.clone()
    attention[row, column:] = False
    response[row, column:] = False
    return replace(rollouts, attention_mask=attention, response_mask=response)


def look(calls: PolicyCalls, rollouts: Rollouts, rows: Tensor, parameters: Mapping[str, Parameter]) -> Seen:
    """Some sequences as the policy is laid out now, without shared prompts."""
    seen = Seen()
    for _, more in calls.each(rollouts, lambda batch: see(calls, batch, rows, parameters), rows, share=False):
        add(seen, more)
    return seen


def add(seen: Seen, more: Seen) -> None:
    """Add what other microbatches say."""
    seen.scores.update(more.scores)
    add_to(seen.gradient, more.gradient)


def see(calls: PolicyCalls, batch: Microbatch, rows: Tensor, parameters: Mapping[str, Parameter]) -> Seen:
    """What a microbatch says of some sequences; their tokens have different weights in the gradient."""
    gradient: dict[str, Tensor] = {}
    if parameters:
        angle = 0.7 * torch.arange(batch.response_mask.shape[1]) + 1.3 * batch.rows[:, None]
        ours = torch.isin(batch.rows, rows)[:, None]
        weights = [(x * ours)[batch.response_mask].to(calls.device) for x in (angle.cos(), angle.sin())]
        with torch.enable_grad(), without_gradient_hooks(parameters.values()):
            s, h, value = calls.scores_and_surrogate(batch, *weights)
            if value.requires_grad:
                gradient = gradient_of(value, parameters)
    else:
        with torch.no_grad():
            s, h, *_ = calls.scores(batch)
    flat = torch.stack([s, h]).double().cpu().split(batch.response_mask.sum(1).tolist(), 1)
    wanted = set(rows.tolist())
    scores = {row: x for row, x in zip(batch.rows.tolist(), flat, strict=True) if row in wanted}
    return Seen(scores, gradient)


def rms(values: Tensor) -> float:
    """The root mean square."""
    return float(values.square().mean().sqrt())


def difference(expected: Seen, actual: Seen, tolerance: Tolerance) -> str | None:
    """How two ways of calling a model differ by more than rounding; ``None`` if they do not."""
    gaps = {row: rms(actual.scores[row] - x) / (1 + rms(x)) for row, x in expected.scores.items()}
    worst = max(gaps, key=lambda row: gaps[row])
    if not gaps[worst] <= tolerance.scores:
        return f"scores of a sequence change by {rms(actual.scores[worst] - expected.scores[worst]):.2g} nats"
    norms = [float(g.norm()) for seen in (expected, actual) for g in seen.gradient.values()]
    least = tolerance.share * max(norms, default=0.0)
    device = next((g.device for seen in (expected, actual) for g in seen.gradient.values()), None)
    for name in sorted(expected.gradient.keys() | actual.gradient.keys()):
        a, b = (seen.gradient.get(name, torch.zeros((), device=device)) for seen in (expected, actual))
        if not float((a - b).norm()) <= tolerance.gradient * max(float(a.norm()), least):
            return f"the gradient of {name} changes by {float((a - b).norm() / max(float(a.norm()), least)):.1%}"
    return None


def words_of(error: Exception) -> str:
    """What a model says of a call that it refuses, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
