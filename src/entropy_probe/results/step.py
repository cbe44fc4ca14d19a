"""The step of a result as vectors over the parameters, which are kept in memory only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic_core import CoreSchema, core_schema

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class StepVectors:
    """A step and what it was taken with, by the names of ``model.named_parameters()``.

    Both are parameter-sized, on the parameters' device and, of a sharded model, this rank's shards.

    Attributes:
        delta: the parameter change, in at least float32.
        gradient: what the optimizer gets: clipped, in the precision of the step; ``None`` where the loss does not
            reach a parameter.
    """

    delta: Mapping[str, Tensor]
    gradient: Mapping[str, Tensor | None]

    @classmethod
    def __get_pydantic_core_schema__(cls, *_: Any) -> CoreSchema:
        """Taken as it is: a record neither looks into vectors nor saves them."""
        return core_schema.is_instance_schema(cls)
