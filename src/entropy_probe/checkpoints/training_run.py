"""What a checkpoint's files tell of the run that wrote it: its loss, its settings, and where each of them stands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entropy_probe.checkpoints.dialects import UNREAD
from entropy_probe.checkpoints.directory import check_contained, find_optimizer, open_directory, read_global_step
from entropy_probe.checkpoints.errors import UnsupportedError
from entropy_probe.checkpoints.foreign_settings import find_settings, read_settings
from entropy_probe.checkpoints.formats import CheckpointFormat
from entropy_probe.checkpoints.trainer_log import LOG_FILE, TrainerLog, read_log
from entropy_probe.checkpoints.trainer_settings import TrainerSettings
from entropy_probe.results.checkpoint import ABOVE_ZERO, SettingReport
from entropy_probe.results.note import NOTHING_TO_DO, Note, NoteKind

REUSED = NoteKind(
    "reused_rollouts",
    "the next step is number {place} of {steps} that training takes on the same rollouts; batches that are sampled "
    "here are fresh, so their step is the first of as many",
    "Give the trainer's own rollouts with old_logprobs as the update batch, or probe a checkpoint before fresh ones.",
)
REUSED_BY_LOG = NoteKind(
    "reused_rollouts_by_log",
    "some steps of the log have no reward: training takes several steps on the same rollouts, and the next one may not "
    "be the first of them; batches that are sampled here are fresh",
    "Give the trainer's own rollouts with old_logprobs as the update batch, or probe a checkpoint before fresh ones.",
)
OTHER_SAMPLES = NoteKind(
    "other_samples",
    "training samples with {settings}, so its rollouts are not the policy's own; batches that are sampled here are",
    "Give the trainer's own rollouts as the update batch; the evaluation batch is right as it is.",
)
DERIVED = NoteKind(
    "derived_trainer",
    "{trainer} is none of TRL's own classes; its loss is taken for that of TRL with the same settings",
    "Compare its loss with TRL's; another one gives another step.",
)
LOSS_NOT_TOLD = NoteKind(
    "loss_not_told",
    "{trainer} does not say which loss was trained; probe.loss says which one is probed",
    f"{NOTHING_TO_DO[:-1]} if probe.loss, temperature and clipping are those of training.",
)
ENGINE_CLIPS = NoteKind(
    "engine_clips",
    "{trainer} says max_grad_norm {asked:g}, {engine}'s own configuration {done:g} (0: no clipping); it is {engine} "
    "that clips, so its own counts",
    f"{NOTHING_TO_DO[:-1]}; but the trainer's setting has no effect.",
)
CLIP_NOT_TOLD = NoteKind(
    "engine_clip_not_told",
    "{engine}'s own configuration does not say gradient_clipping: by its version it clips at 1 (since June 2026) or "
    "not at all, whatever the trainer's settings say",
    "Set probe.max_grad_norm to what the training log shows.",
)
CLIP = "max_grad_norm"

_OFF: dict[str, tuple[float, ...]] = {
    "top_p": (1.0,), "top_k": (0, -1), "min_p": (0.0,), "repetition_penalty": (1.0,),
}  # fmt: skip
"""Settings of samplers, and where they do nothing."""


@dataclass(frozen=True)
class TrainingRun:
    """The settings and the log of the trainer that wrote a checkpoint."""

    path: Path  # the checkpoint directory
    settings: TrainerSettings | None  # what the trainer wrote down; None where it left no file that is read
    log: TrainerLog  # what it logged
    global_step: int | None  # optimizer steps taken
    # what the engine below the trainer (DeepSpeed) wrote down, which goes before what the trainer asked for
    engine: TrainerSettings | None

    @classmethod
    def of(
        cls, path: Path, member: CheckpointFormat, global_step: int | None, settings: str | Path | None = None
    ) -> TrainingRun:
        """That of a directory; ``settings`` is the trainer's own config, where it is not beside the checkpoint."""
        beside, engine = member.settings(path), member.engine_settings(path)
        if settings is not None:
            if beside is not None and beside.loss is not None:
                raise UnsupportedError(
                    f"{settings}: expected no trainer's config beside {beside.file}, which tells the settings; leave "
                    "it out"
                )
            beside = read_settings(Path(settings))
        return cls(path, find_settings(path) if beside is None else beside, read_log(path), global_step, engine)

    @classmethod
    def read(cls, path: Path, settings: Path | None = None) -> TrainingRun:
        """That of a directory of which nothing is known yet."""
        directory = open_directory(path)
        check_contained(directory)
        member, _ = find_optimizer(directory)
        return cls.of(directory, member, read_global_step(directory), settings)

    @property
    def loss(self) -> dict[str, Any] | None:
        """The settings of the loss, as ``ProbeConfig(loss=...)`` takes them; None where no file tells them."""
        return None if self.settings is None or self.settings.loss is None else dict(self.settings.loss)

    @property
    def needs_loss(self) -> str | None:
        """Whose loss has to be stated, since it is none that is read from its files; None where that is not so."""
        unread = self.settings is not None and self.loss is None and self.settings.trainer in UNREAD
        return self.settings.trainer if unread and self.settings is not None else None

    @property
    def values(self) -> Mapping[str, Any]:
        """Settings by the trainer's own names; empty where there is no file of them."""
        told = [settings.values for settings in (self.settings, self.engine) if settings is not None]
        return {name: value for values in told for name, value in values.items()}

    def other_loss(self) -> str | None:
        """Which trainer it is, and where that stands, if its loss is none that is modelled."""
        if self.settings is not None and self.settings.other_loss:
            return f"{self.settings.trainer} ({self.settings.file.name})"
        return self.log.other_loss() if self.loss is None else None

    def refuse_other_loss(self) -> None:
        """Make sure that the loss may be one of those that are modelled."""
        whose = self.other_loss()
        if whose is not None:
            raise UnsupportedError(
                f"{self.path}: expected a checkpoint of a policy gradient (GRPO, GMPO, RLOO and alike), got one of "
                f"{whose}, whose step is that of another loss; give its gradient from outside "
                "(load_checkpoint(any_trainer=True)), or insist with trust_config: true"
            )

    def facts(self) -> dict[str, Any]:
        """The fields of a ``CheckpointReport`` that are about the run."""
        return {
            "trainer": next((told.trainer for told in (self.settings, self.engine) if told is not None), None),
            "settings": self.reports(),
            "logged": self.log.numbers,
            "not_modelled": self.log.not_modelled(),
        }

    def reports(self) -> tuple[SettingReport, ...]:
        """Every setting that is told, with where it stands: in the trainer's own file, else in its log."""
        reports: list[SettingReport] = []
        of_engine = {} if self.engine is None else dict(self.engine.values)
        if self.settings is not None:
            told = {**self.settings.values, **(self.loss or {})}
            told = {name: value for name, value in told.items() if name != "trainer" and name not in of_engine}
            reports += self._from(self.settings.file, told)
        if self.engine is not None:
            reports += self._from(self.engine.file, of_engine)
        if self.loss is None:
            reports += [
                SettingReport(name=name, value=ABOVE_ZERO if value is None else value, source=f"{LOG_FILE} ({key})")
                for name, value, key in self.log.settings()
            ]
        return tuple(reports)

    def _from(self, file: Path, told: Mapping[str, Any]) -> list[SettingReport]:
        source = str(file.relative_to(self.path) if file.is_relative_to(self.path) else file)
        return [SettingReport(name=name, value=value, source=source) for name, value in told.items()]

    @property
    def place(self) -> tuple[int, int] | None:
        """Which of the steps on the same rollouts the next one is, from 1, and how many there are; None if unknown.

        An interrupted run that went on from a checkpoint counts from there.
        """
        loss = self.loss
        if loss is None or loss["trainer"] != "trl":
            return None
        per_step = loss.get("gradient_accumulation_steps") or 1
        per_rollouts = (loss.get("steps_per_generation") or per_step) * (loss.get("num_iterations") or 1)
        if per_step % per_rollouts == 0:
            return 1, 1
        if per_rollouts % per_step or self.global_step is None:
            return None
        steps = per_rollouts // per_step
        return self.global_step % steps + 1, steps

    def notes(self) -> Iterator[Note]:
        """What a reader of numbers from this checkpoint should know of the run."""
        settings = self.settings
        of_trl = self.loss is not None and self.loss["trainer"] == "trl"
        if settings is not None and of_trl and not settings.trainer.startswith("trl."):
            yield DERIVED(trainer=settings.trainer)
        if settings is not None and self.loss is None and not settings.other_loss:
            yield LOSS_NOT_TOLD(trainer=settings.trainer)
        asked, done = (None if told is None else told.values.get(CLIP) for told in (settings, self.engine))
        if settings is not None and self.engine is not None and asked is not None and done not in (None, asked):
            yield ENGINE_CLIPS(trainer=settings.file.name, asked=asked, engine=self.engine.trainer, done=float(done))
        if self.engine is not None and CLIP not in self.engine.values:
            yield CLIP_NOT_TOLD(engine=self.engine.trainer)
        place = self.place
        if place is not None and place[0] > 1:
            yield REUSED(place=place[0], steps=place[1])
        elif place is None and self.log.reuses_rollouts:
            yield REUSED_BY_LOG()
        if on := other_samples(self.values):
            yield OTHER_SAMPLES(settings=", ".join(on))


def other_samples(values: Mapping[str, Any]) -> list[str]:
    """The settings by which a trainer samples from something other than its policy."""
    return [f"{name} {values[name]}" for name, off in _OFF.items() if values.get(name) not in (None, *off)]
