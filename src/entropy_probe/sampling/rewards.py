"""Rewards: functions from prompts and responses to numbers; those that have a name here, and several together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import fsum
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from entropy_probe.sampling.final_number import final_number
from entropy_probe.sampling.foreign import import_function
from entropy_probe.sampling.generated import verified
from entropy_probe.sampling.prompts import Prompt
from entropy_probe.sampling.reward_calls import RewardFunction, Sample, columns_of
from entropy_probe.sampling.time_limit import time_limit

Reward = Callable[..., Any]
"""A number or None per response; :mod:`entropy_probe.sampling.reward_calls` says what it is called with."""

_PARSE_SECONDS = 5


@dataclass(frozen=True)
class Rewards:
    """Reward functions, whose weighted sum is the reward of a response.

    Attributes:
        functions: the functions.
        weights: one finite number for each.
        trainer_state: what functions that ask for TRL's ``trainer_state`` are given; None if there is none.
        time_limit: seconds that a function may take to score the responses of a call; None for no limit.
    """

    functions: tuple[RewardFunction, ...]
    weights: tuple[float, ...]
    trainer_state: SimpleNamespace | None = None
    time_limit: float | None = None

    @classmethod
    def of(cls, reward: Reward | Rewards) -> Rewards:
        """A single Python function as it is, with its own name."""
        if isinstance(reward, Rewards):
            return reward
        return cls((RewardFunction.of(getattr(reward, "__name__", type(reward).__name__), reward),), (1.0,))

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Check, before anything is sampled, that the prompts have what the functions ask for.

        Raises:
            ValueError: if they do not; names what is missing and what is available.
        """
        for reward in self.functions:
            reward.check(prompts, self.trainer_state)
            if reward.function in _BUILT_IN.values():
                answered = exact_match if reward.function is math else reward.function  # parsing MATH takes minutes
                answered(prompts, [""] * len(prompts))

    def score(self, samples: Sequence[Sample], prompts: Sequence[Prompt]) -> Float[Tensor, " N"]:
        """``sum_k w_k r_k`` over the functions that apply to a response, summed in float64 (TRL's rule).

        ``prompts`` are all of the source: a field of one is a column of all.

        Raises:
            ValueError: if a function fails or takes longer than it may, or none applies to a response.
        """
        columns = columns_of(prompts)
        each = []
        for reward in self.functions:
            with time_limit(self.time_limit, f"reward {reward.name}"):
                each.append(reward.score(samples, columns, self.trainer_state))
        totals = []
        for sample, rewards in zip(samples, zip(*each, strict=True), strict=True):
            terms = [w * r for w, r in zip(self.weights, rewards, strict=True) if r is not None]
            if not terms:
                names = " and ".join(reward.name for reward in self.functions)
                raise ValueError(
                    f"reward {names}: expected a number for every response, got None for {sample.text!r:.60} to prompt "
                    f"{sample.prompt.id}; return a number, add a reward that applies, or drop such prompts"
                )
            totals.append(fsum(terms))
        total = torch.tensor(totals, dtype=torch.float32)
        if not bool(total.isfinite().all()):
            raise ValueError(
                f"reward_weights: expected sums of rewards that float32 holds, got {max(totals, key=abs):.3g}; scale "
                "the weights down"
            )
        return total


def load_reward(name: str) -> Reward:
    """The reward of that name: ``exact_match``, ``gsm8k``, ``math``, ``reasoning_gym``, or ``package.module:function``.

    Raises:
        ValueError: if there is no such reward, or ``math`` is asked for without its extra.
    """
    if name == "math":
        _require_math_verify()
    if name in _BUILT_IN:
        return _BUILT_IN[name]
    if ":" not in name:
        raise ValueError(
            f"reward: expected {', '.join(_BUILT_IN)} or package.module:function, got {name!r}; correct it"
        )
    return import_function(name, "reward")


