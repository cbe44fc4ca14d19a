"""Token ids of prompts: text as it stands, or the messages of a chat through the tokenizer's template."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from typing import Any

from entropy_probe.results.note import Note, NoteKind
from entropy_probe.sampling.foreign import call
from entropy_probe.sampling.prompts import Prompt

_PRINTED = ("'type': 'text'", '"type": "text"')
"""What a list of text parts looks like when a template prints it as it stands."""

SECOND_BOS = NoteKind(
    "second_bos",
    "{rendered} of {prompts} prompts are text that begins with the BOS token {bos}, so the tokenizer's second one was "
    "left out",
    "TRL adds the second one: set prompts.add_special_tokens to true for prompts that it tokenized as text.",
)
ANSWERED = NoteKind(
    "prompts_end_with_assistant",
    "{answered} of {prompts} prompts end with an assistant's turn, which is kept as it is and followed by a new one",
    "If that turn is the reference answer, take it out of the prompt. Where the trainer lets the policy continue it "
    "(continue_final_message), give the rendered prompt as text.",
)
WHOLE_TEXT = NoteKind(
    "rewards_get_whole_text",
    "the tokenizer can take responses apart (thoughts, tool calls), as TRL does before a reward; here rewards get the "
    "whole text as content",
    "Make sure that the reward finds what it looks for in the whole text, thoughts included.",
)


def encode_prompts(tokenizer: Any, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Token ids of each prompt, without padding.

    Text is tokenized with the tokenizer's default special tokens, as TRL does, unless the prompt says otherwise; text
    that begins with the BOS token, as text that was rendered from a template does, gets no second one. Messages go
    through the chat template with the generation prompt added, and no special tokens but the template's own.

    Raises:
        ValueError: if a prompt has messages and the tokenizer no chat template, the template refuses the messages or
            does not use something that it is given, or a prompt has no tokens.
    """
    encoded: dict[int, list[int]] = {}  # a prompt is repeated for each of its responses
    for prompt in prompts:
        if id(prompt) not in encoded:
            encoded[id(prompt)] = _encode(tokenizer, prompt)
    return [list(encoded[id(prompt)]) for prompt in prompts]


def last_user_message(prompt: Prompt) -> str | None:
    """What the user says last in a conversation; None for a prompt of text, and without a user."""
    turns = () if isinstance(prompt.prompt, str) else prompt.prompt
    said = next((turn for turn in reversed(turns) if turn.get("role") == "user"), None)
    return None if said is None else "".join(_texts(dict(said))).strip() or None


def prompt_notes(tokenizer: Any, prompts: Sequence[Prompt]) -> tuple[Note, ...]:
    """Everything about the tokens of prompts that a careful reader should know."""
    notes: list[Note] = []
    rendered = sum(prompt.add_special_tokens is None and _has_bos(tokenizer, prompt.prompt) for prompt in prompts)
    if rendered:
        notes.append(SECOND_BOS(rendered=rendered, prompts=len(prompts), bos=str(tokenizer.bos_token)))
    answered = sum(not isinstance(p.prompt, str) and p.prompt[-1].get("role") == "assistant" for p in prompts)
    if answered:
        notes.append(ANSWERED(answered=answered, prompts=len(prompts)))
    parses = any(getattr(tokenizer, name, None) is not None for name in ("response_template", "response_schema"))
    if parses and not all(isinstance(prompt.prompt, str) for prompt in prompts):
        notes.append(WHOLE_TEXT())
    return tuple(notes)


def _encode(tokenizer: Any, prompt: Prompt) -> list[int]:
    if isinstance(prompt.prompt, str):
        add = prompt.add_special_tokens
        default = not _has_bos(tokenizer, prompt.prompt)
        what = f"prompt {prompt.id}: the tokenizer"  # may raise anything: tokenizers' own errors are of no class
        add = default if add is None else add
        token_ids = call(what, tokenizer, prompt.prompt, add_special_tokens=add)["input_ids"]
    else:
        token_ids = _render(tokenizer, prompt)
    if not token_ids:
        raise ValueError(f"prompt {prompt.id}: expected at least one token, got none from {prompt.prompt!r}; drop it")
    return list(token_ids)


