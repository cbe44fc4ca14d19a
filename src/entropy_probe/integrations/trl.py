"""Callbacks for the Hugging Face Trainer and the trainers of TRL. Importing this module imports transformers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from transformers import TrainerCallback  # noqa: TID253  a callback must be a subclass

from entropy_probe import __version__
from entropy_probe.checkpoints.adapters import adapters_trained, live_settings
from entropy_probe.checkpoints.manifest import GroupRecord, Manifest, base_record, live_groups, write_manifest
from entropy_probe.checkpoints.record import recordable_files
from entropy_probe.checkpoints.weights import has_weights, read_weights

__all__ = ["ManifestCallback"]


class ManifestCallback(TrainerCallback):
    """Writes ``entropy-probe-manifest.json`` into every checkpoint, with names from the live optimizer and model.

    A failure never stops training: it becomes a warning, and no further manifest is written.

    Args:
        base_model: directory or name of the model that training started from; by default the one the adapter or the
            model names.
        hashes: whether to hash the files of every checkpoint (about a second per gigabyte) besides their sizes.
    """

    def __init__(self, base_model: str | None = None, *, hashes: bool = True) -> None:
        self.base_model, self.hashes = base_model, hashes
        self._base: Any = None
        self._broken = False

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the manifest of the checkpoint that was just saved; only the main process does."""
        if self._broken or not state.is_world_process_zero:
            return
        directory = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        try:
            self._write(directory, state.global_step, kwargs["model"], kwargs["optimizer"])
        except (OSError, ValueError) as error:
            self._broken = True
            warnings.warn(f"{directory}: no manifest, and none for later checkpoints: {error}", stacklevel=2)

    def _write(self, directory: Path, step: int, model: Any, optimizer: Any) -> None:
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps the one it prepares
        groups = live_groups(model, optimizer)
        if self._base is None:
            name = self.base_model or _base_name(model)
            local = name is not None and has_weights(Path(name), "model")
            weights = read_weights(Path(name), "model").files if name is not None and local else None
            self._base = base_record(name, weights, hashes=self.hashes) if name else None
        manifest = Manifest(
            recorded="training",
            mapping="live optimizer",
            written_by=f"entropy-probe {__version__}",
            global_step=step,
            optimizer=type(optimizer).__name__,
            adapter=_trained_adapter(model, groups),
            groups=groups,
            files=recordable_files(directory, hashes=self.hashes),
            base_model=self._base,
            quantization=live_settings(model),
        )
        write_manifest(directory, manifest)


def _trained_adapter(model: Any, groups: tuple[GroupRecord, ...]) -> str | None:
    """The adapter that the optimizer's parameters belong to; None without one, and where several train."""
    names = [parameter.name for group in groups for parameter in group.parameters]
    trained = adapters_trained(names, getattr(model, "peft_config", None) or ())
    return trained[0] if len(trained) == 1 else None


def _base_name(model: Any) -> str | None:
    """What an adapter records as its base, else where the model was loaded from."""
    adapters = getattr(model, "peft_config", None)
    if adapters:
        return next(iter(adapters.values())).base_model_name_or_path
    return getattr(model, "name_or_path", None) or None
