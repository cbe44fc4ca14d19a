"""What is said of a loss on a batch: settings without effect, and what was taken where the batch does not say."""

from __future__ import annotations

from collections.abc import Iterable

from jaxtyping import Float
from torch import Tensor

from entropy_probe.losses.base import Loss
from entropy_probe.results.note import NOTHING_TO_DO, Note, NoteKind

__all__ = ["GLOBAL_MEAN", "INERT", "OWN_DRAW", "inert_clip"]

INERT = NoteKind("inert", "{settings} inert: {reason}", NOTHING_TO_DO)
GLOBAL_MEAN = NoteKind(
    "global_mean",
    "{what}: {trainer} takes it over each {unit}, and the update batch does not say which those were; one over the "
    "whole step is taken",
    "Record microbatch_ids in the update batch (docs/rollouts.md); measured, the difference is 1 to 2% of the step.",
)
OWN_DRAW = NoteKind(
    "own_draw",
    "{what} are drawn at random, here with seed {seed}: another draw than the trainer's, which nothing records",
    "Repeat with other seeds (loss.seed) to see what the draw does to the numbers.",
)
ONE = 1e-3
"""Log ratios below it are those of one policy scored twice."""


def inert_clip(loss: Loss, settings: Iterable[str], log_ratio: Float[Tensor, "N L"]) -> list[Note]:
    """Those of the settings of the clip range that were given, where every ratio is 1."""
    given = [name for name in settings if name in loss.model_fields_set and getattr(loss, name) is not None]
    if not given or float(log_ratio.abs().max()) >= ONE:
        return []
    return [INERT(settings="clip range", reason=f"every ratio is 1 on this step ({', '.join(given)})")]
