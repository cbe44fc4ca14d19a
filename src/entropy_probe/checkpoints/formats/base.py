"""What a checkpoint format is: where in a directory a trainer's files are, and how they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from entropy_probe.checkpoints.errors import MismatchError
from entropy_probe.checkpoints.manifest import plain_name
from entropy_probe.checkpoints.optimizer_file import SavedOptimizer, read_optimizer
from entropy_probe.checkpoints.trainer_settings import TrainerSettings, read_training_args
from entropy_probe.results.note import Note, NoteKind

_WHOLE = "Use a checkpoint that was saved to its end, or make sure of this one."
NO_TRAINER_STATE = NoteKind(
    "no_trainer_state", "trainer_state.json, written last, is missing; the save may be incomplete", _WHOLE
)
NO_SCHEDULER = NoteKind(
    "no_scheduler",
    "scheduler.pt is missing; the save may be incomplete (the next step's rate is in optimizer.pt)",
    _WHOLE,
)


class StoredTensor(NamedTuple):
    """A tensor in a file, its shape known and its values not read yet."""

    file: Path
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class Weights:
    """The tensors of a model or of an adapter, by name."""

    files: tuple[Path, ...]  # where they are; messages name the first
    tensors: dict[str, StoredTensor]  # each with its own file
    # whether ``from_pretrained`` reads these files itself, as it does safetensors. Else the model is built from its
    # configuration and filled with ``tensors``, in which tied ones may be under each name
    pretrained: bool = False

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}


def named_weights(file: Path, stored: Mapping[str, StoredTensor]) -> Weights:
    """Weights by the unwrapped model's names, to which ``torch.compile``, FSDP and checkpointing of activations add."""
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        plain = plain_name(name)
        if plain in tensors:
            raise MismatchError(f"{file}: expected one tensor for {plain}, got two ({name} is another); save one model")
        tensors[plain] = tensor
    return Weights((file,), tensors)


@runtime_checkable
class CheckpointFormat(Protocol):
    """How one trainer saves an optimizer's state and, where not as safetensors, a model's full weights.

    A member is one module of this folder whose ``FORMAT`` is an instance. It keeps nothing of a directory: its methods
    first say where in one its files are, and are then given that place. What is not there is taken from another
    member, so that a sharded optimizer may stand beside safetensors. Configuration, tokenizer and adapters are as the
    Hugging Face libraries save them. What a member does not say is as here: one file of ``torch.save``.
    """

    def optimizer_at(self, path: Path) -> Path | None:
        """The file or folder with the optimizer's state; None where this trainer did not write the directory."""
        ...

    def optimizer(self, place: Path) -> SavedOptimizer:
        """The state, groups checked; tensors may stay in their files until :meth:`SavedOptimizer.loaded`.

        Raises:
            CheckpointError: if it cannot be read or is of an optimizer that is not rebuilt.
        """
        return read_optimizer(place)

    def weights_at(self, path: Path) -> Path | None:
        """The file or folder with full weights; None where there are none of this format."""
        return None

    def weights(self, place: Path) -> Weights:
        """The full weights; only names and shapes are read.

        Raises:
            CheckpointError: if they cannot be read.
        """
        raise AssertionError(f"{place}: {type(self).__name__} has no weights of its own")

    def settings(self, path: Path) -> TrainerSettings | None:
        """What the trainer wrote down of its loss and step; as here, by the Hugging Face Trainer. None without a file.

        Raises:
            CheckpointError: if the file cannot be read. Nothing in it runs.
        """
        return read_training_args(path)

    def masters(self, place: Path) -> dict[str, StoredTensor]:
        """Full-precision copies of the trained weights that the optimizer keeps and steps, by parameter; often none.

        Raises:
            CheckpointError: if they cannot be read.
        """
        return {}

    def configuration_at(self, path: Path) -> Path:
        """The folder of the model's configuration and tokenizer, in a directory of this format."""
        return path

    def adapter_config(self, path: Path) -> dict[str, Any] | None:
        """What the trainer wrote of an adapter's configuration, where it writes no ``adapter_config.json``."""
        return None

    def doubts(self, path: Path) -> Iterator[Note]:
        """What makes a save look unfinished; files of the Hugging Face Trainer are expected where it wrote its log."""
        if (path / "trainer_state.json").is_file():
            yield from doubts_about_files(path)


def doubts_about_files(path: Path) -> Iterator[Note]:
    """A note for each file that the Hugging Face Trainer writes beside the state and that is missing."""
    if not (path / "trainer_state.json").is_file():
        yield NO_TRAINER_STATE()
    if not (path / "scheduler.pt").is_file():
        yield NO_SCHEDULER()
