"""A trainer of TRL and the probe beside it: when to probe, what to log, and what to write down."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from entropy_probe.analyses.ahead import StepAhead
from entropy_probe.analyses.policy_check import StaleRolloutsError
from entropy_probe.checkpoints.training_run import other_samples
from entropy_probe.config import ProbeConfig
from entropy_probe.integrations.held_out import HeldOut, HeldOutSampler
from entropy_probe.integrations.live import logged_keys, probe_actor, prompt_shares
from entropy_probe.integrations.recorder import Recorder, drop_records_after
from entropy_probe.integrations.trl_batch import StepBatch, Watch
from entropy_probe.parallel.ranks import ALONE, Ranks, joined_ranks
from entropy_probe.parallel.shards import is_sharded
from entropy_probe.results.live import StepRecord, logged_numbers
from entropy_probe.rollouts.batch import Rollouts
from entropy_probe.scoring.memory import fitting_tokens
from entropy_probe.scoring.precision import precisions

LEAST_TOKENS = 512
"""Padded tokens of a forward pass, below which memory is not the microbatch's fault."""


@dataclass(eq=False)
class Budget:
    """How much of the training time may be spent.

    Attributes:
        share: of the training time; ``None`` for any.
        spent: seconds so far.
        last: seconds of the last probe.
        begun: when training did.
        steps: of training since then.
    """

    share: float | None
    spent: float = 0.0
    last: float | None = None
    begun: float = field(default_factory=time.perf_counter)
    steps: int = 0

    def allows(self) -> bool:
        """Whether another probe like the last one, or like a step where there was none, stays within it."""
        if self.share is None:
            return True
        training = time.perf_counter() - self.begun - self.spent
        expected = self.last if self.last is not None else training / max(1, self.steps)
        return self.spent + expected <= self.share * training

    @contextmanager
    def spending(self) -> Iterator[None]:
        """Count what is done inside."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.spent += time.perf_counter() - start


@dataclass(eq=False)
class _Step:
    """The step that is being taken, as far as it is known."""

    number: int
    batch: StepBatch | None = None
    ahead: StepAhead | None = None
    gradient: dict[str, torch.Tensor] | None = None
    record: StepRecord | None = None
    seconds: float = 0.0


class LiveRun:
    """The probe beside one call of ``trainer.train()``.

    The settings are those of :class:`~entropy_probe.integrations.trl.EntropyProbeCallback`.

    Raises:
        ValueError: for a trainer that cannot be probed.
    """

    def __init__(
        self,
        trainer: Any,
        *,
        evaluation: Literal["batch"] | HeldOut,
        config: Mapping[str, Any],
        every: int,
        attribution_every: int | None,
        budget: Budget,
        record: Literal["all", "probed"] | None,
        keep_gradients: int,
    ) -> None:
        self._trainer, self._settings = trainer, dict(config)
        self._every, self._attribution_every, self._records = every, attribution_every, record
        self._ranks: Ranks = joined_ranks() if trainer.accelerator.num_processes > 1 else ALONE
        self._watch = Watch(trainer)
        self._held_out = None if evaluation == "batch" else HeldOutSampler(evaluation, trainer, self._ranks)
        if self._held_out is None and (others := other_samples(self._watch.settings.values)):
            self._watch.close()
            raise ValueError(
                f"evaluation 'batch': expected responses sampled from the policy itself, got {', '.join(others)}; use "
                "evaluation=HeldOut(...), whose responses are"
            )
        self._recorder = None
        if record is not None and trainer.accelerator.is_main_process:
            drop_records_after(trainer.args.output_dir, trainer.state.global_step)
            self._recorder = Recorder(trainer.args.output_dir, keep_gradients=keep_gradients)
        self._keeps_gradients = keep_gradients > 0
        self._budget, budget.begun = budget, time.perf_counter()
        done = trainer.state.global_step
        self._probed = self._divided = done - done % every
        self._step: _Step | None = None

    def begin_step(self) -> None:
        """Forget the last step, once it is written."""
        self._write({})
        self._watch.clear()

    def before_step(self, model: Any, optimizer: Any) -> None:
        """Predict the step, if it is due, and take down what is to be recorded."""
        if self._keeps_gradients and is_sharded(model):  # said by all ranks, of which one has the recorder
            raise ValueError(
                "keep_gradients: expected whole gradients, got those of a model that FSDP2 shards; set it to 0"
            )
        number, budget = self._trainer.state.global_step + 1, self._budget
        budget.steps += 1
        self._step = step = _Step(number)
        start = time.perf_counter()
        with budget.spending():
            rate = max(group["lr"] for group in optimizer.param_groups)
            due = rate > 0 and self._due(number)  # the first step of a warm-up has a rate of 0 and changes nothing
            if due or self._records == "all":
                step.batch = self._watch.batch(self._ranks)
            if due and step.batch is not None:
                step.ahead = self._ahead(model, optimizer, step.batch, number)
                self._probed = number
            elif step.batch is not None:
                step.record = StepRecord(step=number, learning_rate=rate)
            if step.batch is not None and self._keeps_gradients and self._recorder is not None:
                # copied now: the trainer zeroes it before the record is written
                named = model.named_parameters()
                step.gradient = {n: p.grad.detach().to("cpu", copy=True) for n, p in named if p.grad is not None}
        step.seconds = time.perf_counter() - start

    def after_step(self) -> None:
        """Measure the step that was predicted, and hand the numbers to the trainer's log."""
        step = self._step
        if step is None or step.ahead is None:
            return
        start = time.perf_counter()
        with self._budget.spending():
            result = step.ahead.taken()
            shares = ()
            if step.ahead.prediction.by_prompt is not None:
                shares = prompt_shares(step.ahead, self._trainer.processing_class)
            step.ahead = None
            step.seconds += time.perf_counter() - start
            self._budget.last = step.seconds
            step.record = StepRecord.of(result, step.number, seconds=step.seconds, prompts=shares)
        for key, value in logged_keys(step.record).items():
            self._trainer._metrics["train"][key].append(value)

    def logged(self, logs: Mapping[str, Any]) -> None:
        """Write the record of the step with what the trainer logged."""
        if self._step is not None and self._trainer.state.global_step == self._step.number:
            self._write(logged_numbers(logs))

    def close(self) -> None:
        """Write what is left, and leave the trainer as it was."""
        self._write({})
        self._watch.close()
        if self._recorder is not None:
            self._recorder.close()

    def abandon(self) -> None:
        """Leave the trainer as it was after a failure; the record in hand is lost."""
        self._step = None
        self._watch.close()

    def _due(self, number: int) -> bool:
        """Whether to probe a step; the same on all ranks, whose clocks differ."""
        if number - self._probed < self._every or not self._watch.whole:
            return False
        if self._held_out is None and not self._watch.fresh:
            return False
        return self._ranks.broadcast(self._budget.allows())

    def _ahead(self, model: Any, optimizer: Any, batch: StepBatch, number: int) -> StepAhead:
        """The prediction, with microbatches as large as fit the memory."""
        while True:
            config = self._probe_config(model, batch)
            try:
                return self._predicted(model, optimizer, batch, config, number)
            except torch.OutOfMemoryError:
                half = (config.max_tokens_per_microbatch or fitting_tokens(model)) // 2
                if self._ranks.size > 1 or half < LEAST_TOKENS:
                    raise
                self._settings["max_tokens_per_microbatch"] = half
            torch.cuda.empty_cache()

    def _predicted(self, model: Any, optimizer: Any, batch: StepBatch, config: ProbeConfig, number: int) -> StepAhead:
        given: dict[str, Any] = {"distributed": self._ranks.size > 1}
        if self._held_out is None:
            return probe_actor(model, optimizer, batch.rollouts, config, **given)
        update: Rollouts | None = None
        if self._attribution_every is not None and number - self._divided >= self._attribution_every:
            update, self._divided = batch.rollouts, number
        evaluation, weighted = self._held_out.rollouts(model, config)
        try:
            return probe_actor(model, optimizer, update, weighted, evaluation=evaluation, **given)
        except StaleRolloutsError:
            self._held_out.forget()
        evaluation, config = self._held_out.rollouts(model, config)
        return probe_actor(model, optimizer, update, config, evaluation=evaluation, **given)

    def _probe_config(self, model: Any, batch: StepBatch) -> ProbeConfig:
        args = self._trainer.args
        if getattr(self._trainer.accelerator, "scaler", None) is not None and not args.max_grad_norm > 0:
            raise ValueError(
                "fp16: expected a gradient that clipping has unscaled, got max_grad_norm 0; set it, or use bf16"
            )
        low = any(dtype == torch.bfloat16 for _, dtype in precisions(model))
        of_trainer = {
            "loss": batch.loss,
            "temperature": args.temperature,
            "max_completion_length": args.max_completion_length,
            "max_grad_norm": args.max_grad_norm or None,
            "dtype": "bfloat16" if low else "float32",
            "measure_noise_floor": False,
            "horizon": None,
        }
        return ProbeConfig.model_validate(of_trainer | self._settings)

    def _write(self, log: Mapping[str, float]) -> None:
        """Write the record in hand, if there is one; a disk that fails ends recording and nothing else."""
        step, self._step = self._step, None
        if self._recorder is None or step is None or step.record is None:
            return
        record = step.record.model_copy(update={"log": dict(log)})
        try:
            self._recorder.write(record, None if step.batch is None else step.batch.rollouts, step.gradient)
        except OSError as error:
            self._recorder = None
            warnings.warn(f"entropy-probe: no more records: {error}", stacklevel=2)
