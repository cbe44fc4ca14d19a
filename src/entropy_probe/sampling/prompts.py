"""Prompts from a JSONL file, from a Hugging Face dataset, or from a Python function."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypedDict

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["Message", "Prompt", "PromptSource", "import_function", "load_prompts"]


class Message(TypedDict):
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True)
class Prompt:
    """A question put to the policy.

    Attributes:
        id: distinguishes the prompts of one source; :func:`load_prompts` counts from 0.
        prompt: text, tokenized as it stands (with the tokenizer's default special tokens), or the messages of
            a chat, to which the tokenizer's chat template and generation prompt are applied.
        answer: the reference answer in the reward's own format; None if there is none.
    """

    id: int
    prompt: str | tuple[Message, ...]
    answer: str | None = None


@dataclass(frozen=True)
class _KnownDataset:
    hub_id: str
    config: str
    split: str
    prompt_field: str
    answer_field: str


_MATH = _KnownDataset("DigitalLearningGmbH/MATH-lighteval", "default", "train", "problem", "solution")
_KNOWN_DATASETS = {
    "gsm8k": _KnownDataset("openai/gsm8k", "main", "train", "question", "answer"),
    "math": _MATH,
    "MATH": _MATH,
}


class PromptSource(BaseModel):
    """Where prompts come from: exactly one of ``jsonl``, ``dataset`` and ``callable``.

    Attributes:
        jsonl: a file with one JSON object per line.
        dataset: ``gsm8k`` or ``MATH``, the name of another Hugging Face dataset, or a local dataset
            directory.
        callable: ``package.module:function``; called without arguments, gives an iterable of mappings.
        prompt_field: the field with the text or the list of messages; ``prompt`` by default, known for gsm8k
            and MATH, required for other datasets.
        answer_field: the field with the reference answer. When not given: known for gsm8k and MATH, else the
            field ``answer`` of the records that have one.
        config: the configuration (subset) of a dataset that has several.
        split: the split of a dataset; known for gsm8k and MATH (``train``), required for others.
        limit: read only this many prompts, the first ones.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    jsonl: Path | None = None
    dataset: str | None = None
    callable: str | None = None
    prompt_field: str | None = None
    answer_field: str | None = None
    config: str | None = None
    split: str | None = None
    limit: int | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _check(self) -> PromptSource:
        given = [name for name in ("jsonl", "dataset", "callable") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"expected exactly one of jsonl, dataset, callable, got {' and '.join(given) or 'none'}")
        if self.dataset is None and (self.config or self.split):
            raise ValueError(f"config and split: expected only with dataset, got them with {given[0]}")
        if self.dataset is not None and self.dataset not in _KNOWN_DATASETS:
            missing = [name for name in ("prompt_field", "split") if getattr(self, name) is None]
            if missing:
                raise ValueError(
                    f"dataset {self.dataset!r}: expected {' and '.join(missing)}, which are known only for "
                    f"{', '.join(_KNOWN_DATASETS)}; set them"
                )
        return self


def load_prompts(source: PromptSource) -> list[Prompt]:
    """Read the prompts of a source, numbered from 0 in its order.

    Raises:
        ValueError: if the source is missing, empty, or a record has no usable prompt; says which record.
    """
    if source.jsonl is not None:
        records, what = _jsonl_records(source.jsonl), str(source.jsonl)
    elif source.dataset is not None:
        records, what = _dataset_records(source), f"dataset {source.dataset}"
    else:
        records, what = _callable_records(str(source.callable)), f"callable {source.callable}"
    known = _KNOWN_DATASETS.get(source.dataset or "")
    prompt_field = source.prompt_field or (known.prompt_field if known else "prompt")
    answer_field = source.answer_field or (known.answer_field if known else None)
    prompts = [
        _to_prompt(number, record, where, prompt_field, answer_field)
        for number, (where, record) in enumerate(islice(records, source.limit))
    ]
    if not prompts:
        raise ValueError(f"{what}: expected at least one prompt, got none; check the source")
    return prompts


def import_function(path: str, what: str) -> Callable[..., Any]:
    """The function named by ``package.module:function``.

    Args:
        path: where the function is.
        what: which setting names it, for error messages.

    Raises:
        ValueError: if the path is malformed, or the module or the function does not exist.
    """
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise ValueError(f"{what}: expected package.module:function, got {path!r}")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{what}: cannot import {path!r} ({error}); install it or set PYTHONPATH") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{what}: expected a function {name!r} in module {module_name}, got {function!r}")
    return function


def _jsonl_records(path: Path) -> Iterator[tuple[str, Any]]:
    if not path.is_file():
        raise ValueError(f"{path}: expected a JSONL file of prompts, found no such file; check the path")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                yield where, json.loads(line.decode("utf-8"))
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise ValueError(f"{where}: expected one JSON object per line, got invalid JSON ({error})") from error


def _dataset_records(source: PromptSource) -> Iterator[tuple[str, Any]]:
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
    except ModuleNotFoundError as error:
        raise ValueError(
            f"dataset {source.dataset}: expected the datasets library; pip install 'entropy-probe[datasets]'"
        ) from error

    name = str(source.dataset)
    known = _KNOWN_DATASETS.get(name)
    hub_id = known.hub_id if known else name
    config = source.config or (known.config if known else None)
    split = source.split or (known.split if known else None)
    try:
        dataset: Iterable[Any] = load_dataset(hub_id, config, split=split, trust_remote_code=False)
    except (DatasetsError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"dataset {name}: cannot load {hub_id} (config {config}, split {split}): {reason}") from error
    for number, record in enumerate(dataset):
        yield f"dataset {name}, record {number}", record


def _callable_records(path: str) -> Iterator[tuple[str, Any]]:
    records = import_function(path, "prompts.callable")()
    if not isinstance(records, Iterable) or isinstance(records, str | Mapping):
        raise ValueError(f"callable {path}: expected an iterable of mappings, got {type(records).__name__}")
    for number, record in enumerate(records):
        yield f"callable {path}, record {number}", record


def _to_prompt(number: int, record: Any, where: str, prompt_field: str, answer_field: str | None) -> Prompt:
    if not isinstance(record, Mapping):
        raise ValueError(f"{where}: expected an object with field {prompt_field!r}, got {type(record).__name__}")
    for field in (prompt_field, answer_field):
        if field is not None and record.get(field) is None:
            got = ", ".join(map(str, record)) or "none"
            raise ValueError(f"{where}: expected field {field!r}, got fields {got}; set prompt_field or answer_field")
    answer = record.get(answer_field or "answer")
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    if not isinstance(answer, str | None):
        raise ValueError(f"{where}: expected the answer as text or a number, got {type(answer).__name__}")
    return Prompt(number, _text_or_messages(record[prompt_field], where), answer)


def _text_or_messages(value: Any, where: str) -> str | tuple[Message, ...]:
    if isinstance(value, str):
        if not value:
            raise ValueError(f"{where}: expected a prompt, got empty text")
        return value
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"{where}: expected text or a list of messages, got {type(value).__name__} {value!r}")
    for message in value:
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise ValueError(f"{where}: expected messages with text fields 'role' and 'content', got {message!r}")
    return tuple(Message(role=message["role"], content=message["content"]) for message in value)
