"""Batches of prompts and sampled responses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

if TYPE_CHECKING:
    Ids = Tensor
else:
    Ids = Any  # given as a tensor, an array or a list, of integers or strings; kept as a tensor

LOGPROBS = ("sampled_logprobs", "old_logprobs", "reference_logprobs")
"""Log-probabilities that other policies give the response tokens."""


@dataclass(frozen=True, eq=False)
class Rollouts:
    """A batch of prompts and sampled responses, padded to a common length on either side.

    Attributes:
        input_ids: token ids, prompt followed by response, ``[N, L]``.
        attention_mask: true for real tokens, one contiguous run per sequence, ``[N, L]``.
        response_mask: true for the tokens the policy sampled, the end-of-sequence token included and nothing
            after it, ``[N, L]``. Gaps are allowed (tool output inside a response). All false: a response that the
            trainer masks out of its loss, where it still counts in what the loss divides by; in update batches only.
        prompt_ids: which prompt a sequence answers, ``[N]``; equal ids share a prompt. Strings are numbered in the
            order of their first sequence.
        advantages: per sequence ``[N]`` or per token ``[N, L]``, used as given. Needed for the update batch only.
        rewards: the scalar reward of each sequence, ``[N]``.
        sampled_logprobs: the sampler's own log-probabilities in nats, ``[N, L]``.
        old_logprobs: those of the policy that the trainer takes importance ratios to, in nats, ``[N, L]``. Without them
            ratios are taken to the policy as it is, as in the first step on fresh rollouts.
        reference_logprobs: those of the reference policy that a loss with a KL term holds to, in nats, ``[N, L]``.
        microbatch_ids: in which of the trainer's forward passes a sequence was, ``[N]``, for losses that are normalised
            over each: accumulation step times processes, plus the process.
        trajectory_ids: which rollout a sequence is a part of, ``[N]``, where one is spread over several sequences, such
            as the turns of a conversation whose prompts hold the earlier turns. What has one id was sampled together.
            Strings as for ``prompt_ids``.
        retokenised: whether the tokens are those of a text that was tokenized again, which may be others than the
            policy sampled. Such a batch is no evaluation batch.

    Masks of any integer or boolean type are accepted and stored as booleans.

    Raises:
        ValueError: if shapes disagree, a mask is inconsistent, there is no response token at all or none before a
            response, or a number is not finite at a response token.
    """

    # Plain tensors, checked by hand below: masks of any type are accepted, and a user's mistake gets one clear line.
    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    prompt_ids: Ids
    advantages: Tensor | None = None
    rewards: Tensor | None = None
    sampled_logprobs: Tensor | None = None
    old_logprobs: Tensor | None = None
    reference_logprobs: Tensor | None = None
    microbatch_ids: Ids | None = None
    trajectory_ids: Ids | None = None
    retokenised: bool = False

    def __post_init__(self) -> None:
        self._check_kinds()
        for name in ("prompt_ids", "microbatch_ids", "trajectory_ids"):
            object.__setattr__(self, name, _numbered(name, getattr(self, name)))
        for name in ("attention_mask", "response_mask"):
            object.__setattr__(self, name, getattr(self, name).bool())
        self._check_shapes()
        self._check_masks()
        self._check_finite()

    def _check_kinds(self) -> None:
        required = ("input_ids", "attention_mask", "response_mask")
        for name in (*required, "advantages", "rewards", *LOGPROBS):
            value = getattr(self, name)
            if value is None and name not in required:
                continue
            if not isinstance(value, Tensor):
                raise ValueError(f"{name}: expected a tensor, got {type(value).__name__}; convert it with torch.tensor")
            if value.is_complex() or value.layout != torch.strided or value.is_meta:
                what = "on device meta, without values" if value.is_meta else f"{value.dtype}, {value.layout}"
                raise ValueError(f"{name}: expected real numbers in a dense tensor, got {what}; convert it")
        if self.prompt_ids is None:
            raise ValueError("prompt_ids: expected [N], the prompt of each sequence, got None; number the prompts")

    def _check_shapes(self) -> None:
        if self.input_ids.dim() != 2 or self.input_ids.shape[0] == 0:
            raise ValueError(
                f"input_ids: expected shape [N, L] with N >= 1, got {tuple(self.input_ids.shape)}; stack the "
                "sequences and pad them to one length"
            )
        n, length = self.input_ids.shape
        allowed = {
            "attention_mask": [(n, length)],
            "response_mask": [(n, length)],
            "prompt_ids": [(n,)],
            "advantages": [(n,), (n, length)],
            "rewards": [(n,)],
            **{name: [(n, length)] for name in LOGPROBS},
            "microbatch_ids": [(n,)],
            "trajectory_ids": [(n,)],
        }
        for name, shapes in allowed.items():
            value = getattr(self, name)
            if value is not None and tuple(value.shape) not in shapes:
                expected = " or ".join(str(list(shape)) for shape in shapes)
                raise ValueError(f"{name}: expected shape {expected} to match input_ids, got {list(value.shape)}")
        for name in ("input_ids", "prompt_ids", "microbatch_ids", "trajectory_ids"):
            value = getattr(self, name)
            if value is not None and value.is_floating_point():
                raise ValueError(f"{name}: expected integers, got {value.dtype}")

    def _check_masks(self) -> None:
        attention, response = self.attention_mask, self.response_mask
        if not bool(response.any()):
            raise ValueError(
                "rollouts: expected response tokens, got a response_mask that is false everywhere; set it where the "
                "policy sampled (all false in single sequences: the trainer masks these out)"
            )
        _refuse_rows((response & ~attention).any(1), "response_mask covers padding", "mask only real tokens")
        starts = attention & ~torch.nn.functional.pad(attention, (1, 0))[:, :-1]
        _refuse_rows(starts.sum(1) != 1, "attention_mask is not one contiguous run", "pad on one side only")
        _refuse_rows(
            (response & starts).any(1),
            "response starts at the first token",
            "keep at least one prompt token before it, since nothing predicts the first token",
        )

    def _check_finite(self) -> None:
        for name in ("advantages", "rewards", *LOGPROBS):
            value = getattr(self, name)
            if value is None:
                continue
            bad = ~torch.isfinite(value)
            if value.dim() == 2:
                bad = (bad & self.response_mask).any(1)
            elif name == "advantages":
                bad &= self.response_mask.any(1)
            where = "" if value.dim() == 1 else " (or missing) at response tokens"
            _refuse_rows(bad, f"{name} are not finite{where}", "recompute them; they are never dropped or filled in")

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def num_prompts(self) -> int:
        """The number of distinct prompts."""
        return int(self.prompt_ids.unique().numel())

    @property
    def response_lengths(self) -> Int[Tensor, " N"]:
        """Response tokens per sequence."""
        return self.response_mask.sum(1)

    @property
    def shortest_first(self) -> Int[Tensor, " n"]:
        """The sequences with a response, by their number of tokens; at least one, unless this is a part of a batch."""
        order = self.attention_mask.sum(1).argsort(stable=True)
        return order[self.response_mask.any(1)[order]]

    @cached_property
    def token_advantages(self) -> Float[Tensor, "N L"]:
        """The advantages spread over response tokens, 0 elsewhere.

        Raises:
            ValueError: if the batch has no advantages.
        """
        if self.advantages is None:
            raise ValueError("advantages: expected [N] or [N, L] on an update batch, got None; set Rollouts.advantages")
        per_token = self.advantages if self.advantages.dim() == 2 else self.advantages[:, None]
        return torch.where(self.response_mask, per_token, torch.zeros((), dtype=per_token.dtype))

    def select(self, rows: Tensor) -> Rollouts:
        """The sequences at the given indices or boolean mask, in that order; there may be none."""
        return self._map(lambda column: column[rows])

    def cpu(self) -> Rollouts:
        """The batch in host memory, from where it goes to the model microbatch by microbatch."""
        return self._map(Tensor.cpu)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Rollouts:
        changed = object.__new__(Rollouts)  # valid, as this batch is
        for field in fields(self):
            column = getattr(self, field.name)
            object.__setattr__(changed, field.name, change(column) if isinstance(column, Tensor) else column)
        return changed

    def to_parquet(self, path: str | Path) -> None:
        """Write the batch with its token ids, one sequence per row; see :mod:`entropy_probe.rollouts.parquet`."""
        from entropy_probe.rollouts.parquet import write_rollouts

        write_rollouts(self, Path(path))

    @classmethod
    def from_parquet(cls, path: str | Path) -> Rollouts:
        """Read a batch written by :meth:`to_parquet`.

        Raises:
            ValueError: if the file is missing, is not Parquet, or lacks a column.
        """
        from entropy_probe.rollouts.parquet import read_rollouts

        return read_rollouts(Path(path))


def _numbered(name: str, ids: Tensor | Sequence[Any] | None) -> Tensor | None:
    """Ids as a tensor; strings by the order in which they first appear."""
    if ids is None or isinstance(ids, Tensor):
        return ids
    values = list(getattr(ids, "tolist", lambda: ids)())
    if all(isinstance(value, str) for value in values):
        number = {value: k for k, value in enumerate(dict.fromkeys(values))}
        values = [number[value] for value in values]
    other = next((value for value in values if not isinstance(value, Integral)), None)
    if other is not None:
        raise ValueError(f"{name}: expected integers, or strings for all sequences, got {other!r}; give each an id")
    return torch.tensor([int(value) for value in values], dtype=torch.long)


def _refuse_rows(bad: Tensor, what: str, remedy: str) -> None:
    if bool(bad.any()):
        rows = bad.nonzero()[:, 0].tolist()
        shown = ", ".join(map(str, rows[:5])) + (", …" if len(rows) > 5 else "")
        raise ValueError(f"rollouts: {what} in {len(rows)} of {len(bad)} sequences (index {shown}); {remedy}")
