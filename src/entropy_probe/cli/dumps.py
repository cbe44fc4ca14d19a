"""Rollouts that a config or a command names: a file of ours, or what a trainer left of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from entropy_probe.results.note import NOTHING_TO_DO, Note, NoteKind

if TYPE_CHECKING:
    from entropy_probe.cli.config import RunConfig
    from entropy_probe.dumps import Converted, Dump
    from entropy_probe.rollouts.batch import Rollouts

UNUSED_COLUMNS = NoteKind(
    "unused_columns",
    "{batch}: of the file's columns, {columns} are not used",
    f"{NOTHING_TO_DO} The columns that are read are in docs/rollouts.md.",
)
OTHER_SIZE = NoteKind(
    "other_size",
    "the dump has {rollouts} rollouts, and a step of training takes {taken}: it is no batch of one step",
    "Where training takes several steps on its rollouts, write those of the next one with Rollouts.to_parquet.",
)


@dataclass(frozen=True)
class Given:
    """A batch that was given.

    Attributes:
        rollouts: the batch.
        files: what it was read from.
        notes: what to say of it.
    """

    rollouts: Rollouts
    files: tuple[Path, ...]
    notes: tuple[Note, ...] = ()


@dataclass(frozen=True)
class TrainersBatch:
    """What a checkpoint's files say of its next batch.

    Attributes:
        after: the trainer's steps so far.
        rollouts: of a step.
        longest: the limit on response tokens.
        weights: of several rewards.
        mask_truncated: whether responses that are cut off are masked out.
    """

    after: int | None = None
    rollouts: int | None = None
    longest: int | None = None
    weights: tuple[float, ...] | None = None
    mask_truncated: bool = False

    @classmethod
    def of(cls, checkpoint: Path, trainer_config: Path | None = None) -> TrainersBatch:
        """That of a directory; ``trainer_config`` as in a run's config.

        Raises:
            ValueError: if it is no checkpoint, or a file is damaged.
        """
        from entropy_probe.checkpoints.directory import named_step
        from entropy_probe.checkpoints.training_run import TrainingRun

        run = TrainingRun.read(checkpoint, trainer_config)
        told, loss = run.values, run.loss or {}
        sizes = (
            told.get("per_device_train_batch_size"),
            told.get("gradient_accumulation_steps"),
            loss.get("num_processes"),
        )
        weights = told.get("reward_weights")
        return cls(
            named_step(checkpoint),
            None if None in sizes else sizes[0] * sizes[1] * sizes[2],  # type: ignore[operator]
            told.get("max_completion_length"),
            None if weights is None else tuple(weights),
            mask_truncated=bool(told.get("mask_truncated_completions")),
        )

    def notes(self, dump: Dump) -> list[Note]:
        """What speaks against a dump as this batch."""
        notes = [note] if (note := dump.alignment(self.after)) is not None else []
        if self.rollouts is not None and self.rollouts != len(dump.samples) and dump.layout.name == "TRL":
            notes.append(OTHER_SIZE(rollouts=len(dump.samples), taken=self.rollouts))
        return notes

    def convert(self, dump: Dump, tokenizer: object, longest: int | None) -> Converted:
        """A dump as this batch; ``longest`` where it is known better."""
        longest = self.longest if longest is None else longest
        return dump.convert(tokenizer, longest, self.weights, mask_truncated=self.mask_truncated)


def given_batch(config: RunConfig, batch: Literal["update", "evaluation"]) -> Given | None:
    """A batch that a config names, with what to say of it; None where it names none.

    Raises:
        ValueError: if it cannot be used, is not the checkpoint's next batch (without ``trust_config``), or has texts
            where the tokens that were sampled are needed.
    """
    from entropy_probe.checkpoints.tokenizer import tokenizer_of
    from entropy_probe.dumps import read_dump
    from entropy_probe.rollouts.batch import Rollouts
    from entropy_probe.sampling import unused_columns

    path = getattr(config.rollouts, batch)
    if path is None:
        return None
    told = TrainersBatch.of(config.checkpoint, config.trainer_config)
    dump = read_dump(path, after=told.after)
    if isinstance(dump, Rollouts):
        names = ", ".join(unused_columns(path))
        notes = (UNUSED_COLUMNS(batch=batch, columns=names),) if names else ()
        _check(path, dump, batch, config)
        return Given(dump, (path,), notes)
    notes = told.notes(dump)
    wrong = next((note for note in notes if note.code == "other_step"), None)
    if wrong is not None and not config.trust_config:
        raise ValueError(
            f"{path}: {wrong.text}; give the dump of that step, or insist with trust_config: true (--trust-config)"
        )
    tokenizer = tokenizer_of(config.checkpoint, config.base_model) if dump.needs_tokenizer else None
    converted = told.convert(dump, tokenizer, config.probe.max_completion_length)
    _check(path, converted.rollouts, batch, config)
    return Given(converted.rollouts, dump.files, tuple(note.about(batch) for note in (*notes, *converted.notes)))


def _check(path: Path, rollouts: Rollouts, batch: str, config: RunConfig) -> None:
    """What is known before the checkpoint is loaded."""
    if batch == "update" and rollouts.advantages is None:
        raise ValueError(f"{path}: expected advantages in an update batch, got no column advantage; add it")
    if rollouts.retokenised and (batch == "evaluation" or config.mode != "two_batch"):
        wanted = "evaluation batch" if batch == "evaluation" else f"batch of mode {config.mode}"
        raise ValueError(
            f"{path}: expected the tokens that the policy sampled in the {wanted}, since entropy is taken on them, got "
            "texts that are tokenized again; sample the evaluation batch, or give another (mode: two_batch)"
        )
