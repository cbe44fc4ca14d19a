"""Advantages of a dump: the trainer's own, held against what its rewards give, or else what they give."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from entropy_probe.dumps.layouts import Layout
from entropy_probe.dumps.samples import Sample
from entropy_probe.results.note import NOTHING_TO_DO, Note, NoteKind
from entropy_probe.sampling import ScaleRewards, group_advantages

RECOMPUTED = NoteKind(
    "advantages_recomputed",
    "the dump has no advantages: they are recomputed from its rewards, {rule}",
    "Make sure that the trainer takes them so; else write the batch with Rollouts.to_parquet.",
)
OTHER_ADVANTAGES = NoteKind(
    "other_advantages",
    "the dump's advantages are none that its rewards give ({rules}), by up to {distance:.2g}; they are taken as given",
    f"{NOTHING_TO_DO[:-1]} if the trainer shapes or weights rewards otherwise.",
)
UNEVEN_GROUPS = NoteKind(
    "uneven_groups",
    "prompts have {low} to {high} responses each, and the dump does not say which of them the trainer compared: all to "
    "one prompt are",
    "Right unless the trainer drew a prompt twice in this step.",
)
RULES: dict[str, tuple[ScaleRewards, bool]] = {
    "(r - mean) / std of each prompt's": ("group", True),
    "(r - mean) / std of each prompt's, dividing by n": ("group", False),
    "r - mean of each prompt's": ("none", True),
    "(r - mean of each prompt's) / std of all": ("batch", True),
}
"""By what they are called, what centred rewards are divided by, and whether a deviation's square divides by n - 1."""
TOLERANCE = 2e-3
"""Between advantages, relative to 1 and them: what a trainer adds to a standard deviation, and half precision."""


def rewards_of(samples: Sequence[Sample], weights: Sequence[float] | None) -> Float[Tensor, " N"] | None:
    """The reward of each rollout, the weighted sum where there are several; None where one has none."""
    if all(sample.reward is not None for sample in samples):
        return torch.tensor([sample.reward for sample in samples])
    names = list(dict.fromkeys(name for sample in samples for name in sample.rewards or ()))
    if not names or not all(sample.rewards for sample in samples):
        return None
    if weights is not None and len(weights) != len(names):
        raise ValueError(f"expected {len(weights)} rewards, as there are weights, got columns {', '.join(names)}")
    by_name = dict(zip(names, weights or [1.0] * len(names), strict=True))
    return torch.tensor([sum(by_name[name] * r for name, r in (s.rewards or {}).items()) for s in samples])


def recomputed(
    layout: Layout, rewards: Float[Tensor, " N"], prompt_ids: Int[Tensor, " N"], *, grouped: bool
) -> tuple[Float[Tensor, " N"], str, tuple[Note, ...]]:
    """Advantages by the trainer's default rule, what that is, and what to say of it.

    ``grouped`` is whether the dump says which rollouts are compared.
    """
    rule = next(name for name, (scale, _) in RULES.items() if scale == layout.scale)
    rule = rule if layout.scale == "none" else f"{rule} + {layout.epsilon:g}"
    notes = [RECOMPUTED(rule=f"as {layout.name} does by default: {rule}")]
    counts = prompt_ids.unique(return_counts=True)[1]
    if bool((counts != counts[0]).any()) and not grouped:
        notes.append(UNEVEN_GROUPS(low=int(counts.min()), high=int(counts.max())))
    return group_advantages(rewards, prompt_ids, layout.scale, layout.epsilon), f"recomputed, {rule}", tuple(notes)


def compared(
    layout: Layout, own: Float[Tensor, " N"], rewards: Float[Tensor, " N"], prompt_ids: Int[Tensor, " N"]
) -> tuple[str | None, Note | None]:
    """By which rule rewards give a dump's own advantages; None, with a note, where no known one does.

    Of each prompt there are at least two.
    """
    _, group, counts = prompt_ids.unique(return_inverse=True, return_counts=True)
    n = counts[group].double()
    distances = {}
    for name, (scale, unbiased) in RULES.items():
        expected = group_advantages(rewards.double(), prompt_ids, scale, layout.epsilon)
        expected = expected if unbiased else expected * (n / (n - 1)).sqrt()
        distances[name] = float(((own - expected).abs() / (1 + expected.abs())).max())
    rule, distance = min(distances.items(), key=lambda pair: pair[1])
    if distance <= TOLERANCE:
        return rule, None
    return None, OTHER_ADVANTAGES(rules="; ".join(RULES), distance=distance)
