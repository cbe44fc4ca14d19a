"""Several responses to each evaluation prompt: what they have in common."""

from __future__ import annotations

from pydantic import Field

from entropy_probe.results.record import Record


class Draws(Record):
    """How an evaluation batch with several draws per prompt compares with single draws.

    Attributes:
        num_prompts: prompts, which are the clusters.
        per_prompt: draws of each; their mean where they differ.
        between_share: share of the variance of one draw's part in the realized change that its prompt explains; below
            0 by chance where it explains next to nothing.
        design_effect: the variance of the mean over that of as many draws with a prompt each.
    """

    num_prompts: int
    per_prompt: float = Field(ge=1)
    between_share: float = Field(le=1)
    design_effect: float
