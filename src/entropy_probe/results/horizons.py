"""How far a changed token echoes: the change within 0, 1, 2, 4, ... tokens, and in the whole response."""

from __future__ import annotations

from pydantic import Field

from entropy_probe.results.estimate import Estimate
from entropy_probe.results.record import Record


class HorizonPoint(Record):
    """The change of the entropy at prefixes whose last ``horizon`` tokens follow the policy after the step.

    Attributes:
        horizon: in tokens; null for the whole response.
        predicted: to first order; the error is that from the evaluation rollouts.
        realized: after the step; null where too few windowed weights are effective.
        increment: of ``predicted`` over the horizon before, with the error of the paired difference; null at 0.
        beyond: what ``predicted`` of the whole response has more than this, likewise; null for the whole.
        beyond_realized: the same of ``realized``.
        ess_fraction: effective share of the windowed weights, over tokens.
    """

    horizon: int | None = Field(ge=0)
    predicted: Estimate
    realized: Estimate | None
    increment: Estimate | None
    beyond: Estimate | None
    beyond_realized: Estimate | None
    ess_fraction: float


class Horizons(Record):
    """The profile over horizons.

    Attributes:
        points: by increasing horizon, the whole response last.
        headline: the horizon of the point that states the change: the one asked for; else the whole response where its
            interval excludes 0, and where it does not the shortest horizon from which no longer one differs by more
            than the interval of their difference. Null is the whole response.
    """

    points: tuple[HorizonPoint, ...] = Field(min_length=2)
    headline: int | None

    @property
    def stated(self) -> HorizonPoint:
        """The point of ``headline``."""
        return next(point for point in self.points if point.horizon == self.headline)
