"""What a chat template has made of a conversation: the last user message in a prompt's text, and the special tokens.

A batch holds token ids, so this is read off their text, with what the tokenizer's own template puts around a message.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

_FIRST, _ANSWER, _LAST = "Pangolin", "Quetzal", "Wombat"
"""Messages whose places in a rendered conversation are looked up: words that no template has, and none trims."""
_SHAPE = rf"(.*){_FIRST}(.*){_ANSWER}(.*){_LAST}(.*)"
_TOOL_RESULT = re.compile(r"\s*<tool_response>")
"""With what some templates begin the turns of tools, which they put as the user's."""


@dataclass(frozen=True)
class UserTurn:
    """What a chat template puts before and after what a user says.

    Attributes:
        opening: the text directly before every user message.
        closing: the text directly after it.
    """

    opening: str
    closing: str

    def last_message(self, prompt: str) -> str | None:
        """The last user message of a prompt, tools' results aside; None if it has none."""
        end = len(prompt)
        while (start := prompt.rfind(self.opening, 0, end)) >= 0:
            rest = prompt[start + len(self.opening) :]
            message = rest.partition(self.closing)[0] if self.closing else rest
            if message.strip() and not _TOOL_RESULT.match(message):
                return message.strip()
            end = start
        return None


def user_turn(tokenizer: Any) -> UserTurn | None:
    """How the tokenizer's chat template sets off user messages, found by rendering a conversation.

    None without a template, and for one that does not take the conversation or shows nothing before its messages.
    """
    if tokenizer is None or getattr(tokenizer, "chat_template", None) is None:
        return None
    shapes = (re.fullmatch(_SHAPE, _rendered(tokenizer, as_parts), re.DOTALL) for as_parts in (False, True))
    shape = next(filter(None, shapes), None)
    if shape is None:
        return None
    before_first, after_first, before_last, after_last = shape.groups()
    special = markup_tokens(tokenizer)
    opening = _shared_end(_units(before_first, special), _units(before_last, special))
    closing = _shared_end(*(_mirrored(_units(after, special)) for after in (after_first, after_last)))[::-1]
    # Of the closing what ends the message, not what begins the answer, which may be absent or other; of the opening
    # not the end of the turn before, which may be absent.
    end = next((token for token in special if closing.startswith(token)), closing)
    shorter = opening.removeprefix(end).lstrip() if end else opening
    opening = shorter if any(token in shorter for token in special) else opening
    return UserTurn(opening, end) if opening else None


def _rendered(tokenizer: Any, as_parts: bool) -> str:
    """The conversation as the policy is given it, or an empty text where the template refuses it."""
    from jinja2 import TemplateError

    conversation = [
        {"role": role, "content": [{"type": "text", "text": text}] if as_parts else text}
        for role, text in (("user", _FIRST), ("assistant", _ANSWER), ("user", _LAST))
    ]
    try:
        ids = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=True)["input_ids"]
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError):
        return ""
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def markup_tokens(tokenizer: Any) -> tuple[str, ...]:
    """The tokens that are no text of anybody: special ones, and added ones such as ``<tool_call>``; longest first."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    named = {str(token) for token in added if token.special or re.fullmatch(r"<.+>|\[.+\]", str(token))}
    named |= set(getattr(tokenizer, "all_special_tokens", ()))
    return tuple(sorted((text for text in named if text.strip()), key=lambda text: (-len(text), text)))


def _units(text: str, special: Sequence[str]) -> list[tuple[str, bool]]:
    """The text cut at its special tokens; each piece with whether it is one."""
    pieces = re.split(f"({'|'.join(map(re.escape, special))})", text) if special else [text]
    return [(piece, k % 2 == 1) for k, piece in enumerate(pieces) if piece]


def _mirrored(units: list[tuple[str, bool]]) -> list[tuple[str, bool]]:
    return [(piece[::-1], special) for piece, special in reversed(units)]


def _shared_end(one: list[tuple[str, bool]], other: list[tuple[str, bool]]) -> str:
    """The longest text that both end with, without a part of a special token at its beginning."""
    end = ""
    for (a, a_special), (b, b_special) in zip(reversed(one), reversed(other), strict=False):
        if a == b:
            end = a + end
            continue
        length = (
            0
            if a_special or b_special
            else sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a[::-1], b[::-1], strict=False)))
        )
        return a[len(a) - length :] + end
    return end
