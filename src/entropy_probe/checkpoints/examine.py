"""Everything that is checked before a checkpoint is loaded, from cheap to dear."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from entropy_probe.checkpoints.adapter import find_base, read_adapter_config, starting_at_zero, trained_adapter
from entropy_probe.checkpoints.dcp import ShardedDirectory
from entropy_probe.checkpoints.directory import check_contained, optimizer_file, read_global_step, sharded_optimizer
from entropy_probe.checkpoints.errors import MismatchError, MissingFileError, UnsupportedError
from entropy_probe.checkpoints.evidence import check_adapter_never_trained, check_movement, check_weights_never_trained
from entropy_probe.checkpoints.layout import Layout, layout_of
from entropy_probe.checkpoints.libraries import collector_paused
from entropy_probe.checkpoints.manifest import Manifest, check_recorded, read_manifest, verify_files
from entropy_probe.checkpoints.mapping import ParameterMapping, map_parameters
from entropy_probe.checkpoints.models import adapter_layout, base_skeleton, embedding_names, full_skeleton
from entropy_probe.checkpoints.optimizer_file import SavedOptimizer, check_entries, read_optimizer
from entropy_probe.checkpoints.optimizer_sharded import read_sharded_optimizer, with_values
from entropy_probe.checkpoints.optimizer_state import summarize
from entropy_probe.checkpoints.quantization import FourBit, Quantization, refuse_unmentioned
from entropy_probe.checkpoints.tokenizer import check_vocabulary
from entropy_probe.checkpoints.trainer_log import not_modelled_by_log
from entropy_probe.checkpoints.weights import (
    check_finite,
    check_shapes,
    has_weights,
    read_shapes,
    tensor_readers,
    unchanged,
    weight_files,
)
from entropy_probe.results.checkpoint import CheckpointReport, MovementReport
from entropy_probe.results.note import Note, NoteKind
from entropy_probe.results.probe import OptimizerStateReport

__all__ = ["Examination"]

LARGE_LEARNING_RATE = 0.1
LARGE_UNSCALED = {"SGD": 100.0, "Adadelta": 100.0}
"""Optimizers whose learning rate is not about the size of an element's step, so that only a far larger one is odd."""
UNUSABLE = NoteKind("unusable", "{reason}", "Nothing can be computed from this checkpoint until that is put right.")
EXCHANGED = NoteKind(
    "moments_exchanged",
    "the optimizer state of {parameters} seems exchanged{more}: the weights have moved along each other's moments, not "
    "their own; the entries are in another order than the mapping says",
    "Do not use these numbers: record a manifest during training, which maps entries by name.",
)
RATE_IS_ZERO = NoteKind(
    "learning_rate_zero",
    "learning rate is 0, as after a finished schedule; set probe.learning_rate",
    "Set probe.learning_rate to that of the step you ask about; a sweep has rates of its own.",
)
RATE_IS_LARGE = NoteKind(
    "learning_rate_large",
    "learning rate {rate:g} is above {bound:g}; check it",
    "Make sure that the rate is meant; probe.learning_rate sets another.",
)
ZERO_MOMENTS = NoteKind(
    "zero_moments",
    "exp_avg_sq is all zero for {share:.0%} of the elements; normal for lora_A after the first step and for embeddings "
    "of tokens that never occurred; otherwise these parameters were not trained",
    "Compare with a later checkpoint; frozen or unused parts may be left out of training.",
)
STEPS_DIFFER = NoteKind(
    "steps_differ",
    "step counts differ between parameters ({least} to {most}); some were not always trained",
    "Make sure that the late starters were unfrozen on purpose.",
)
_WHOLE = "Use a checkpoint that was saved to its end, or make sure of this one."
NO_TRAINER_STATE = NoteKind(
    "no_trainer_state", "trainer_state.json, written last, is missing; the save may be incomplete", _WHOLE
)
NO_SCHEDULER = NoteKind(
    "no_scheduler",
    "scheduler.pt is missing; the save may be incomplete (the next step's rate is in optimizer.pt)",
    _WHOLE,
)
TWO_SAVES = NoteKind(
    "two_saves",
    "optimizer.pt is at step {optimizer}, trainer_state.json at {trainer}; files of two saves?",
    "Do not mix files of different saves: copy the checkpoint again.",
)
DECAY_UNKNOWN = NoteKind(
    "weight_decay_unknown",
    "the file does not say whether weight decay is decoupled; taken as AdamW, the Trainer's",
    "Right for the Trainer's AdamW; else record a manifest during training.",
)
OTHER_BASE = NoteKind(
    "other_base_model",
    "the adapter was trained on {recorded}, the base model given is {given}; with other weights of the same shapes "
    "every number is wrong, and only a manifest could tell",
    "Give the base model that it was trained on, and record a manifest.",
)


