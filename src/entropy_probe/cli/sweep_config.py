"""What ``entropy-probe sweep`` reads: a run's config with a section ``sweep``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from entropy_probe.analyses.sweep import check_learning_rates
from entropy_probe.cli.config import RunConfig
from entropy_probe.results.record import Settings


class SweepSettings(Settings):
    """The rates of a sweep: a list, or ``num`` of them evenly spaced by their logarithm.

    Attributes:
        learning_rates: at least two rates, in any order.
        smallest: the first of evenly spaced rates.
        largest: the last.
        num: how many.
        checkpoints: checkpoint directories to sweep one after the other; takes the place of ``checkpoint``.
        direct_curvature: whether to differentiate every score twice along the step as well.
    """

    learning_rates: tuple[float, ...] | None = None
    smallest: float | None = Field(default=None, gt=0)
    largest: float | None = Field(default=None, gt=0)
    num: int | None = Field(default=None, ge=2, le=1000)
    checkpoints: tuple[Path, ...] | None = Field(default=None, min_length=1)
    direct_curvature: bool = False

    @model_validator(mode="after")
    def _check_rates(self) -> SweepSettings:
        spaced = (self.smallest, self.largest, self.num)
        if (self.learning_rates is None) == all(x is None for x in spaced):
            raise ValueError("expected learning_rates, or smallest, largest and num; give one of the two")
        if self.learning_rates is None and (self.smallest is None or self.largest is None or self.num is None):
            raise ValueError("expected smallest, largest and num together; set all three")
        self.rates()
        return self

    def rates(self) -> tuple[float, ...]:
        """The rates in increasing order; spaced ones rounded to six digits."""
        if self.learning_rates is not None:
            return check_learning_rates(self.learning_rates)
        assert self.smallest is not None
        assert self.largest is not None
        assert self.num is not None
        factor, last = self.largest / self.smallest, self.num - 1
        return check_learning_rates([float(f"{self.smallest * factor ** (k / last):.6g}") for k in range(self.num)])


class SweepConfig(RunConfig):
    """A run's settings and the rates to sweep over, which take the place of ``probe.learning_rate``.

    Attributes:
        sweep: the rates, and the checkpoints if there are several.
    """

    sweep: SweepSettings

    @model_validator(mode="before")
    @classmethod
    def _first_checkpoint(cls, settings: Any) -> Any:
        sweep = settings.get("sweep") if isinstance(settings, dict) else None
        checkpoints = sweep.get("checkpoints") if isinstance(sweep, dict) else None
        return settings | {"checkpoint": checkpoints[0]} if isinstance(checkpoints, list) and checkpoints else settings

    @model_validator(mode="after")
    def _check_sweep(self) -> SweepConfig:
        if self.mode not in ("two_batch", "one_batch"):
            raise ValueError(f"mode: expected two_batch or one_batch for a sweep, got {self.mode}; choose one of them")
        if self.mode == "one_batch" and self.probe.geometry == "frozen":
            raise ValueError("probe.geometry: expected adamw beside mode one_batch in a sweep, got frozen; change it")
        if not self.save_rollouts:
            raise ValueError("save_rollouts: expected true, since a sweep resumes from its rollouts, got false")
        if self.sweep.checkpoints is None:
            return self
        names = [path.absolute().name for path in self.sweep.checkpoints]
        if len(set(names)) < len(names):
            raise ValueError(f"sweep.checkpoints: expected directories of different names, got {', '.join(names)}")
        if any(path is not None for _, path in self.rollouts):
            raise ValueError(
                "sweep.checkpoints: each checkpoint has its own policy and needs its own rollouts; leave rollouts out"
            )
        return self

    def resolved(self) -> SweepConfig:
        """As for a run; rates are spelled out, and attribution, which belongs to one rate, is left out."""
        checkpoints = self.sweep.checkpoints
        sweep = self.sweep.model_copy(
            update={
                "learning_rates": self.sweep.rates(),
                **dict.fromkeys(("smallest", "largest", "num")),
                "checkpoints": checkpoints and tuple(path.absolute() for path in checkpoints),
            }
        )
        config = super().resolved()
        assert isinstance(config, SweepConfig)
        probe = config.probe.model_copy(update={"learning_rate": None})
        plain = {"attribution": False, "attribution_folds": None}
        return config.model_copy(update={"sweep": sweep, "probe": probe, **plain})

    def each(self) -> Iterator[SweepConfig]:
        """The config of every checkpoint on its own, each with a directory of its own inside ``output_dir``."""
        for path in self.sweep.checkpoints or ():
            yield self.model_copy(
                update={
                    "checkpoint": path,
                    "output_dir": self.output_dir / path.name,
                    "sweep": self.sweep.model_copy(update={"checkpoints": None}),
                }
            )
