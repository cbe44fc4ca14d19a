"""Small batches by hand, and what a run makes of them."""

import torch

from entropy_probe import Rollouts
from entropy_probe.analyses.admission import admit

END = 9


def batch(prompts: list[list[int]], responses: list[list[int]], ids: list[int], masks=None, **more) -> Rollouts:
    """Left-padded prompts with their responses, of which all is sampled unless a mask says otherwise."""
    masks = masks or [[1] * len(r) for r in responses]
    length = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    rows = list(zip(prompts, responses, masks, strict=True))
    return Rollouts(
        torch.tensor([[0] * (length - len(p) - len(r)) + p + r for p, r, _ in rows]),
        torch.tensor([[0] * (length - len(p) - len(r)) + [1] * len(p + r) for p, r, _ in rows]),
        torch.tensor([[0] * (length - len(m)) + m for _, _, m in rows]),
        torch.tensor(ids),
        **more,
    )


def admitted(given: Rollouts, role="update", merge=True, end_ids=(), longest=None):
    return admit(given, role, merge, end_ids, longest)