def load_rewards(
    names: str | Sequence[str],
    weights: Sequence[float] | None = None,
    trainer_state: SimpleNamespace | None = None,
    time_limit: float | None = None,
) -> Rewards:
    """The rewards of these names, with weights of 1 by default; see :func:`load_reward`.

    Raises:
        ValueError: if one of them cannot be used.
    """
    names = (names,) if isinstance(names, str) else tuple(names)
    functions = tuple(RewardFunction.of(name, load_reward(name)) for name in names)
    weights = (1.0,) * len(names) if weights is None else tuple(weights)
    if len(weights) != len(names) or not names:
        raise ValueError(
            f"reward_weights: expected one for each of {len(names)} rewards, got {len(weights)}; correct it"
        )
    return Rewards(functions, weights, trainer_state, time_limit)


def score_responses(
    reward: Reward | Rewards,
    prompts: Sequence[Prompt],
    responses: Sequence[str],
    token_ids: Sequence[Sequence[int]] | None = None,
) -> Float[Tensor, " N"]:
    """Call a reward, or several, on responses without special tokens, and check what is returned.

    Functions that ask for ``completion_ids`` are given ``token_ids``, empty by default.

    Raises:
        ValueError: if there is not exactly one finite number per response.
    """
    ids = token_ids or [()] * len(responses)
    samples = [Sample(*each) for each in zip(prompts, responses, ids, strict=True)]
    return Rewards.of(reward).score(samples, prompts)


def exact_match(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
    """1 if the response is the reference answer, surrounding white space aside, else 0."""
    return [float(text.strip() == _answer(prompt).strip()) for prompt, text in zip(prompts, responses, strict=True)]


def gsm8k(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
    """1 if the response's final number equals the reference's, else 0.

    The final number is the first one after the last ``####``, or the last one in a text without ``####``.
    Dollar signs and thousands separators are ignored and numbers compared by value (``1,200`` is
    ``1200.00``).

    Raises:
        ValueError: if a reference answer has no number.
    """
    scores = []
    for prompt, text in zip(prompts, responses, strict=True):
        expected = final_number(_answer(prompt))
        if expected is None:
            raise ValueError(
                f"reward gsm8k: expected a number in the answer of prompt {prompt.id}, got {prompt.answer!r}"
            )
        scores.append(float(final_number(text) == expected))
    return scores


def math(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
    r"""1 if the response's final expression is mathematically equal to the reference's, else 0 (Math-Verify).

    The reference is a solution with a ``\boxed{}`` answer, or the bare answer in LaTeX.

    Raises:
        ValueError: if Math-Verify is not installed, or a reference answer cannot be parsed.
    """
    _require_math_verify()
    from math_verify import parse, verify

    # the time limit uses a signal, which Python allows in the main thread only
    seconds: Any = _PARSE_SECONDS if threading.current_thread() is threading.main_thread() else None
    scores = []
    for prompt, text in zip(prompts, responses, strict=True):
        answer = _answer(prompt)
        boxed = answer if "\\boxed" in answer else f"\\boxed{{{answer.strip().strip('$')}}}"
        expected = parse(boxed, parsing_timeout=seconds)
        if not expected:
            raise ValueError(f"reward math: expected a LaTeX answer for prompt {prompt.id}, cannot parse {answer!r}")
        scores.append(float(verify(expected, parse(text, parsing_timeout=seconds), timeout_seconds=seconds)))
    return scores


_BUILT_IN: dict[str, Reward] = {"exact_match": exact_match, "gsm8k": gsm8k, "math": math, "reasoning_gym": verified}


def _answer(prompt: Prompt) -> str:
    if prompt.answer is None:
        raise ValueError(f"reward: expected a reference answer for prompt {prompt.id}, got none; set answer_field")
    if not isinstance(prompt.answer, str):
        raise ValueError(
            f"reward: expected the answer of prompt {prompt.id} as text or a number, got "
            f"{type(prompt.answer).__name__} {prompt.answer!r:.60}; set answer_field, or write a reward function"
        )
    return prompt.answer


def _require_math_verify() -> None:
    try:
        import math_verify  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError("reward math: expected Math-Verify; pip install 'entropy-probe[math]'") from error
