"""Tasks of reasoning-gym: the prompts that it generates, and its own verifiers as the reward.

Nothing else in the package knows of it. :func:`task_records` gives what the function of ``prompts.callable`` gives, and
:func:`verified` is a reward like any other: together, an example of a task of one's own.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from entropy_probe.sampling.final_number import final_number
from entropy_probe.sampling.foreign import call

if TYPE_CHECKING:
    from entropy_probe.sampling.prompts import Prompt

TASK = "reasoning_gym"
"""The field of a record with the name and the settings of its task."""
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")


def task_records(task: str, size: int, seed: int, config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The problems of a task: fields ``question``, ``answer`` and ``metadata``, and what verifies them.

    The same seed gives the same problems. Each record comes after a description of where it is.

    Raises:
        ValueError: if the package is missing, there is no such task, or it does not take these settings.
    """
    settings = {**config, "size": size, "seed": seed}
    problems = _dataset(task, json.dumps(settings, sort_keys=True))
    for number in range(size):
        where = f"prompts.reasoning_gym {task}, problem {number}"
        yield where, {**call(where, problems.__getitem__, number), TASK: {"task": task, "settings": settings}}


def verified(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
    """The score, from 0 to 1, that a problem's own verifier gives the answer in a response.

    The answer is what stands in the last ``<answer>`` and ``</answer>``. In a response without these it is the final
    number (see :func:`~entropy_probe.sampling.final_number.final_number`) where the reference answer is a number, else
    the whole response.

    Raises:
        ValueError: if a prompt is not of reasoning-gym, or its verifier raises an error.
    """
    scores = []
    for prompt, response in zip(prompts, responses, strict=True):
        columns = prompt.columns
        if not isinstance(columns.get(TASK), Mapping):
            raise ValueError(
                f"reward reasoning_gym: expected prompts of reasoning-gym, whose verifiers it calls, got prompt "
                f"{prompt.id} without; set prompts.reasoning_gym to the task, or choose another reward"
            )
        task = columns[TASK]
        problems = _dataset(task["task"], json.dumps(task["settings"], sort_keys=True))
        where = f"reward reasoning_gym, prompt {prompt.id}"
        scores.append(float(call(where, problems.score_answer, _answer(response, str(prompt.answer)), dict(columns))))
    return scores


def _answer(response: str, reference: str) -> str | None:
    tagged = _TAGGED.findall(response)
    if tagged:
        return tagged[-1].strip()
    if not _NUMBER.fullmatch(reference):
        return response.strip()
    number = final_number(response)
    return None if number is None else f"{number:f}"


@lru_cache
def _dataset(task: str, settings: str) -> Any:
    """A task's problems, with their verifier; ``settings`` in JSON."""
    try:
        gym: Any = import_module("reasoning_gym")
    except ModuleNotFoundError as error:
        raise ValueError(
            "prompts.reasoning_gym: expected the package reasoning-gym, which is not installed; "
            "pip install 'entropy-probe[real]'"
        ) from error
    tasks = gym.factory.DATASETS
    if task not in tasks:
        near = difflib.get_close_matches(task, tasks, n=3) or sorted(tasks)
        raise ValueError(
            f"prompts.reasoning_gym: expected a task of reasoning-gym, got {task!r}; did you mean {', '.join(near)}?"
        )
    return call(f"prompts.reasoning_gym {task}", gym.create_dataset, task, **json.loads(settings))
