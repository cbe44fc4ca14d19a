"""Texts of a dump as token ids again, only where they can be proven: what was tokenized has to give the text back.

Trainers decode without special tokens: the marks of a chat and the end token are gone. A prompt is tokenized as the
trainer does, through the chat template, and a response by itself, never the two joined.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from entropy_probe.dumps.layouts import Layout
from entropy_probe.dumps.samples import Sample
from entropy_probe.sampling import Message, Prompt, encode_prompts

MOST_FAILING = 0.01
"""Share of responses that may not give their text back."""
_USER, _SYSTEM = "What the user says.", "What the system says."


@dataclass(frozen=True)
class Encoded:
    """Samples with token ids."""

    prompts: list[tuple[int, ...]]  # of each
    responses: list[tuple[int, ...]]  # of each, end tokens restored
    failing: int  # responses that do not give their text back
    restored: int  # responses that were given their end token back


def encode_texts(tokenizer: Any, layout: Layout, samples: Sequence[Sample], longest: int | None) -> Encoded:
    """Token ids of prompts and responses; those that are ids already stay as they are.

    Only responses shorter than ``longest``, the trainer's limit on their tokens, had an end token.

    Raises:
        ValueError: if a prompt cannot be rebuilt, the limit is not known, or more than 1% of the responses do not give
            their text back.
    """
    prompts: dict[Any, tuple[int, ...]] = {}
    for sample in samples:
        if repr(sample.prompt) not in prompts:
            prompts[repr(sample.prompt)] = _prompt(tokenizer, layout, sample)
    responses, failing, restored = [], [], 0
    for sample in samples:
        if not isinstance(sample.response, str):
            responses.append(sample.response)
            continue
        ids = tuple(tokenizer(sample.response, add_special_tokens=False)["input_ids"])
        cut = sample.truncated
        if cut is None:
            if longest is None:
                raise ValueError(
                    f"{sample.where}: expected the trainer's limit on response tokens, since only shorter responses "
                    "had an end token, which the text has lost, got none; set probe.max_completion_length "
                    "(--max-completion-length)"
                )
            cut = len(ids) >= longest
        if _decoded(tokenizer, ids) != sample.response or (longest is not None and len(ids) > longest):
            failing.append(sample.where)
        restored += not cut
        if not cut and tokenizer.eos_token_id is None:
            raise ValueError(
                "tokenizer: expected an end token, which texts have lost, got none; set tokenizer.eos_token"
            )
        responses.append(ids if cut else (*ids, tokenizer.eos_token_id))
    if len(failing) > MOST_FAILING * len(samples):
        raise ValueError(
            f"{failing[0]}: expected responses that give their text back when they are tokenized again, got "
            f"{len(failing)} of {len(samples)} that do not (or are longer than the limit); another tokenizer was used, "
            "or texts were changed: record token ids in training"
        )
    return Encoded([prompts[repr(sample.prompt)] for sample in samples], responses, len(failing), restored)


def _decoded(tokenizer: Any, ids: Sequence[int], *, marked: bool = False) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=not marked, clean_up_tokenization_spaces=False)


def _prompt(tokenizer: Any, layout: Layout, sample: Sample) -> tuple[int, ...]:
    prompt = sample.prompt
    if not isinstance(prompt, str) and not (prompt and isinstance(prompt[0], dict)):
        return tuple(prompt)  # type: ignore[arg-type]
    if not isinstance(prompt, str):
        return _rendered(tokenizer, prompt)  # type: ignore[arg-type]
    special = [mark for mark in tokenizer.all_special_tokens if mark in prompt]
    if special or layout.rendered == "marked":
        (ids,) = encode_prompts(tokenizer, [Prompt(0, prompt, add_special_tokens=False)])
        if _decoded(tokenizer, ids, marked=True) == prompt:
            return tuple(ids)
        raise ValueError(_cannot(sample, "text with special tokens that does not give itself back"))
    chats = {ids for ids in _as_chat(tokenizer, prompt) if _decoded(tokenizer, ids) == prompt}
    if len(chats) == 1:
        return chats.pop()
    if chats or (layout.rendered == "plain" and tokenizer.chat_template is not None):
        raise ValueError(_cannot(sample, f"{len(chats)} conversations that the chat template makes it of"))
    (ids,) = encode_prompts(tokenizer, [Prompt(0, prompt)])
    if _decoded(tokenizer, ids) != prompt:
        raise ValueError(_cannot(sample, "text that does not give itself back"))
    return tuple(ids)


def _cannot(sample: Sample, got: str) -> str:
    return (
        f"{sample.where}: prompt: expected one that can be tokenized again without doubt, got {got} "
        f"({sample.prompt!r:.60}); record token ids in training"
    )


def _rendered(tokenizer: Any, messages: Sequence[Message]) -> tuple[int, ...]:
    (ids,) = encode_prompts(tokenizer, [Prompt(0, tuple(messages))])
    return tuple(ids)


def _as_chat(tokenizer: Any, text: str) -> Iterator[tuple[int, ...]]:
    """Token ids of conversations that a text may be without its special tokens: candidates, to be checked."""
    if tokenizer.chat_template is None:
        return
    for roles in (("user",), ("system", "user")):
        said = {"user": _USER, "system": _SYSTEM}
        messages: list[Message] = [{"role": role, "content": said[role]} for role in roles]
        try:
            skeleton = _decoded(tokenizer, _rendered(tokenizer, messages))
        except ValueError:  # a template without a system's turn
            continue
        between = _split(skeleton, [said[role] for role in roles])
        if between is None or not any(part.strip() for part in between):
            continue
        for contents in _contents(text, between):
            yield _rendered(tokenizer, [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)])


def _split(skeleton: str, marks: Sequence[str]) -> list[str] | None:
    """What is before, between and behind texts that occur once each, in their order."""
    parts = []
    for mark in marks:
        before, found, skeleton = skeleton.partition(mark)
        if not found or mark in skeleton:
            return None
        parts.append(before)
    return [*parts, skeleton]


def _contents(text: str, between: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """What may stand in the gaps, up to a few ways to cut it."""
    first, *middle, last = between
    if len(text) < len(first) + len(last) or not (text.startswith(first) and text.endswith(last)):
        return
    inner = text[len(first) : len(text) - len(last)]
    if not middle:
        yield (inner,)
        return
    (mark,) = middle
    starts = (i for i in range(len(inner)) if mark and inner.startswith(mark, i))
    yield from ((inner[:i], inner[i + len(mark) :]) for i in itertools.islice(starts, 8))
