"""Callbacks for the Hugging Face Trainer and the trainers of TRL. Importing this module imports transformers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

from transformers import TrainerCallback  # noqa: TID253  a callback must be a subclass

from entropy_probe import __version__
from entropy_probe.checkpoints.adapters import adapters_trained, live_settings
from entropy_probe.checkpoints.manifest import GroupRecord, Manifest, base_record, live_groups, write_manifest
from entropy_probe.checkpoints.record import recordable_files
from entropy_probe.checkpoints.weights import has_weights, read_weights
from entropy_probe.integrations.held_out import HeldOut
from entropy_probe.integrations.live_run import Budget, LiveRun
from entropy_probe.integrations.trl_batch import calling_trainer


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


class EntropyProbeCallback(TrainerCallback):
    """Predicts and measures what the trainer's own steps do to the entropy, while they are taken.

    Every ``every`` steps, between the clipping of the gradient and the optimizer's step, the change is predicted from
    what is in ``.grad`` as it is, and measured right after the step. The numbers are logged with the step, as
    ``entropy_probe/predicted`` and so on, to every tracker that the trainer reports to. Training is left as it is to
    the bit. What goes wrong here becomes one warning, after which nothing more is probed.

    Args:
        every: steps between probes. With ``evaluation="batch"`` a step on responses that an earlier step was taken on
            is passed over for the next one on fresh responses, since its own momentum has seen them.
        evaluation: ``"batch"`` judges a step on its own batch (:meth:`EntropyProbe.one_batch`); :class:`HeldOut` on
            rollouts beside it.
        attribution_every: with held-out rollouts, steps between probes that also divide the prediction over the
            prompts of the batch and compare its loss with ``.grad``, which costs a gradient; with the step's own batch
            every probe does.
        record: which steps to write to ``output_dir/entropy_probe/step-000123/`` with their rollouts: the ``"probed"``
            ones, ``"all"``, or none.
        keep_gradients: of how many of the last recorded steps the clipped gradient is kept beside the record.
        budget: the largest share of the training time to spend; a probe that would exceed it waits.
        config: settings of :class:`ProbeConfig` in place of the trainer's, by name.

    Raises:
        ValueError: for settings out of range.
    """

    def __init__(
        self,
        every: int = 10,
        evaluation: Literal["batch"] | HeldOut = "batch",
        *,
        attribution_every: int | None = None,
        record: Literal["all", "probed"] | None = "probed",
        keep_gradients: int = 0,
        budget: float | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        for name, value in (("every", every), ("attribution_every", attribution_every)):
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1 step, got {value}; leave the callback out to probe none")
        if evaluation != "batch" and not isinstance(evaluation, HeldOut):
            raise ValueError(f"evaluation: expected 'batch' or HeldOut(...), got {evaluation!r}; use one of them")
        if record not in ("all", "probed", None):
            raise ValueError(f"record: expected 'all', 'probed' or None, got {record!r}; use one of them")
        if budget is not None and not 0 < budget <= 1:
            raise ValueError(f"budget: expected a share of the training time, above 0 and at most 1, got {budget}")
        self._start = partial(
            LiveRun,
            evaluation=evaluation,
            config=dict(config or {}),
            every=every,
            attribution_every=attribution_every,
            budget=Budget(budget),
            record=record,
            keep_gradients=keep_gradients,
        )
        self._live: LiveRun | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Find the trainer and prepare."""
        with self._safely():
            self._live = self._start(calling_trainer(self))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write what the last step left, if it was not logged, and forget its batch."""
        with self._safely():
            if self._live is not None:
                self._live.begin_step()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Predict the step."""
        with self._safely():
            if self._live is not None:
                self._live.before_step(kwargs["model"], kwargs["optimizer"])

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure it."""
        with self._safely():
            if self._live is not None:
                self._live.after_step()

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any], **kwargs: Any) -> None:
        """Write the record of the step with what the trainer logs of it."""
        with self._safely():
            if self._live is not None:
                self._live.logged(logs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write what is left and leave the trainer as it was."""
        with self._safely():
            if self._live is not None:
                live, self._live = self._live, None
                live.close()

    @contextmanager
    def _safely(self) -> Iterator[None]:
        """Whatever goes wrong inside ends probing, and not training."""
        try:
            yield
        except Exception as error:  # the one place for it: training goes on
            live, self._live = self._live, None
            if live is not None:
                live.abandon()
            said = f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)
            warnings.warn(f"entropy-probe: switched off, training goes on: {said}", stacklevel=3)


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
