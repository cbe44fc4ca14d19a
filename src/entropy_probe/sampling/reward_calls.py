"""Calling reward functions by keyword, as the trainer that they were written for calls them.

The names of a function's parameters tell which trainer that is; see :data:`CONVENTIONS`.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence, Set
from concurrent.futures import Future
from dataclasses import dataclass
from decimal import Decimal
from numbers import Real
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from entropy_probe.sampling.foreign import call
from entropy_probe.sampling.prompts import Prompt
from entropy_probe.sampling.records import field_of

CONVENTIONS: dict[str, tuple[str, ...]] = {
    "TRL": ("completions", "completion_ids"),
    "verl": ("solution_str",),
    "verl batch": ("solution_strs",),
    "own": ("responses",),
}
"""The parameters that a convention is recognised by, in this order; a function of any keywords is called as by TRL."""

_CONVENTIONS_IN_WORDS = (
    "completions (TRL: prompts, completions, completion_ids and the columns of the records), solution_str (verl: "
    "data_source, solution_str, ground_truth, extra_info) or responses (prompts, responses)"
)
_LARGEST = torch.finfo(torch.float32).max
_NOT_COLUMNS = frozenset({"prompt", "completion", "completion_ids", "prompts", "completions"})
"""Fields that TRL does not pass on, or passes with another meaning."""


@dataclass(frozen=True)
class Sample:
    """A response to be scored.

    Attributes:
        prompt: what it answers.
        text: the response without special tokens.
        token_ids: its tokens.
    """

    prompt: Prompt
    text: str
    token_ids: Sequence[int]


@dataclass(frozen=True)
class RewardFunction:
    """A reward function and how it is called."""

    name: str  # for messages
    function: Callable[..., Any]  # the function itself
    convention: str  # a key of :data:`CONVENTIONS`
    parameters: tuple[inspect.Parameter, ...]  # the parameters that are filled by name
    takes_any: bool  # whether it takes keywords that no parameter names

    @classmethod
    def of(cls, name: str, function: Callable[..., Any]) -> RewardFunction:
        """The function with its convention.

        Raises:
            ValueError: if its parameters name nothing that a response is passed as.
        """
        parameters, takes_any = _signature(name, function)
        names = {parameter.name for parameter in parameters}
        conventions = [key for key, marks in CONVENTIONS.items() if names.intersection(marks)]
        if not conventions and not takes_any:
            raise ValueError(
                f"reward {name}: expected a parameter named {_CONVENTIONS_IN_WORDS}, got "
                f"({', '.join(p.name for p in parameters)}); rename the parameters, since they are passed by name"
            )
        return cls(name, function, conventions[0] if conventions else "TRL", parameters, takes_any)

    def check(self, prompts: Sequence[Prompt], state: SimpleNamespace | None) -> None:
        """Check, before anything is sampled, that everything that the function asks for is there.

        Raises:
            ValueError: if a parameter without default is none of what is available, or verl's ground truth is missing.
        """
        self._bind(self._values([Sample(prompts[0], "", ())], columns_of(prompts), state))
        if self.convention.startswith("verl"):
            without = next((prompt for prompt in prompts if _ground_truth(prompt) is None), None)
            if without is not None and any(p.name.startswith("ground_truth") for p in self.parameters):
                raise ValueError(
                    f"reward {self.name}: expected reward_model.ground_truth or a reference answer for prompt "
                    f"{without.id}, got fields {', '.join(without.columns) or 'none'}; set prompts.answer_field"
                )

    def score(
        self, samples: Sequence[Sample], columns: Sequence[str], state: SimpleNamespace | None
    ) -> list[float | None]:
        """The rewards, one per sample; None where the function says that it does not apply.

        Raises:
            ValueError: if the function raises an error, or does not return one finite number or None per sample.
        """
        each = [[sample] for sample in samples] if self.convention == "verl" else [samples]
        calls = [self._bind(self._values(group, columns, state)) for group in each]
        outputs = call(f"reward {self.name}, {self._described(samples, calls[0])}", self._call_all, calls)
        output = outputs if self.convention == "verl" else outputs[0]
        return _numbers(self.name, output, samples, scores=self.convention.startswith("verl"))

    def _values(
        self, samples: Sequence[Sample], columns: Sequence[str], state: SimpleNamespace | None
    ) -> dict[str, Any]:
        """What is available by name, in the form of the function's convention."""
        prompts = [sample.prompt for sample in samples]
        if self.convention == "verl":
            (sample,) = samples
            return _verl(sample)
        if self.convention == "verl batch":
            each = [_verl(sample) for sample in samples]
            return {f"{name}s": [one[name] for one in each] for name in each[0]}
        of_records = {name: [_column(prompt, name) for prompt in prompts] for name in columns}
        if self.convention == "own":
            return of_records | {"prompts": prompts, "responses": [sample.text for sample in samples]}
        return of_records | {
            "prompts": [_own(prompt.prompt) for prompt in prompts],
            "completions": [
                s.text if isinstance(s.prompt.prompt, str) else [{"role": "assistant", "content": s.text}]
                for s in samples
            ],
            "completion_ids": [list(sample.token_ids) for sample in samples],
            **({} if state is None else {"trainer_state": state}),
            "log_extra": _log,
            "log_metric": _log,
        }

    def _bind(self, values: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Positional and keyword arguments: every parameter without default has to be among the values."""
        positional: list[Any] = []
        keywords: dict[str, Any] = {}
        missing = []
        for parameter in self.parameters:
            if parameter.name not in values and parameter.default is inspect.Parameter.empty:
                missing.append(parameter.name)
            elif parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
                positional.append(values.get(parameter.name, parameter.default))
            elif parameter.name in values:
                keywords[parameter.name] = values[parameter.name]
        if missing:
            raise ValueError(
                f"reward {self.name}: expected parameters among what it can be given, got {', '.join(missing)}; "
                f"available are {', '.join(values)}; rename the parameter, or give the records that field"
            )
        if self.takes_any and self.convention in ("TRL", "own"):
            names = {parameter.name for parameter in self.parameters}
            keywords |= {name: value for name, value in values.items() if name not in names}
        return positional, keywords

    def _described(self, samples: Sequence[Sample], arguments: tuple[list[Any], dict[str, Any]]) -> str:
        """What the function is called with, for an error inside it."""
        positional, keywords = arguments
        names = [p.name for p in self.parameters if p.kind is inspect.Parameter.POSITIONAL_ONLY][: len(positional)]
        if "completions" not in (*names, *keywords):
            return f"called with {', '.join((*names, *keywords))}"
        form = "text" if isinstance(samples[0].prompt.prompt, str) else "messages"
        return f"called with {', '.join((*names, *keywords))} (completions as {form}, as the prompts are)"

    def _call_all(self, calls: Sequence[tuple[list[Any], dict[str, Any]]]) -> list[Any]:
        outputs = [self.function(*positional, **keywords) for positional, keywords in calls]
        if any(inspect.isawaitable(output) for output in outputs):
            outputs = _await_all(outputs)
        return [_listed(output) for output in outputs]


def _signature(name: str, function: Callable[..., Any]) -> tuple[tuple[inspect.Parameter, ...], bool]:
    """The parameters with a name to fill, and whether any other keyword is taken too."""
    remedy = "name a function or an instance with __call__"
    if inspect.isclass(function):
        raise ValueError(f"reward {name}: expected a function, got the class {function.__name__}; {remedy}")
    if isinstance(function, nn.Module):
        raise ValueError(f"reward {name}: expected a function, got a model; write a function that calls it on texts")
    try:
        inner = inspect.signature(function).parameters.values()
        # functools.cache passes everything on and has no signature of its own
        cached = hasattr(function, "cache_info")
        outer = inner if cached else inspect.signature(function, follow_wrapped=False).parameters.values()
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"reward {name}: expected a function with a signature, got none ({error}); {remedy}"
        ) from error
    catches = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    # a decorator that passes everything on shows what it decorates; one that does not is called as it is
    shown = inner if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in outer) else outer
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in shown)
    return tuple(p for p in shown if p.kind not in catches), takes_any


def columns_of(prompts: Sequence[Prompt]) -> list[str]:
    """Fields of any record, which are None where another record has none; ``answer`` wherever there is one."""
    names = dict.fromkeys(str(name) for prompt in prompts for name in prompt.columns)
    if any(prompt.answer is not None for prompt in prompts):
        names["answer"] = None
    return [name for name in names if name not in _NOT_COLUMNS]


def _own(value: Any) -> Any:
    """Nested values anew for each response and each call, since reward functions may change them."""
    if isinstance(value, Mapping):
        return {name: _own(inner) for name, inner in value.items()}
    return [_own(inner) for inner in value] if isinstance(value, list | tuple) else value


def _column(prompt: Prompt, name: str) -> Any:
    return _own(prompt.answer if name == "answer" and name not in prompt.columns else prompt.columns.get(name))


def _ground_truth(prompt: Prompt) -> Any:
    """What verl compares with: its own field, else the reference answer."""
    return truth if (truth := field_of(prompt.columns, "reward_model.ground_truth")) is not None else prompt.answer


def _verl(sample: Sample) -> dict[str, Any]:
    columns = sample.prompt.columns
    return {
        "data_source": columns.get("data_source"),
        "solution_str": sample.text,
        "ground_truth": _own(_ground_truth(sample.prompt)),
        "extra_info": {} if (extra := columns.get("extra_info")) is None else _own(extra),
    }


def _log(*args: Any, **kwargs: Any) -> None:
    """In place of TRL's ``log_extra`` and ``log_metric``, whose logs the probe has none of."""


def _await_all(outputs: Sequence[Awaitable[Any]]) -> list[Any]:
    """Results of coroutines, awaited together in an event loop of their own."""

    async def gather() -> list[Any]:
        return list(await asyncio.gather(*outputs))

    def run() -> None:
        try:
            results.set_result(asyncio.run(gather()))
        except BaseException as error:
            results.set_exception(error)

    # a notebook's main thread has a loop already; what hangs does not keep the process
    results: Future[list[Any]] = Future()
    threading.Thread(target=run, daemon=True).start()
    return results.result()


def _listed(output: Any) -> Any:
    """Tensors, arrays and generators as lists; what has no order of responses as it is."""
    if callable(getattr(output, "tolist", None)):
        return output.tolist()
    if isinstance(output, Iterable) and not isinstance(output, str | bytes | Mapping | Set):
        return list(output)
    return output


def _numbers(name: str, output: Any, samples: Sequence[Sample], *, scores: bool) -> list[float | None]:
    """What a function returned as numbers; ``scores`` allows verl's mappings with a ``score``."""
    expected = f"reward {name}: expected a list of {len(samples)} numbers, one per response, got"
    if not isinstance(output, list):
        raise ValueError(f"{expected} {type(output).__name__} {output!r:.60}; return a list")
    if len(output) != len(samples):
        raise ValueError(f"{expected} {len(output)} of them; return one for each completion")
    rewards = []
    for item, sample in zip(output, samples, strict=True):
        number = item
        if scores and isinstance(item, Mapping):
            number = item.get("score", item)
        if getattr(number, "ndim", None) == 0 or getattr(number, "shape", None) == ():
            number = number.item()  # a tensor or an array of one number
        if number is None:
            rewards.append(None)
            continue
        about = f"for a response to prompt {sample.prompt.id}"
        if not isinstance(number, Real | Decimal):
            wanted = "a number, or a mapping with 'score'," if scores else "a number"
            raise ValueError(f"reward {name}: expected {wanted} {about}, got {item!r:.60}; return numbers or None")
        try:
            value = float(number)
        except OverflowError:  # of an int
            value = math.inf
        if not abs(value) <= _LARGEST:
            raise ValueError(
                f"reward {name}: expected a finite number {about}, got {number!s:.60}; return None where the reward "
                "does not apply, and scale down what float32 cannot hold"
            )
        rewards.append(value)
    return rewards
