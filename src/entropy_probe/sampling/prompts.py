"""Prompts: what a record of a source asks the policy, and everything else that the record holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from numbers import Real
from pathlib import Path
from typing import Any, TypedDict, cast

from pydantic import Field, model_validator

from entropy_probe.results.record import Settings, file_errors
from entropy_probe.sampling.generated import task_records
from entropy_probe.sampling.records import callable_records, dataset_records, field_of, jsonl_records, parquet_records


class Message(TypedDict, total=False):
    """One turn of a chat, with ``role`` and further fields as the tokenizer's chat template reads them.

    ``content`` is text, a list of text parts ``{"type": "text", "text": ...}``, or None beside ``tool_calls``.
    """

    role: str
    content: Any
    tool_calls: Any
    name: str
    tool_call_id: str


@dataclass(frozen=True)
class Prompt:
    """A question put to the policy.

    Attributes:
        id: distinguishes the prompts of one source; :func:`load_prompts` counts from 0.
        prompt: text, tokenized as it stands, or the messages of a chat, to which the tokenizer's chat template and
            generation prompt are applied.
        answer: the reference answer: text (also for a number in the record), or whatever else the record has; None if
            there is none.
        columns: all fields of the record as they stand, for reward functions.
        tools: tools that the chat template is given, as JSON schemas.
        chat_template_kwargs: further arguments of the chat template.
        add_special_tokens: whether the tokenizer adds its special tokens to text. None: as by default, except that
            text that begins with the BOS token gets no second one.
    """

    id: int
    prompt: str | tuple[Message, ...]
    answer: Any = None
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False)
    tools: tuple[Any, ...] = ()
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    add_special_tokens: bool | None = None


@dataclass(frozen=True)
class _KnownDataset:
    hub_id: str
    config: str | None = None
    split: str | None = None
    prompt_field: str | None = None
    answer_field: str | None = None


_MATH = _KnownDataset("DigitalLearningGmbH/MATH-lighteval", "default", "train", "problem", "solution")
_KNOWN_DATASETS = {
    "gsm8k": _KnownDataset("openai/gsm8k", "main", "train", "question", "answer"),
    "math": _MATH,
    "MATH": _MATH,
}
_SOURCES = ("jsonl", "parquet", "dataset", "callable", "reasoning_gym")
_GROUND_TRUTH = "reward_model.ground_truth"

# Columns that change the prompt of some trainer. Those that cannot be used, or only when told so, are refused.
_NOT_TEXT = ("image", "images", "video", "videos", "audio", "audios", "multi_modal_data")
_SYSTEM = ("system", "system_prompt", "system_message")
# Arguments of a chat template that are not the user's to choose here.
_OWN_ARGUMENTS = frozenset(
    {"conversation", "tools", "add_generation_prompt", "continue_final_message", "tokenize", "return_dict"}
    | {"return_tensors", "padding", "truncation", "max_length", "tokenizer_kwargs", "return_assistant_tokens_mask"}
)


class PromptSource(Settings):
    """Where prompts come from: one of ``jsonl``, ``parquet``, ``dataset``, ``callable`` and ``reasoning_gym``.

    Attributes:
        jsonl: a file with one JSON object per line, or with one JSON array of objects.
        parquet: a Parquet file with one prompt per row.
        dataset: ``gsm8k`` or ``MATH``, the name of another Hugging Face dataset, or a local dataset
            directory.
        callable: ``package.module:function``; called without arguments, gives an iterable of mappings.
        reasoning_gym: a task of reasoning-gym, such as ``chain_sum``; its verifier is the reward ``reasoning_gym``.
        prompt_field: the field with the text or the list of messages; ``prompt`` by default, known for gsm8k, MATH
            and reasoning_gym, required for other datasets. A dotted name leads into fields of fields.
        answer_field: the field with the reference answer, dotted likewise. When not given: known for gsm8k and MATH,
            else ``reward_model.ground_truth`` (verl's layout) or ``answer`` of the records that have one.
        config: the configuration (subset) of a dataset that has several; settings of the reasoning_gym task.
        split: the split of a dataset; known for gsm8k and MATH (``train``), required for others.
        size: how many problems reasoning_gym generates, 500 by default.
        seed: of reasoning_gym's generator, 0 by default.
        limit: read only this many prompts, the first ones.
        chat: put prompts of text as the user's turn of a chat.
        system: a system message before every prompt; implies ``chat``.
        system_field: the field with the system message of each prompt; implies ``chat``.
        tools: tools for the chat template, as JSON schemas; a record's own ``tools`` take their place.
        chat_template_kwargs: further arguments of the chat template, such as ``enable_thinking``; a record's own
            ``chat_template_kwargs`` are added, and win.
        add_special_tokens: whether the tokenizer adds its special tokens to prompts of text; see :class:`Prompt`.
        ignore: fields of the records that look as if they changed the prompt, and did not in training.
    """

    jsonl: Path | None = None
    parquet: Path | None = None
    dataset: str | None = None
    callable: str | None = None
    reasoning_gym: str | None = None
    prompt_field: str | None = None
    answer_field: str | None = None
    config: str | dict[str, Any] | None = None
    split: str | None = None
    size: int | None = Field(None, gt=0)
    seed: int | None = Field(None, ge=0)
    limit: int | None = Field(None, gt=0)
    chat: bool = False
    system: str | None = Field(None, min_length=1)
    system_field: str | None = None
    tools: tuple[dict[str, Any], ...] = ()
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    add_special_tokens: bool | None = None
    ignore: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> PromptSource:
        given = [name for name in _SOURCES if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"expected exactly one of {', '.join(_SOURCES)}, got {' and '.join(given) or 'none'}")
        self._check_settings(given[0])
        if self.dataset is not None and self.dataset not in _KNOWN_DATASETS:
            missing = [name for name in ("prompt_field", "split") if getattr(self, name) is None]
            if missing:
                raise ValueError(
                    f"dataset {self.dataset!r}: expected {' and '.join(missing)}, which are known only for "
                    f"{', '.join(_KNOWN_DATASETS)}; set them"
                )
        if self.system is not None and self.system_field is not None:
            raise ValueError("expected one of system and system_field, got both; leave one out")
        _check_arguments(self.chat_template_kwargs, "chat_template_kwargs")
        return self

    def _check_settings(self, given: str) -> None:
        """Refuse what does nothing with the source that is given."""
        of = {"config": ("dataset", "reasoning_gym"), "split": ("dataset",)}
        of |= dict.fromkeys(("size", "seed"), ("reasoning_gym",))
        for name, sources in of.items():
            if getattr(self, name) is not None and given not in sources:
                raise ValueError(
                    f"{name}: expected only with {' or '.join(sources)}, got it with {given}; leave it out"
                )
        kind = {"dataset": str, "reasoning_gym": dict}.get(given, object)
        if self.config is not None and not isinstance(self.config, kind):
            form = "the name of a configuration" if kind is str else "a mapping of settings"
            raise ValueError(f"config: expected {form} with {given}, got {self.config!r:.60}; correct it")
        both = sorted({"size", "seed"}.intersection(self.config)) if isinstance(self.config, dict) else []
        if both:
            raise ValueError(f"config: expected {' and '.join(both)} beside config, got them in it; move them out")

    @property
    def file(self) -> tuple[str, Path] | None:
        """The setting that names a file, and the file."""
        return next(((name, path) for name in ("jsonl", "parquet") if (path := getattr(self, name)) is not None), None)


@file_errors()
def load_prompts(source: PromptSource) -> list[Prompt]:
    """Read the prompts of a source, numbered from 0 in its order.

    Raises:
        ValueError: if the source is missing, empty, or a record has no usable prompt; says which record.
    """
    known = _KNOWN_DATASETS.get(source.dataset or "", _KnownDataset(source.dataset or ""))
    if source.jsonl is not None:
        records, what = jsonl_records(source.jsonl), str(source.jsonl)
    elif source.parquet is not None:
        records, what = parquet_records(source.parquet), str(source.parquet)
    elif source.dataset is not None:
        what = f"dataset {source.dataset}"
        config = cast(str | None, source.config) or known.config
        records = dataset_records(source.dataset, known.hub_id, config, source.split or known.split)
    elif source.reasoning_gym is not None:
        what, config = f"reasoning_gym {source.reasoning_gym}", cast(dict[str, Any], source.config or {})
        records = task_records(source.reasoning_gym, source.size or 500, source.seed or 0, config)
    else:
        records, what = callable_records(str(source.callable)), f"callable {source.callable}"
    asked = "question" if source.reasoning_gym is not None else "prompt"
    fields = {
        "prompt_field": source.prompt_field or known.prompt_field or asked,
        "answer_field": source.answer_field or known.answer_field,
    }
    source = source.model_copy(update=fields)
    prompts = [
        _to_prompt(number, record, where, source)
        for number, (where, record) in enumerate(islice(records, source.limit))
    ]
    if not prompts:
        raise ValueError(f"{what}: expected at least one prompt, got none; check the source")
    unknown = [name for name in source.ignore if not any(name in prompt.columns for prompt in prompts)]
    if unknown:
        raise ValueError(f"prompts.ignore: expected fields of the records, got {', '.join(unknown)}; leave them out")
    return prompts


def _to_prompt(number: int, record: Any, where: str, source: PromptSource) -> Prompt:
    prompt_field = str(source.prompt_field)
    if not isinstance(record, Mapping):
        raise ValueError(f"{where}: expected an object with field {prompt_field!r}, got {type(record).__name__}")
    for name in (prompt_field, source.answer_field):
        if name is not None and field_of(record, name) is None:
            got = f"{', '.join(map(str, islice(record, 20))) or 'none':.200}"
            raise ValueError(
                f"{where}: expected field {name!r}, got "
                + ("null; drop the record" if name in record else f"fields {got}; set prompt_field or answer_field")
            )
    of_files = source.parquet is not None or source.dataset is not None
    read = {name: value for name, value in record.items() if name not in source.ignore and not _is_empty(value)}
    _refuse_unread(read, where, source)
    text = _text_or_messages(field_of(record, prompt_field), where, fill=of_files)
    tools, arguments = _template_settings(read, where, source, fill=of_files)
    prompt = _as_chat(text, read, where, source)
    if isinstance(prompt, str) and (tools or arguments):
        raise ValueError(
            f"{where}: expected messages, which tools and chat_template_kwargs are for, got text; set prompts.chat: "
            "true to put it as the user's turn, or prompts.ignore to the fields that training did not use"
        )
    columns = {str(name): value for name, value in record.items()}
    return Prompt(number, prompt, _answer(record, source), columns, tools, arguments, source.add_special_tokens)


def _answer(record: Mapping[str, Any], source: PromptSource) -> Any:
    names = (source.answer_field,) if source.answer_field else (_GROUND_TRUTH, "answer")
    answer = next((value for name in names if (value := field_of(record, name)) is not None), None)
    return str(answer) if isinstance(answer, Real) and not isinstance(answer, bool) else answer


def _is_empty(value: Any) -> bool:
    """Whether a column says nothing, as where another record of the file has a value."""
    return value is None or (isinstance(value, str | list | tuple | Mapping) and len(value) == 0)


def _refuse_unread(read: Mapping[Any, Any], where: str, source: PromptSource) -> None:
    for name in _NOT_TEXT:
        if name in read and name != source.prompt_field:
            raise ValueError(
                f"{where}: expected a prompt of text alone, got a field {name!r}; if training did not show it to the "
                f"policy, set prompts.ignore to [{name}], else give the batches as rollouts"
            )
    for name in _SYSTEM:
        if name in read and name not in (source.prompt_field, source.system_field):
            raise ValueError(
                f"{where}: got a field {name!r}, which changes the prompt if training put it before the rest; set "
                f"prompts.system_field to {name} if it did, prompts.ignore to [{name}] if not"
            )


def _as_chat(
    prompt: str | tuple[Message, ...], read: Mapping[Any, Any], where: str, source: PromptSource
) -> str | tuple[Message, ...]:
    """The prompt with its system message, text as the user's turn where a chat is asked for."""
    system = source.system
    if source.system_field is not None:
        system = field_of(read, source.system_field)
        if not isinstance(system, str | None):
            raise ValueError(
                f"{where}: expected text in field {source.system_field!r}, got {type(system).__name__}; correct the "
                "field or leave system_field out"
            )
    if isinstance(prompt, str):
        if not (source.chat or source.system or source.system_field):
            return prompt
        prompt = (Message(role="user", content=prompt),)
    if system is None:
        return prompt
    if any(message.get("role") == "system" for message in prompt):
        raise ValueError(
            f"{where}: expected a prompt without a system message, since prompts.system or prompts.system_field gives "
            "one, got both; leave the setting out"
        )
    return (Message(role="system", content=system), *prompt)


def _template_settings(
    read: Mapping[Any, Any], where: str, source: PromptSource, *, fill: bool
) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """The tools and further arguments for the chat template: the record's, then the config's."""
    remedy = "correct it, or set prompts.ignore if training did not use it"
    tools = _decoded(read.get("tools", source.tools))
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) or callable(tool) for tool in tools):
        raise ValueError(f"{where}: expected tools as a list of JSON schemas, got {tools!r:.60}; {remedy}")
    arguments = _decoded(read.get("chat_template_kwargs", {}))
    if not isinstance(arguments, Mapping):
        raise ValueError(f"{where}: expected chat_template_kwargs as a mapping, got {arguments!r:.60}; {remedy}")
    if fill:
        tools, arguments = _without_nulls(tools), _without_nulls(arguments)
    _check_arguments(arguments, f"{where}: chat_template_kwargs")
    return tuple(tools), {**source.chat_template_kwargs, **arguments}


