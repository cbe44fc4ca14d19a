"""The update batch's responses as JSON for the page's script."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from functools import partial
from typing import Any

import numpy as np
from markupsafe import Markup

from entropy_probe.report.tables import Tables
from entropy_probe.report.text import visible_parts

MAX_TOKENS = 300_000
"""Tokens that a page holds: about 10 MB of JSON. Of a larger batch it shows the responses that contribute most."""
DIGITS = 4
STRONGEST = 0.99
_ROLE = re.compile(r"(?:system|developer|user|assistant|model|tool|function|ipython|environment)(?=\n|$)")
"""What follows a special token at the head of a turn."""


def responses_payload(tables: Tables, unit: str) -> dict[str, Any]:
    """Everything that the page shows of the responses.

    Returns:
        ``texts``: each distinct token as :func:`visible_parts` (a plain string where that is all); ``special``: rows
        of those that are special; ``prompts``: ``id`` of each, ``name`` (the last user message) and ``text``, in pieces
        of a kind (see :func:`turns`) and :func:`visible_parts`; ``responses``: ``id``, ``prompt`` (its row in
        ``prompts``), ``advantage`` (the mean where it differs by token), sums, and per token ``t`` (row of ``texts``),
        ``c`` contribution, ``v`` covariance, ``l`` log-probability, ``h`` entropy and, where it differs by token, ``a``
        advantage; ``scale``: the contribution and the covariance that get the strongest colour, the 99th percentile of
        their absolute values;
        ``total``: responses in the batch.

    Raises:
        ValueError: if a response's tokens are not consecutive rows, or a number is not finite.
    """
    tokens = tables.tokens
    starts = np.flatnonzero(np.diff(tokens["response_id"], prepend=-1))
    if len(starts) != len(np.unique(tokens["response_id"])):
        raise ValueError("tokens.parquet: expected each response in consecutive rows; run again with attribution: true")
    ends = np.append(starts[1:], len(tokens["response_id"]))
    sums = {name: np.add.reduceat(tokens[name], starts) for name in ("contribution", "covariance")}
    rows = {prompt: row for row, prompt in enumerate(tables.prompts["prompt_id"].tolist())}
    texts = {text: row for row, text in enumerate(dict.fromkeys(tokens["text"]))}

    cut = partial(turns, markup=tables.markup)
    responses = []
    for k in _shown(sums["contribution"], ends - starts):
        part = slice(int(starts[k]), int(ends[k]))
        advantages = tokens["advantage"][part]
        one = {
            "id": int(tokens["response_id"][part.start]),
            "prompt": rows[int(tokens["prompt_id"][part.start])],
            "advantage": _short(advantages.mean()),
            "contribution": _short(sums["contribution"][k]),
            "covariance": _short(sums["covariance"][k]),
            "t": [texts[text] for text in tokens["text"][part]],
        }
        for key, name in (("c", "contribution"), ("v", "covariance"), ("l", "logprob"), ("h", "entropy")):
            one[key] = [_short(x) for x in tokens[name][part]]
        if np.any(advantages != advantages[0]):
            one["a"] = [_short(x) for x in advantages]
        responses.append(one)
    return {
        "unit": unit,
        "total": len(starts),
        "texts": [parts[0] if len(parts := visible_parts(text)) == 1 else parts for text in texts],
        "special": [row for text, row in texts.items() if text.strip() in tables.markup],
        "prompts": [
            {
                "id": int(prompt),
                "name": None if name is None else visible_parts(name),
                "text": None if text is None else [(kind, visible_parts(piece)) for kind, piece in cut(text)],
            }
            for prompt, name, text in zip(
                tables.prompts["prompt_id"], tables.prompts["name"], tables.prompts["prompt"], strict=True
            )
        ],
        "responses": responses,
        "scale": {name: _strongest(tokens[name]) for name in ("contribution", "covariance")},
    }


def turns(text: str, markup: Collection[str]) -> list[tuple[str, str]]:
    """A rendered conversation in pieces: special tokens (``special``), who speaks (``role``), and ``text``."""
    if not markup:
        return [("text", text)]
    longest_first = sorted(markup, key=len, reverse=True)
    pieces = []
    for k, piece in enumerate(re.split(f"({'|'.join(map(re.escape, longest_first))})", text)):
        role = _ROLE.match(piece) if k and k % 2 == 0 else None
        if k % 2:
            pieces.append(("special", piece))
        elif role:
            pieces += [("role", role[0]), ("text", piece[role.end() :])]
        else:
            pieces.append(("text", piece))
    return [(kind, piece) for kind, piece in pieces if piece]


def script_json(value: Any) -> Markup:
    """JSON that a ``<script>`` element can hold: nothing in it ends the element or the line.

    Raises:
        ValueError: if a number is not finite.
    """
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))  # beyond ASCII all is escaped, U+2028 too
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _shown(contributions: np.ndarray, lengths: np.ndarray) -> list[int]:
    """The responses that fit on the page, those that contribute most first chosen, in batch order."""
    order = np.argsort(-np.abs(contributions), kind="stable")
    fits = np.cumsum(lengths[order]) <= MAX_TOKENS
    return np.sort(order[fits]).tolist()


def _strongest(values: np.ndarray) -> float:
    sizes = np.abs(values[values != 0])
    return _short(np.quantile(sizes, STRONGEST)) if len(sizes) else 0.0


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
