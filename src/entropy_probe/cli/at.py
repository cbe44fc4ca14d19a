"""``--at RUN_DIR:123``: one recorded step of a training run, from the nearest checkpoint before it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entropy_probe.results.note import NOTHING_TO_DO, Note, NoteKind

if TYPE_CHECKING:
    from entropy_probe.checkpoints import CheckpointState
    from entropy_probe.cli.config import RunConfig
    from entropy_probe.results.live import StepRecord
    from entropy_probe.results.probe import ProbeResult

REPLAYED = NoteKind(
    "steps_replayed",
    "{checkpoint} is {steps} steps before step {step}, so the steps in between were taken again on their recorded "
    "batches; the norms of their gradients agree with training's to {off:.1g}",
    NOTHING_TO_DO,
)
AS_RECORDED = NoteKind(
    "recorded_step",
    "this is step {step} of the run, where training predicted {predicted:.4g} ± {predicted_se:.2g} and entropy "
    "{entropy:.4g} ± {entropy_se:.2g} {unit}",
    f"{NOTHING_TO_DO} Both are of the same batch, so they should agree closely.",
)
OTHER_GRADIENT = NoteKind(
    "recorded_gradient_norm",
    "the gradient of step {step} has norm {own:.4g} here, {recorded:.4g} in training: this is not quite the step taken",
    "Compare loss, dropout and precision with the trainer's: what its files do not tell is not in these numbers.",
)
TOLERANCE = 0.03
"""Between the norms of a gradient here and in training, relative: what a lower precision makes of the same gradient."""


@dataclass(frozen=True)
class RecordedStep:
    """A recorded step of a run.

    Attributes:
        record: the step.
        rollouts: the file with its batch.
        checkpoint: the last one before it.
        between: the steps from there to this one, with the files of their batches.
    """

    record: StepRecord
    rollouts: Path
    checkpoint: Path
    between: tuple[tuple[StepRecord, Path], ...]

    @property
    def settings(self) -> dict[str, Any]:
        """What it sets in a run's config, by dotted key."""
        return {"checkpoint": str(self.checkpoint), "rollouts.update": str(self.rollouts)}

    def go_there(self, state: CheckpointState, config: RunConfig) -> Iterator[Note]:
        """Take the steps between the checkpoint and this one, in place; what a reader should know of that.

        Raises:
            ValueError: if a gradient here is not that of training, so that this would end at another step.
        """
        from entropy_probe.probe import EntropyProbe
        from entropy_probe.rollouts.batch import Rollouts

        if not self.between:
            return
        assert state.optimizer is not None
        probe, off = EntropyProbe(state.model, state.optimizer, config.probe), 0.0
        for record, file in self.between:
            norm = probe.take(Rollouts.from_parquet(file), rate_factor=self._rate_factor(state, record))
            if (recorded := record.number("gradient_norm")) is not None:
                off = max(off, abs(norm - recorded) / recorded if recorded else norm)
            if off > TOLERANCE:
                raise ValueError(
                    f"--at: expected the gradient of step {record.step} as in training, norm {recorded:.4g}, got norm "
                    f"{norm:.4g} when going on from {self.checkpoint.name}, so step {self.record.step} would be "
                    f"another one; probe step {self.between[0][0].step}, which that checkpoint is right before"
                )
        factor = self._rate_factor(state, self.record)
        for group in state.optimizer.param_groups:
            group["lr"] *= factor
        steps = len(self.between)
        yield REPLAYED(checkpoint=self.checkpoint.name, steps=steps, step=self.record.step, off=off)

    def _rate_factor(self, state: CheckpointState, record: StepRecord) -> float:
        """A step's learning rate over the optimizer's present one."""
        assert state.optimizer is not None
        own = record.number("learning_rate")
        now = max(group["lr"] for group in state.optimizer.param_groups)
        return 1.0 if own is None or not now else own / now

    def compare(self, result: ProbeResult) -> Iterator[Note]:
        """What training said of the step, beside what a probe of it says."""
        record = self.record
        if record.predicted is not None and record.entropy is not None:
            entropy, predicted = record.entropy, record.predicted
            yield AS_RECORDED(step=record.step, predicted=predicted.value, predicted_se=predicted.standard_error,
                              entropy=entropy.value, entropy_se=entropy.standard_error, unit=entropy.unit)  # fmt: skip
        own, recorded = result.diagnostics.gradient_norm, record.number("gradient_norm")
        if recorded and abs(own - recorded) > TOLERANCE * recorded:
            yield OTHER_GRADIENT(step=record.step, own=own, recorded=recorded)


def recorded_step(text: str) -> RecordedStep:
    """The step that ``RUN_DIR:123`` means.

    Raises:
        ValueError: if it was not recorded with its batch, or there is no way to it from a checkpoint.
    """
    from entropy_probe.results.live import ROLLOUTS_FILE, read_records, step_directory

    directory, _, number = text.rpartition(":")
    if not directory or not number.isdecimal():
        raise ValueError(f"--at: expected RUN_DIR:STEP, such as runs/grpo:123, got {text!r:.100}")
    run, step = Path(directory), int(number)
    if not run.is_dir():
        raise ValueError(f"--at: expected the output directory of a training run, {run} is none; check the path")
    steps = ((record, step_directory(run, record.step) / ROLLOUTS_FILE) for record in read_records(run))
    known = {record.step: (record, file) for record, file in steps if file.is_file()}
    checkpoints = _checkpoints(run)
    direct = [k + 1 for k in checkpoints if k + 1 in known]
    instead = f"step {_listed(direct)} can be probed" if direct else "train with EntropyProbeCallback(record='all')"
    if step not in known:
        raise ValueError(f"--at: expected a step of {run} that was recorded with its batch, got {step}; {instead}")
    before = max((k for k in checkpoints if k < step), default=None)
    if before is None:
        raise ValueError(f"--at: expected a checkpoint of {run} before step {step}, got none; {instead}")
    missing = [k for k in range(before + 1, step) if k not in known]
    if missing:
        raise ValueError(
            f"--at: expected checkpoint-{step - 1}, or the batch of every step from checkpoint-{before} on, got none "
            f"of step {_listed(missing)}, so this would be another step; {instead}"
        )
    return RecordedStep(*known[step], checkpoints[before], tuple(known[k] for k in range(before + 1, step)))


def _checkpoints(run: Path) -> dict[int, Path]:
    """The checkpoints that were written to the end, by the steps taken until then."""
    from entropy_probe.checkpoints.trainer_log import LOG_FILE

    states = (file.parent for file in run.glob(f"checkpoint-*/{LOG_FILE}"))
    return {int(number): place for place in states if (number := place.name.partition("-")[2]).isdecimal()}


def _listed(steps: list[int]) -> str:
    shown = [str(step) for step in sorted(steps)]
    return ", ".join(shown if len(shown) <= 6 else [*shown[:3], "…", *shown[-2:]])
