"""One rollout of a dump, checked, by our names; its tokens may still be text."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from entropy_probe.dumps.layouts import LISTS, Layout, Record


@dataclass(frozen=True)
class Sample:
    """A rollout. What is per token is for each token of the response.

    Attributes:
        where: the file and line, for messages.
        prompt: token ids, text, or the messages of a chat.
        response: token ids, or text.
        step: the trainer's step.
        group: which rollouts the trainer compares it with, where the dump says so.
        reward: its reward; of several functions see ``rewards``.
        rewards: those of several functions, by name.
        advantage: as the trainer used it.
        mask: which tokens the policy sampled, and the trainer's loss counts.
        kept: whether the trainer's loss takes it.
        truncated: whether it was cut off at the largest length.
        entropy: the mean over its tokens that the trainer logged, in nats.
        microbatch: in which forward pass it was.
        lengths: tokens of prompt and response, where they are texts and the dump counted.
        sampled: log-probabilities of the sampler, in nats.
        old: of the policy that importance ratios are taken to.
        reference: of the reference policy.
    """

    where: str
    prompt: tuple[int, ...] | str | tuple[Mapping[str, Any], ...]
    response: tuple[int, ...] | str
    step: int | None = None
    group: Hashable | None = None
    reward: float | None = None
    rewards: Mapping[str, float] | None = None
    advantage: float | tuple[float, ...] | None = None
    mask: tuple[bool, ...] | None = None
    kept: bool = True
    truncated: bool | None = None
    entropy: float | None = None
    microbatch: str | None = None
    lengths: tuple[int, int] | None = None
    sampled: tuple[float, ...] | None = None
    old: tuple[float, ...] | None = None
    reference: tuple[float, ...] | None = None

    @property
    def is_text(self) -> bool:
        """Whether its response is a text that has to be tokenized again."""
        return isinstance(self.response, str)


def read_sample(layout: Layout, record: Record, where: str) -> Sample:
    """The rollout of a record that was prepared.

    Raises:
        ValueError: if a field is missing or of another kind, or lists do not fit each other.
    """
    told = {ours: record[theirs] for ours, theirs in layout.fields.items() if record.get(theirs) is not None}
    name = layout.fields.get
    try:
        if "tokens" in layout.fields:
            prompt, response, first, last = _cut(layout, told)
        else:
            prompt = told.get("prompt_ids", told.get("prompt"))
            response, first, last = told.get("response_ids", told.get("response")), 0, None
            prompt, response = _prompt(name("prompt"), prompt), _response(name("response"), response)
        lists = {}
        for ours in LISTS:
            if isinstance(told.get(ours), list | tuple):
                values = told[ours][first:last] if layout.over == "sequence" else told[ours]
                if isinstance(response, str) or len(values) != len(response):
                    raise ValueError(
                        f"{name(ours)}: expected {len(response)} entries, one for each token of the response, got "
                        f"{len(values)}"
                    )
                lists[ours] = tuple(bool(x) if ours == "mask" else _number(name(ours), x, math.nan) for x in values)
        advantage = lists.pop("advantage", None)
        if advantage is None and "advantage" in told:
            advantage = _number(name("advantage"), told["advantage"])
        return Sample(
            where,
            prompt,
            response,
            step=_whole(name("step"), told.get("step")),
            group=told.get("group"),
            reward=_number(name("reward"), told["reward"]) if "reward" in told else None,
            rewards=_rewards(layout, record) if layout.rewards_by_name else None,
            advantage=advantage,
            kept=bool(told.get("kept", True)),
            truncated=told.get("truncated"),
            entropy=_number(name("entropy"), told["entropy"]) if "entropy" in told else None,
            microbatch=told.get("microbatch"),
            lengths=(told["prompt_length"], told["response_length"]) if layout.whole else None,
            **lists,
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _cut(layout: Layout, told: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...], int, int]:
    """Prompt and response of a whole sequence, and where the response begins and ends."""
    name = layout.fields
    tokens = _ids(name["tokens"], told.get("tokens"))
    if "length" in told:
        tokens = tokens[: _whole(name["length"], told["length"])]
    if "response_length" in name:
        length = _whole(name["response_length"], told.get("response_length")) or 0
        start = len(tokens) - length
    else:
        mask = told.get("mask")
        if not isinstance(mask, list) or len(mask) < len(tokens):
            got = "none" if mask is None else str(len(mask)) if isinstance(mask, list) else repr(mask)[:40]
            raise ValueError(f"{name['mask']}: expected an entry for each of the {len(tokens)} tokens, got {got}")
        start = next((i for i, on in enumerate(mask[: len(tokens)]) if on), len(tokens))
    if not 0 < start <= len(tokens):
        raise ValueError(
            f"{name['tokens']}: expected a prompt before the response, got {len(tokens)} tokens from {start}"
        )
    return tokens[:start], tokens[start:], start, len(tokens)


def _prompt(field: str | None, value: Any) -> Any:
    if isinstance(value, list) and value and all(isinstance(turn, Mapping) for turn in value):
        return tuple({key: x for key, x in turn.items() if x is not None} for turn in value)  # Parquet fills in nulls
    return value if isinstance(value, str) else _ids(field, value)


def _response(field: str | None, value: Any) -> tuple[int, ...] | str:
    if isinstance(value, list) and value and all(isinstance(turn, Mapping) for turn in value):
        first = value[0]
        if (
            len(value) > 1
            or first.get("role") != "assistant"
            or first.get("tool_calls")
            or first.get("reasoning_content")
        ):
            raise ValueError(
                f"{field}: expected one turn of the assistant, got {len(value)} turns or calls of tools, whose tokens "
                "no text tells; record token ids in training"
            )
        value = first.get("content")
    return value if isinstance(value, str) else _ids(field, value)


def _ids(field: str | None, value: Any) -> tuple[int, ...]:
    ids = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else None
    if ids is None or not all(isinstance(x, int) and not isinstance(x, bool) for x in ids):
        raise ValueError(f"{field}: expected token ids or text, got {value!r:.60}")
    return ids


def _number(field: str | None, value: Any, missing: float | None = None) -> float:
    if value is None and missing is not None:
        return missing
    if isinstance(value, str) or not isinstance(value, Real):
        raise ValueError(f"{field}: expected a number, got {value!r:.60}")
    return float(value)


def _whole(field: str | None, value: Any) -> int | None:
    """A count; ms-swift writes its step as text, pandas as a float where some are missing."""
    if value is None:
        return None
    text = str(value).removesuffix(".0")
    if not text.isdigit():
        raise ValueError(f"{field}: expected a whole number, got {value!r:.60}")
    return int(text)


def _rewards(layout: Layout, record: Record) -> dict[str, float]:
    """What the reward functions gave, by their names: all other numbers; what a function did not judge is left out."""
    known = set(layout.fields.values())
    return {
        name: float(value)
        for name, value in record.items()
        if name not in known and isinstance(value, float) and not math.isnan(value)
    }