def _decoded(value: Any) -> Any:
    """A value that may stand as JSON text, as it does in files whose columns have one type."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value  # refused by the caller, who knows what was expected


def _check_arguments(arguments: Mapping[str, Any], where: str) -> None:
    own = sorted(_OWN_ARGUMENTS.intersection(arguments))
    if own:
        raise ValueError(f"{where}: expected arguments of the chat template, got {', '.join(own)}; leave them out")


def _text_or_messages(value: Any, where: str, *, fill: bool) -> str | tuple[Message, ...]:
    if isinstance(value, str):
        if not value:
            raise ValueError(f"{where}: expected a prompt, got empty text; drop the record")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError(
                f"{where}: expected Unicode text, got half of a pair of surrogates; correct the record or drop it"
            )
        return value
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(
            f"{where}: expected text or a list of messages, got {type(value).__name__} {value!r:.60}; set prompt_field"
        )
    return tuple(_message(message, where, fill=fill) for message in value)


def _message(message: Any, where: str, *, fill: bool) -> Message:
    """A message without the fields that are null, which are those of other messages where a column has one type."""
    expected = "expected messages with text fields 'role' and 'content'"
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(f"{where}: {expected}, got {message!r:.80}; convert them")
    content, calls = message.get("content"), message.get("tool_calls")
    parts = list(content) if isinstance(content, list | tuple) else []
    if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in parts):
        raise ValueError(
            f"{where}: expected content as text or a list of text parts, got {content!r:.80}; images and other media "
            "cannot be shown to the policy here, give the batches as rollouts"
        )
    if not (isinstance(content, str) or parts or (content is None and calls)):
        raise ValueError(f"{where}: {expected} (content may be null beside tool_calls), got {message!r:.80}")
    kept: dict[str, Any] = {str(name): value for name, value in message.items() if value is not None}
    if fill:
        kept = _without_nulls(kept)
    if parts:
        kept["content"] = [{"type": "text", "text": part["text"]} for part in parts]
    return cast(Message, kept)


def _without_nulls(value: Any) -> Any:
    """Nested values without the nulls that Arrow fills in where mappings of one column have different keys."""
    if isinstance(value, Mapping):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list | tuple) else value