@dataclass
class Examination:
    """What has been established about a directory so far; ``run`` goes from cheap to dear and stops at errors.

    Attributes:
        path: the checkpoint directory, already found to be one.
        base_model: the base model that the user gave.
        adapter: the name of the trained adapter: what the user gave, later the one found.
        given: the quantization that the user gave.
        kind: a LoRA adapter or full weights.
        directory: where the weights are: the checkpoint, or the adapter's folder in it.
        base: the base model's directory or hub name; None for full weights.
        quantization: how the base model is quantised; None for plain weights.
        global_step: optimizer steps taken.
        manifest: the manifest, its hashes verified.
        saved: the optimizer file.
        files: the weight files.
        layout: the model's parameters that train.
        mapping: which parameter each optimizer entry belongs to.
        summary: what the moments cover, and how many second moments are 0.
        movement: the check of entries of equal shape, where the weights' starting point is known.
        movement_not_checked: else why there was none.
    """

    path: Path
    base_model: str | Path | None
    adapter: str | None = None
    given: Quantization | None = None
    kind: Literal["lora", "full"] = field(init=False)
    directory: Path = field(init=False)
    base: str | None = None
    quantization: FourBit | None = None
    global_step: int | None = None
    manifest: Manifest | None = None
    saved: SavedOptimizer | None = None
    files: list[Path] = field(default_factory=list)
    layout: Layout | None = None
    mapping: ParameterMapping | None = None
    summary: tuple[OptimizerStateReport, int | None] | None = None
    movement: MovementReport | None = None
    movement_not_checked: str | None = None
    _config: dict[str, Any] = field(default_factory=dict)
    _sharded_optimizer: ShardedDirectory | None = None
    _embeddings: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        whole = (self.path / "config.json").is_file() or has_weights(self.path, "model")
        self.kind = "full" if whole and not (self.path / "adapter_config.json").is_file() else "lora"
        self.directory = self.path

    @property
    def configuration(self) -> str:
        """The directory of the configuration of full weights; trainers save none with sharded ones.

        Raises:
            MissingFileError: if it is not known.
        """
        if (self.path / "config.json").is_file():
            return str(self.path)
        if self.base_model is None:
            raise MissingFileError(
                f"{self.path / 'config.json'}: expected the model's configuration, found none beside its weights; pass "
                "base_model, the model that training started from"
            )
        return str(self.base_model)

    @collector_paused()
    def run(self) -> None:
        """Check everything.

        Raises:
            CheckpointError: at the first thing that would keep the checkpoint from loading, or from being trusted.
        """
        check_contained(self.path)
        self.manifest = read_manifest(self.path)
        if self.manifest is not None:
            verify_files(self.path, self.manifest)
        self.global_step = read_global_step(self.path)
        self.saved = self._read_optimizer()
        check_entries(self.saved)
        self.layout = self._adapter_layout() if self.kind == "lora" else self._full_layout()
        if self.manifest is not None:
            configuration = self.directory / ("adapter_config.json" if self.kind == "lora" else "config.json")
            read = [self.saved.path, configuration, *self.files]
            check_recorded(self.path, read, self.manifest)
        check_finite(self.files)
        self.mapping = self._map(self.layout)
        if self._sharded_optimizer is not None:
            self._check_tied()
            self.saved = with_values(self.saved, self._sharded_optimizer)
        self._check_never_trained(self.saved, self.mapping)
        self.summary = summarize(self.saved, self.mapping, self.layout)
        movements, reference = self._movements(self.mapping.names)
        if movements:
            self.movement = check_movement(self.saved, self.mapping.names, movements, reference)
        else:
            self.movement_not_checked = reference

    def _read_optimizer(self) -> SavedOptimizer:
        """Of a sharded one the tensors are without storage, until their shapes are known to fit."""
        place = sharded_optimizer(self.path)
        if (self.path / "optimizer.pt").is_file() or place is None:
            return read_optimizer(optimizer_file(self.path))
        self._sharded_optimizer = ShardedDirectory.open(place)
        return read_sharded_optimizer(self._sharded_optimizer)

    def _adapter_layout(self) -> Layout:
        recorded = self.manifest.adapter if self.manifest is not None else None
        self.adapter, self.directory = trained_adapter(self.path, self.adapter, recorded)
        self._config = read_adapter_config(self.directory)
        named = self._config.get("base_model_name_or_path")
        self.base = find_base(self.path, self.directory, self.base_model, named)
        self.files = weight_files(self.directory, "adapter_model")
        trained = self.manifest.quantization if self.manifest is not None else None
        base, self.quantization = base_skeleton(self.base, self.given, trained)
        refuse_unmentioned(self.directory, self.quantization)
        check_vocabulary(self.path, self.base, base)
        layout, expected = adapter_layout(base, self.directory, self.adapter)
        check_shapes(self.files[0], read_shapes(self.files), expected)
        return layout

    def _full_layout(self) -> Layout:
        for name, given in (("adapter", self.adapter), ("quantization", self.given)):
            if given is not None:
                raise UnsupportedError(
                    f"{self.path}: {name}: expected none with full weights, got {given!r:.60}; it is for adapters, "
                    "leave it out"
                )
        self.files = weight_files(self.path, "model")
        skeleton = full_skeleton(self.configuration, self.files)
        check_vocabulary(self.path, self.base_model, skeleton)
        self._embeddings = embedding_names(skeleton)
        return layout_of(skeleton)

    def _check_tied(self) -> None:
        """Names say what trained, so a layer that was tied in training would count as frozen if it is not here."""
        assert self.mapping is not None
        trained = [name for name in self._embeddings if name in self.mapping.names]
        read = tensor_readers(self.files)
        if len(self._embeddings) == 2 and len(trained) == 1 and self._embeddings <= read.keys():
            first, second = sorted(self._embeddings)
            if torch.equal(read[first](), read[second]()):
                raise MismatchError(
                    f"{self.files[0]}: {first}: expected other values than {second}, or both tied, got equal ones, of "
                    f"which only {trained[0]} was trained; pass the configuration that the model was trained with"
                )

    def _map(self, layout: Layout) -> ParameterMapping:
        """Match entries to parameters; by recorded names, else by the rules over what was trained.

        Full weights of which a part was frozen have fewer entries than parameters. Without recorded names, those that
        are as in the model that training started from are taken as frozen.
        """
        assert self.saved is not None
        start = self._starting_point()
        recorded = self.manifest is not None or any("param_names" in group for group in self.saved.groups)
        if self.kind == "lora" or recorded or start is None or self.saved.num_parameters >= len(layout.parameters):
            return map_parameters(self.saved, layout, self.manifest)
        frozen = unchanged(self.files, weight_files(start, "model")) & layout.parameters.keys()
        mapping = map_parameters(self.saved, layout.without(frozen))
        how = f"{mapping.how}; {len(frozen)} tensors that are as in {start} were frozen"
        return replace(mapping, how=how, others_frozen=True)

    def _check_never_trained(self, saved: SavedOptimizer, mapping: ParameterMapping) -> None:
        if self.kind == "full":
            check_weights_never_trained(saved, mapping.names, self.files, self._starting_point())
        else:
            assert self.adapter is not None
            starting = starting_at_zero(self._config, mapping.names, self.adapter)
            check_adapter_never_trained(saved, mapping.names, self.files, starting)

    def _movements(self, names: tuple[str, ...]) -> tuple[dict[str, Callable[[], Tensor]], str]:
        """How far each parameter has moved since training started, and from what; where unknown none, and why."""
        assert self.saved is not None
        if not self.saved.is_adam:
            return {}, f"it goes by Adam's moments, {self.saved.kind.name} keeps others"
        read = tensor_readers(self.files)
        if self.kind == "lora":
            assert self.adapter is not None
            inside = starting_at_zero(self._config, names, self.adapter)
            movements = {name: read[key] for name, key in inside.items() if key in read}
            how = self._config.get("init_lora_weights")
            unknown = f"init_lora_weights is {how!r:.60}, so where the adapter started is not known"
            return movements, "0, where lora_B starts" if movements else unknown
        start = self._starting_point()
        if start is None:
            what = f"{self.base_model} has no local weights" if self.base_model else "it was not given"
            return {}, f"needs the model that training started from, and {what}; pass base_model"
        before = tensor_readers(weight_files(start, "model"))
        shapes, earlier = read_shapes(self.files), read_shapes(weight_files(start, "model"))
        common = [n for n in names if n in shapes and shapes[n] == earlier.get(n)]
        movements = {name: _difference(read[name], before[name]) for name in common}
        return movements, str(start) if movements else f"{start} has none of the trained tensors"

    def _starting_point(self) -> Path | None:
        """The weights that full-weight training started from, where they are given or recorded, and local.

        A recorded path may not climb with ``..``, which only the user's may.
        """
        if self.base_model is not None:
            place = Path(self.base_model).expanduser()
        elif self.manifest is not None and self.manifest.base_model is not None:
            place = Path(self.manifest.base_model.name)
            if ".." in place.parts:
                return None
        else:
            return None
        return place if has_weights(place, "model") else None

    def report(self, unusable: str | None = None) -> CheckpointReport:
        """What was established, and the verdict."""
        notes = (UNUSABLE(reason=unusable),) if unusable else tuple(self._doubts())
        saved = self.saved
        state, num_zero = self.summary or (None, None)
        return CheckpointReport(
            path=str(self.path),
            kind=self.kind,
            base_model=self.base,
            global_step=self.global_step,
            optimizer=saved.kind.name if saved else None,
            groups=saved.group_reports() if saved else (),
            num_with_exp_avg_sq=saved.count("exp_avg_sq") if saved else None,
            num_with_step=saved.count("step") if saved else None,
            num_zero_elements=num_zero,
            optimizer_state=state,
            movement=self.movement,
            movement_not_checked=self.movement_not_checked,
            manifest=self.manifest.recorded if self.manifest else None,
            verdict="unusable" if unusable else "suspicious" if notes else "healthy",
            notes=notes,
            not_modelled=() if unusable else not_modelled_by_log(self.path),
        )

    def _doubts(self) -> Iterator[Note]:
        """What does not keep the checkpoint from loading but should be read before its numbers are used."""
        assert self.saved is not None
        assert self.summary is not None
        if self.movement is not None and self.movement.exchanged:
            yield self._exchange(self.movement)
        state, _ = self.summary
        rates = [group["lr"] for group in self.saved.groups if group["params"]]
        if not any(rates):
            yield RATE_IS_ZERO()
        large = LARGE_UNSCALED.get(self.saved.kind.name, LARGE_LEARNING_RATE)
        if max(rates) > large:
            yield RATE_IS_LARGE(rate=max(rates), bound=large)
        if self.saved.is_adam and state.coverage < 1:
            yield ZERO_MOMENTS(share=1 - state.coverage)
        low, high = state.steps
        if low != high:
            yield STEPS_DIFFER(least=low, most=high)
        yield from self._doubts_about_the_save(high)
        if self.saved.is_adam and any(
            g["weight_decay"] and "decoupled_weight_decay" not in g for g in self.saved.groups
        ):
            yield DECAY_UNKNOWN()
        yield from self._doubts_about_base()

    def _doubts_about_the_save(self, steps: int) -> Iterator[Note]:
        """Files that a trainer writes beside the state, missing or of another step."""
        assert self.saved is not None
        if self.global_step is None and self.saved.path.name != "optimizer.pt":
            return  # not a Trainer's: torch.distributed.checkpoint, which writes its index last, or accelerate
        if self.global_step is None:
            yield NO_TRAINER_STATE()
        elif self.global_step != steps and self.saved.count("step"):
            yield TWO_SAVES(optimizer=steps, trainer=self.global_step)
        if not (self.path / "scheduler.pt").is_file():
            yield NO_SCHEDULER()

    def _doubts_about_base(self) -> Iterator[Note]:
        """Another base model of the same shapes loads without an error and gives wrong numbers."""
        proven = self.manifest is not None and self.manifest.base_model is not None and self.manifest.base_model.files
        recorded = self._config.get("base_model_name_or_path")
        if self.base is None or proven or not isinstance(recorded, str):
            return
        if Path(recorded).name.lower() != Path(self.base).name.lower():
            yield OTHER_BASE(recorded=recorded, given=self.base)

    @staticmethod
    def _exchange(movement: MovementReport) -> Note:
        first = movement.exchanged[0]
        more = f" and {len(movement.exchanged) - 1} more" if len(movement.exchanged) > 1 else ""
        shown = " and ".join(first[:2]) + (f" and {len(first) - 2} others" if len(first) > 2 else "")
        return EXCHANGED(parameters=shown, more=more)


def _difference(now: Callable[[], Tensor], before: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return lambda: now().float() - before().float()
