"""What ``entropy-probe inspect`` says of a checkpoint. Reading it needs no model and no torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from entropy_probe.results.note import Note
from entropy_probe.results.probe import OptimizerStateReport
from entropy_probe.results.record import Record

ABOVE_ZERO = "above 0"
"""In place of the value of a setting of which the files tell no more."""


class GroupReport(Record):
    """One parameter group of the optimizer file, as stored.

    Attributes:
        num_parameters: parameter tensors in the group.
        learning_rate: the rate of the next step.
        betas: decay rates of the first and second moment; null for optimizers that have none.
        eps: the constant added to the root of the second moment; null where there is none, or several.
        weight_decay: the group's weight decay.
        others: further settings that are one number or word (``momentum``, ``alpha`` …).
        flags: the switches stored with the group (``amsgrad``, ``fused``, ``foreach`` …).
    """

    num_parameters: int
    learning_rate: float
    betas: tuple[float, float] | None
    eps: float | None
    weight_decay: float
    others: dict[str, float | str] = Field(default_factory=dict)
    flags: dict[str, bool | None]


class MovementReport(Record):
    """Whether the weights have moved along the directions of the moments assigned to them.

    Attributes:
        reference: what the movement is measured from.
        num_parameters: parameter tensors that could be looked at.
        correlation: median correlation of a parameter's movement with its own direction; null when none moved.
        correlation_of_others: the same with the directions of other parameters of its shape.
        status: ``consistent``; ``exchanged``: other entries fit clearly better; ``inconclusive``: cannot tell.
        exchanged: cycles of parameters whose entries seem to have changed places.
    """

    reference: str
    num_parameters: int
    correlation: float | None
    correlation_of_others: float | None
    status: Literal["consistent", "exchanged", "inconclusive"]
    exchanged: tuple[tuple[str, ...], ...]


class SettingReport(Record):
    """One of the trainer's settings, as a file of the checkpoint tells it.

    Attributes:
        name: the trainer's own name of it.
        value: a number, a word, null, or a list or mapping of these; ``above 0`` where only that is told.
        source: the file; of a log with the key that tells.
    """

    name: str
    value: Any
    source: str


class CheckpointReport(Record):
    """What a checkpoint holds and whether the next optimizer step can be computed from it.

    A field is null, or a tuple empty, when an earlier problem kept it from being read; ``notes`` say which.

    Attributes:
        path: the checkpoint directory.
        kind: a LoRA adapter or full weights.
        base_model: the base model's directory or hub name; null for full weights.
        global_step: optimizer steps taken, from ``trainer_state.json``.
        optimizer: the class: ``AdamW``, ``Adam``, ``SGD`` … ``Adafactor of transformers`` or ``AdamW, 8-bit state``.
        groups: the parameter groups.
        num_with_exp_avg_sq: parameter tensors whose entry has a second moment.
        num_with_step: parameter tensors whose entry has a step count.
        num_zero_elements: elements whose second moment is exactly 0; their Adam scale is ``1 / eps``. Null for other
            optimizers.
        optimizer_state: coverage, mapping, steps and Adam scale over all parameters.
        movement: the check of entries of equal shape; null where ``movement_not_checked`` says why there was none.
        manifest: how the manifest was recorded; null where there is none.
        trainer: the class of the trainer's settings; null where there is no file of them.
        settings: the trainer's settings that the loss, the step and the samples depend on.
        logged: the last numbers, at most five, that the trainer logged under each of ``grad_norm``, ``entropy``,
            ``completions/mean_length`` and ``reward``.
        verdict: ``healthy``; ``suspicious``: loads, but read the notes first; ``unusable``: loading raises.
        notes: everything that speaks against the checkpoint; then what should be known of it though it does not.
        not_modelled: one line for each part of the trainer's loss that its log shows and a probe leaves out.
    """

    path: str
    kind: Literal["lora", "full"]
    base_model: str | None = None
    global_step: int | None = None
    optimizer: str | None = None
    groups: tuple[GroupReport, ...] = ()
    num_with_exp_avg_sq: int | None = None
    num_with_step: int | None = None
    num_zero_elements: int | None = None
    optimizer_state: OptimizerStateReport | None = None
    movement: MovementReport | None = None
    movement_not_checked: str | None = None
    manifest: Literal["training", "inspection"] | None = None
    trainer: str | None = None
    settings: tuple[SettingReport, ...] = ()
    logged: dict[str, tuple[float, ...]] = Field(default_factory=dict)
    verdict: Literal["healthy", "suspicious", "unusable"]
    notes: tuple[Note, ...] = ()
    not_modelled: tuple[str, ...] = ()

    @property
    def reasons(self) -> tuple[str, ...]:
        """The texts of the notes."""
        return tuple(note.text for note in self.notes)