def _has_bos(tokenizer: Any, prompt: Any) -> bool:
    """Whether a prompt is text that begins with the BOS token, and would be given another one."""
    bos = tokenizer.bos_token
    if bos is None or not isinstance(prompt, str) or not prompt.startswith(bos):
        return False
    return tokenizer(prompt)["input_ids"][:2] == [tokenizer.bos_token_id] * 2


def _render(tokenizer: Any, prompt: Prompt) -> list[int]:
    if tokenizer.chat_template is None:
        raise ValueError(
            f"prompt {prompt.id}: expected a tokenizer with a chat template for a prompt of messages, got "
            "none; set tokenizer.chat_template or give the prompt as text"
        )
    _check_used(tokenizer, prompt)
    problems = []
    for messages in _forms(prompt):
        try:
            text = _apply(tokenizer, prompt, messages, tokenize=False)
        except ValueError as error:
            problems.append(error)
            continue
        if _shows(text, messages):
            return _apply(tokenizer, prompt, messages, tokenize=True, return_dict=True)["input_ids"]
    if problems:
        raise problems[0]
    raise ValueError(
        f"prompt {prompt.id}: expected a chat template that shows the last user message, got one that leaves it out "
        "both as text and as a list of parts; change the message or the template"
    )


def _forms(prompt: Prompt) -> list[list[dict[str, Any]]]:
    """The messages as they stand, with all content as text, and with all text as a list of parts.

    Templates read one of the last two or both, and what they do not read they print as it stands or leave out.
    """
    messages: list[dict[str, Any]] = [dict(message) for message in prompt.prompt]  # type: ignore[arg-type]
    as_text = [m | {"content": "".join(_texts(m))} if isinstance(m.get("content"), list) else m for m in messages]
    as_parts = [
        m | {"content": [{"type": "text", "text": m["content"]}]} if isinstance(m.get("content"), str) else m
        for m in messages
    ]
    return [messages, as_text, as_parts]


def _texts(message: dict[str, Any]) -> list[str]:
    content = message.get("content")
    return [part["text"] for part in content] if isinstance(content, list) else [content or ""]


def _shows(rendered: str, messages: list[dict[str, Any]]) -> bool:
    """Whether the last user message is in a rendered text, white space aside, and not as a printed list."""
    last = next((message for message in reversed(messages) if message.get("role") == "user"), messages[-1])
    if any(mark in rendered and not any(mark in text for text in _texts(last)) for mark in _PRINTED):
        return False
    squeezed = "".join(rendered.split())
    return all("".join(text.split()) in squeezed for text in _texts(last))


def _apply(tokenizer: Any, prompt: Prompt, messages: list[dict[str, Any]], **how: Any) -> Any:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            messages, tools=list(prompt.tools) or None, add_generation_prompt=True, **how, **prompt.chat_template_kwargs
        )
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise ValueError(
            f"prompt {prompt.id}: expected messages that the tokenizer's chat template takes, got roles {roles} and "
            f"{type(error).__name__}: {error}; change the messages or the template"
        ) from error


def _check_used(tokenizer: Any, prompt: Prompt) -> None:
    """Refuse what the template would leave out of the prompt without a word."""
    arguments = prompt.chat_template_kwargs
    given = [*(["tools"] if prompt.tools else []), *arguments]
    if not given:
        return
    template = tokenizer.get_chat_template(arguments.get("chat_template"), list(prompt.tools) or None)
    known = inspect.signature(tokenizer.apply_chat_template).parameters
    for name in given:
        setting = "tools" if name == "tools" else "chat_template_kwargs"
        if re.search(rf"\b{re.escape(name)}\b", template) is None and (name == "tools" or name not in known):
            raise ValueError(
                f"prompt {prompt.id}: expected a chat template that uses {name}, got one that never names it, so that "
                f"it would change nothing; leave it out of prompts.{setting}, or set prompts.ignore to the records' "
                "field with it"
            )
