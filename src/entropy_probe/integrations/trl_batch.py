"""The batch and the loss of the step that a trainer of TRL is at, taken from the trainer itself."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from entropy_probe.checkpoints.trainer_settings import TrainerSettings, live_settings
from entropy_probe.losses.trl import TRLLoss
from entropy_probe.parallel.ranks import Ranks
from entropy_probe.rollouts.batch import LOGPROBS, Rollouts

_LOGPROBS = dict(zip(("sampling_per_token_logps", "old_per_token_logps", "ref_per_token_logps"), LOGPROBS, strict=True))
_MEDIA = ("pixel_values",)


@dataclass(frozen=True, eq=False)
class StepBatch:
    """What one optimizer step is taken on.

    Attributes:
        rollouts: of all processes.
        loss: with the trainer's settings, as they were when it was computed.
    """

    rollouts: Rollouts
    loss: TRLLoss


def calling_trainer(callback: Any) -> Any:
    """The trainer that is calling one of its callbacks, which no argument of theirs is.

    Raises:
        ValueError: if none is.
    """
    from transformers import Trainer

    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer) and any(own is callback for own in caller.callback_handler.callbacks):
            return caller
        frame = frame.f_back
    raise ValueError(
        "callback: expected to be called by a trainer of TRL, got another caller; pass it as callbacks=[...]"
    )


class Watch:
    """Keeps what a trainer computes its loss on, until it is told that the next step begins.

    Args:
        trainer: a ``GRPOTrainer``, ``RLOOTrainer`` or one like them. Its ``compute_loss`` is wrapped until
            :meth:`close`.

    Raises:
        ValueError: for a trainer of another loss.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._inputs: list[dict[str, Any]] = []
        self._control: dict[str, Any] = {}
        if not hasattr(trainer, "_metrics") or self.settings.loss is None:
            raise ValueError(
                f"trainer: expected GRPOTrainer, RLOOTrainer or one like them, got {type(trainer).__name__}, whose "
                "loss is not known here; call probe_actor from its training step"
            )
        compute = trainer.compute_loss

        def watched(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if model.training:
                self._see(inputs)
            return compute(model, inputs, *args, **kwargs)

        self._own = vars(trainer).get("compute_loss")
        trainer.compute_loss = watched

    def close(self) -> None:
        """Leave the trainer as it was."""
        self.clear()
        if self._own is None:
            vars(self._trainer).pop("compute_loss", None)
        else:
            self._trainer.compute_loss = self._own

    def clear(self) -> None:
        """Forget the last step."""
        self._inputs = []

    def _see(self, inputs: Mapping[str, Any]) -> None:
        if not self._inputs and getattr(self._trainer, "use_adaptive_entropy", False):
            # as they are when the loss is computed: the bonus changes at the end of it
            self._control = {
                "entropy_coef": self._trainer.entropy_coef,
                "last_world_entropy": self._trainer._last_world_entropy,
            }
        self._inputs.append(dict(inputs))

    @property
    def settings(self) -> TrainerSettings:
        """The trainer's settings as they are now."""
        return live_settings(self._trainer.args, self._control)

    @property
    def whole(self) -> bool:
        """Whether the step has all its microbatches; the last one of an epoch may not."""
        return len(self._inputs) == self._trainer.args.gradient_accumulation_steps

    @property
    def fresh(self) -> bool:
        """Whether no earlier step was taken since the responses were sampled."""
        args = self._trainer.args
        first = self._trainer._step - len(self._inputs)
        per_generation = args.steps_per_generation * args.num_iterations
        return first % per_generation == 0 or len(self._inputs) % per_generation == 0

    def batch(self, ranks: Ranks) -> StepBatch:
        """The microbatches since the last step, of all processes; every process calls it.

        Raises:
            ValueError: for inputs other than text.
        """
        media = [name for name in _MEDIA if any(inputs.get(name) is not None for inputs in self._inputs)]
        if media:
            raise ValueError(
                f"batch: expected prompts of text alone, got {media[0]}, which cannot be scored again here"
            )
        parts = [columns_of(inputs) for inputs in self._inputs]
        of_ranks = ranks.gather(parts)
        numbered = (
            (step * ranks.size + rank, part) for rank, own in enumerate(of_ranks) for step, part in enumerate(own)
        )
        return StepBatch(joined_rollouts(numbered), self._loss())

    def _loss(self) -> TRLLoss:
        trainer, loss = self._trainer, dict(self.settings.loss or {})
        loss["use_vllm"] = bool(getattr(trainer, "use_vllm", False))
        loss["num_processes"] = trainer.accelerator.num_processes
        # of one generation, which the step is a part of
        if trainer.args.steps_per_generation > len(self._inputs):
            items = self._inputs[0].get("num_items_in_batch")
            loss["num_items_in_batch"] = None if items is None else int(items)
        return TRLLoss(**loss)


def joined_rollouts(parts: Iterable[tuple[int, Mapping[str, Tensor]]]) -> Rollouts:
    """Microbatches as one batch of rollouts, with a number for each and one for each prompt.

    Args:
        parts: number and columns (:func:`columns_of`) of each.
    """
    numbers, columns = zip(*parts, strict=True)
    length = max(part["input_ids"].shape[1] for part in columns)

    def joined(name: str) -> Tensor:
        short = (part[name] for part in columns)
        return torch.cat([torch.nn.functional.pad(x, (0, length - x.shape[1])) if x.dim() == 2 else x for x in short])

    fields: dict[str, Any] = {name: joined(name) for name in columns[0]}
    in_prompt = fields.pop("prompt_mask")
    prompts = [tuple(row[keep].tolist()) for row, keep in zip(fields["input_ids"], in_prompt, strict=True)]
    number = {prompt: k for k, prompt in enumerate(dict.fromkeys(prompts))}
    microbatches = [torch.full((len(part["input_ids"]),), k) for k, part in zip(numbers, columns, strict=True)]
    return Rollouts(
        prompt_ids=torch.tensor([number[prompt] for prompt in prompts]),
        microbatch_ids=torch.cat(microbatches),
        **fields,
    )


def columns_of(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """What a trainer computes its loss on as columns of rollouts; a response that it masks out has no tokens.

    Args:
        inputs: of the trainer's ``compute_loss``.

    Returns:
        Fields of :class:`Rollouts` on the CPU, and ``prompt_mask``, true for the tokens of the prompt, ``[n, L]``.
    """
    prompt, mask = inputs["prompt_mask"].bool(), inputs["completion_mask"].bool()
    own = mask if inputs.get("tool_mask") is None else mask & inputs["tool_mask"].bool()
    absent = torch.zeros(prompt.shape, device=prompt.device)
    columns = {
        "input_ids": torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
        "attention_mask": torch.cat([prompt, mask], 1),
        "prompt_mask": torch.cat([prompt, torch.zeros_like(mask)], 1),
        "response_mask": torch.cat([torch.zeros_like(prompt), own], 1),
        "advantages": inputs["advantages"],
    }
    for theirs, ours in _LOGPROBS.items():
        if inputs.get(theirs) is not None:
            columns[ours] = torch.cat([absent, inputs[theirs]], 1)
    if "old_logps" in inputs:  # of RLOO, which keeps their sums only
        mean = inputs["old_logps"] / own.sum(1).clamp(min=1)
        columns["old_logprobs"] = torch.cat([absent, mean[:, None] * own], 1)
    if columns["advantages"].dim() == 2:
        columns["advantages"] = torch.cat([absent, columns["advantages"]], 1)
    return {name: x.detach().cpu() for name, x in columns.items()}
