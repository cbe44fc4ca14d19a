"""Rewards: functions from prompts and response texts to numbers."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from entropy_probe.sampling.prompts import Prompt, import_function

__all__ = ["Reward", "exact_match", "gsm8k", "load_reward", "math", "score_responses"]

Reward = Callable[[Sequence[Prompt], Sequence[str]], Sequence[float]]
"""One finite number per response; prompt ``i`` is the one that response ``i`` answers."""

# an optional sign (not the hyphen of 10-5) and $, and a number whose thousands may be set off by commas
_NUMBER = re.compile(r"(?<![\d.])(?:(?<!\w)-)?(?:\$\s*-?)?((?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")
_PARSE_SECONDS = 5


def load_reward(name: str) -> Reward:
    """The reward of that name: ``exact_match``, ``gsm8k``, ``math``, or a ``package.module:function``.

    Raises:
        ValueError: if there is no such reward, or ``math`` is asked for without its extra.
    """
    if name == "math":
        _require_math_verify()
    if name in _BUILT_IN:
        return _BUILT_IN[name]
    if ":" not in name:
        raise ValueError(f"reward: expected {', '.join(_BUILT_IN)} or package.module:function, got {name!r}")
    return import_function(name, "reward")


def score_responses(reward: Reward, prompts: Sequence[Prompt], responses: Sequence[str]) -> Float[Tensor, " N"]:
    """Call a reward and check what it returns.

    Raises:
        ValueError: if there is not exactly one finite number per response.
    """
    output = reward(prompts, responses)
    try:
        scores = torch.as_tensor(output, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"reward: expected numbers, one per response, got {output!r:.80}") from error
    if tuple(scores.shape) != (len(responses),):
        raise ValueError(f"reward: expected {len(responses)} numbers, one per response, got shape {list(scores.shape)}")
    bad = (~torch.isfinite(scores)).nonzero()[:, 0].tolist()
    if bad:
        raise ValueError(
            f"reward: expected finite numbers, got {float(scores[bad[0]])} for a response to prompt "
            f"{prompts[bad[0]].id} ({len(bad)} of {len(scores)} are not finite)"
        )
    return scores


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
        expected = _final_number(_answer(prompt))
        if expected is None:
            raise ValueError(
                f"reward gsm8k: expected a number in the answer of prompt {prompt.id}, got {prompt.answer!r}"
            )
        scores.append(float(_final_number(text) == expected))
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


_BUILT_IN: dict[str, Reward] = {"exact_match": exact_match, "gsm8k": gsm8k, "math": math}


def _answer(prompt: Prompt) -> str:
    if prompt.answer is None:
        raise ValueError(f"reward: expected a reference answer for prompt {prompt.id}, got none; set answer_field")
    return prompt.answer


def _final_number(text: str) -> Decimal | None:
    _, marker, tail = text.rpartition("####")
    found = list(_NUMBER.finditer(tail.replace("−", "-")))
    if not found:
        return None
    match = found[0] if marker else found[-1]
    value = Decimal(match[1].replace(",", ""))
    return -value if "-" in match[0] else value


def _require_math_verify() -> None:
    try:
        import math_verify  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError("reward math: expected Math-Verify; pip install 'entropy-probe[math]'") from error
