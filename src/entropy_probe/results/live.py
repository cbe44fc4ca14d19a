"""What is recorded of the steps of a live training run; reading it needs no model and no torch.

A run directory holds ``entropy_probe/step-000123/`` per recorded step, with ``record.json`` and, where asked for,
``rollouts.parquet`` and ``gradient.safetensors``. A directory is there whole or not at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat

from entropy_probe.results.estimate import Estimate
from entropy_probe.results.note import Note
from entropy_probe.results.probe import BatchFit, OptimizerStateReport, ProbeResult, SamplerMismatch
from entropy_probe.results.record import Record, read_record

SCHEMA_VERSION = 1
RECORDS = "entropy_probe"
RECORD_FILE, ROLLOUTS_FILE, GRADIENT_FILE = "record.json", "rollouts.parquet", "gradient.safetensors"
_STEP = re.compile(r"step-(\d+)")

Number = Literal[
    "entropy", "reward", "length", "gradient_norm", "learning_rate", "mismatch", "kl", "clip_factor", "ess"
]
LOGGED: Mapping[str, tuple[str, ...]] = {
    "entropy": ("entropy", "actor/entropy", "policy/entropy"),
    "reward": ("reward", "critic/rewards/mean", "reward/mean"),
    "length": ("completions/mean_length", "completion_length", "response_length/mean", "response_length"),
    "gradient_norm": ("grad_norm", "actor/grad_norm"),
    "learning_rate": ("learning_rate", "actor/lr"),
    "mismatch": ("sampling/sampling_logp_difference/mean",),
    "kl": ("kl", "actor/kl_loss"),
}
"""Keys of TRL's trainers, and of others."""
ESTIMATES = ("entropy", "predicted", "realized", "gradient", "momentum", "weight_decay", "lifetime", "committed")
"""The estimates of a record, by their fields."""
OWN = ("gradient_norm", "clip_factor", "learning_rate", "ess")
"""What the probe has of it too."""


class PromptShare(Record):
    """What one prompt of the batch adds to the first-order change.

    Attributes:
        id: the prompt, the same over the steps of a run.
        value: its part of the gradient's part, in the unit of the record's estimates.
        standard_error: of the value; null if it was not computed.
        text: the prompt, or its last message; null if it is not known.
    """

    id: int
    value: float
    standard_error: NonNegativeFloat | None = None
    text: str | None = None


