"""Probing a step inside a training loop, of whatever trainer: before the optimizer takes it, and after."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from entropy_probe.analyses.ahead import StepAhead
from entropy_probe.config import ProbeConfig
from entropy_probe.probe import EntropyProbe
from entropy_probe.results.live import ESTIMATES, PromptShare, StepRecord
from entropy_probe.rollouts.batch import Rollouts
from entropy_probe.scoring.cache import digest
from entropy_probe.steps.adamw import Gradient, clip_gradient, optimizer_parameters

PREFIX = "entropy_probe/"
_WITH_ERROR = ("predicted", "realized")


def probe_actor(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Rollouts | None,
    config: ProbeConfig,
    *,
    evaluation: Rollouts | None = None,
    clipped: bool = True,
    **settings: Any,
) -> StepAhead:
    """Predict the step that an optimizer is about to take with what is in ``.grad``; call it right before the step.

    Right after the step, ``.taken()`` of what is returned measures it, and ``.result`` is the prediction alone.
    Parameters, buffers, gradients, optimizer state, modes and random states are left as they are.

    Args:
        model: the policy; of a ``DistributedDataParallel`` model what it wraps.
        optimizer: holds the moments.
        batch: the rollouts of the step, of all ranks; ``None`` where there are evaluation rollouts.
        config: the sampling temperature, the trainer's loss, and the threshold that it clips with.
        evaluation: rollouts of this policy that the step is not taken on; ``None`` to take the change on ``batch``.
        clipped: whether the trainer has clipped ``.grad`` already, or will after this.
        settings: of :class:`EntropyProbe`, such as ``distributed=True``.

    Raises:
        ValueError: for unusable rollouts, an unsupported optimizer, or without a gradient.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    probe = EntropyProbe(model, optimizer, config, **settings)
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps the one it prepares
    gradient: Gradient = {name: p.grad for name, p in optimizer_parameters(model, optimizer).items()}
    if not clipped:
        gradient = clip_gradient(gradient, config.max_grad_norm).values
    return probe.ahead(gradient=gradient, batch=batch, evaluation=evaluation)


def logged_keys(record: StepRecord) -> dict[str, float]:
    """The numbers of a step by the keys that trackers get them under."""
    numbers: dict[str, float | None] = {}
    for name in ESTIMATES:
        estimate = getattr(record, name)
        numbers[name] = None if estimate is None else estimate.value
        if name in _WITH_ERROR:
            numbers[f"{name}_se"] = None if estimate is None else estimate.standard_error
    numbers |= {name: getattr(record, name) for name in ("ess", "loss_distance", "seconds")}
    return {PREFIX + name: value for name, value in numbers.items() if value is not None}


def prompt_shares(ahead: StepAhead, tokenizer: Any = None) -> tuple[PromptShare, ...]:
    """What each prompt of the step's batch adds to the prediction, with its text if there is a tokenizer.

    Empty where the step does not divide over prompts.
    """
    by_prompt = ahead.prediction.by_prompt
    if by_prompt is None:
        return ()
    update = ahead.prediction.plan.batch.update
    rollouts, shares = update.rollouts, []
    for unit, value in enumerate(by_prompt.tolist()):
        rows = (update.prompts.index == unit) & rollouts.response_mask.any(1)
        if not bool(rows.any()):  # all its responses are masked out
            continue
        row = int(rows.nonzero()[0])
        start, end = (int(mask[row].int().argmax()) for mask in (rollouts.attention_mask, rollouts.response_mask))
        ids = rollouts.input_ids[row, start:end]
        text = None if tokenizer is None else tokenizer.decode(ids.tolist())
        identity = int.from_bytes(digest(ids.numpy().tobytes())[:6], "big")
        shares.append(PromptShare(id=identity, value=value, text=text))
    return tuple(shares)