class StepRecord(Record):
    """One optimizer step of a training run.

    Attributes:
        schema_version: of this file.
        step: its number, from 1, as the trainer counts: ``global_step`` is this after it.
        log: what the trainer logged of this step (:func:`logged_numbers`), by its own keys (``reward``, ...).
        entropy: H before the step; null where the step was recorded and not probed, like all estimates.
        predicted: the first-order change of the step.
        realized: the change measured after it; null too where it was refused (``notes`` say why).
        gradient: what this batch's gradient adds to ``predicted``.
        momentum: what earlier batches add, through the moments.
        weight_decay: what weight decay adds.
        lifetime: what this batch's gradient does over its life in the momentum, this step included.
        committed: what the moments alone will do after this step if every later gradient is zero.
        ess: effective sample size of the weights behind ``realized`` over the number of sequences.
        loss_distance: between the trainer's gradient and that of the loss as the probe knows it, over the former.
        gradient_norm: before clipping.
        clip_factor: what clipping multiplied the gradient by, 1 when it did not act.
        learning_rate: the largest of the parameter groups.
        mismatch: the sampler of the step's batch against the policy; null if it reported no log-probabilities.
        fit: whether the tokens of the step's batch may be the policy's own.
        optimizer_state: what the optimizer's state covered before the step.
        prompts: what each prompt of the batch adds; empty if it was not attributed.
        notes: everything that a careful reader should know.
        seconds: what the probe took.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    step: int = Field(ge=1)
    log: dict[str, float] = Field(default_factory=dict)
    entropy: Estimate | None = None
    predicted: Estimate | None = None
    realized: Estimate | None = None
    gradient: Estimate | None = None
    momentum: Estimate | None = None
    weight_decay: Estimate | None = None
    lifetime: Estimate | None = None
    committed: Estimate | None = None
    ess: NonNegativeFloat | None = None
    loss_distance: NonNegativeFloat | None = None
    gradient_norm: NonNegativeFloat | None = None
    clip_factor: NonNegativeFloat | None = None
    learning_rate: NonNegativeFloat | None = None
    mismatch: SamplerMismatch | None = None
    fit: BatchFit | None = None
    optimizer_state: OptimizerStateReport | None = None
    prompts: tuple[PromptShare, ...] = ()
    notes: tuple[Note, ...] = ()
    seconds: NonNegativeFloat | None = None

    def logged(self, what: Number) -> float | None:
        """What the trainer logged of something, by whichever key it does; None if it did not."""
        return next((self.log[key] for key in LOGGED.get(what, ()) if key in self.log), None)

    def number(self, what: Number) -> float | None:
        """A number of the step: as the probe has it, else as the trainer logged it."""
        own = (
            getattr(self, what) if what in OWN else self.mismatch and self.mismatch.mean if what == "mismatch" else None
        )
        return self.logged(what) if own is None else own

    @property
    def change(self) -> Estimate | None:
        """What the step did to entropy: measured, else to first order; None where it was not probed."""
        return self.realized or self.predicted

    @classmethod
    def of(cls, result: ProbeResult, step: int, **rest: Any) -> StepRecord:
        """What a result says of the step that it is of.

        Args:
            result: of the batch that the step is taken on, or of one of its kind.
            step: the step's number.
            **rest: further fields, or in place of the result's.
        """
        said, realized = result.diagnostics, result.realized
        known = {
            "entropy": result.entropy,
            "predicted": None if result.predicted is None else result.predicted.of_this_step,
            "realized": None if realized is None else realized.estimate,
            **{part: result.components.get(part) for part in ("gradient", "momentum", "weight_decay")},
            "lifetime": result.lifetime,
            "committed": result.committed,
            "ess": None if realized is None else realized.ess_fraction,
            "loss_distance": None if said.gradient_agreement is None else said.gradient_agreement.relative_distance,
            "gradient_norm": said.gradient_norm,
            "clip_factor": said.clip_factor,
            "learning_rate": max(result.optimizer_state.learning_rates),
            "mismatch": said.update_mismatch or said.mismatch,
            "fit": said.policy_fit.update,
            "optimizer_state": result.optimizer_state,
            "notes": said.notes,
            "seconds": sum(result.timing.values()),
        }
        return cls(step=step, **(known | rest))


class Alarm(Record):
    """A warning about a run, and for which steps it holds.

    Attributes:
        first: the first step that it was given at.
        last: the last one.
        holds: whether that is the last step there is.
        note: as given at the first step.
    """

    first: int
    last: int
    holds: bool
    note: Note


class Timeline(Record):
    """A training run over its steps.

    Attributes:
        name: of the run.
        steps: what is known of each, by step.
        alarms: what they warn of.
    """

    name: str
    steps: tuple[StepRecord, ...] = Field(min_length=1)
    alarms: tuple[Alarm, ...] = ()

    @property
    def probed(self) -> tuple[StepRecord, ...]:
        """The steps that were probed."""
        return tuple(record for record in self.steps if record.entropy is not None)


def logged_numbers(log: Mapping[Any, Any]) -> dict[str, float]:
    """The finite numbers of what a trainer logged."""
    return {
        key: float(value)
        for key, value in log.items()
        if isinstance(key, str) and isinstance(value, int | float) and abs(value) < 1e300
    }


def step_directory(run_directory: str | Path, step: int) -> Path:
    """Where a step of a run is recorded."""
    return Path(run_directory) / RECORDS / f"step-{step:06d}"


def recorded_steps(run_directory: str | Path) -> Iterator[tuple[int, Path]]:
    """The recorded steps of a run and their directories, in order; what a killed process left half done is not."""
    places = Path(run_directory, RECORDS).glob("step-*")
    named = ((match, place) for place in places if (match := _STEP.fullmatch(place.name)))
    yield from sorted((int(match[1]), place) for match, place in named)


def read_records(run_directory: str | Path) -> tuple[StepRecord, ...]:
    """The records of a run by step, while it trains or after it; none if nothing was recorded.

    Raises:
        ValueError: if one is damaged.
    """
    records = []
    for step, place in recorded_steps(run_directory):
        file, remedy = place / RECORD_FILE, f"delete {place} to leave the step out"
        if not place.is_dir():  # replaced by the training run just now
            continue
        if not file.is_file():
            raise ValueError(f"{file}: expected the record of a step, got no such file; {remedy}")
        record = read_record(StepRecord, file, f"the record of a step, schema {SCHEMA_VERSION}", remedy)
        if record.step != step:
            raise ValueError(f"{file}: expected the record of step {step}, got that of step {record.step}; {remedy}")
        records.append(record)
    return tuple(records)
