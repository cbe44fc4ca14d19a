"""Stop texts: a response ends with the token that completes the first of them.

Whether a response ends after its ``k``-th token depends on these ``k`` tokens alone, so it is part of what a complete
response is, as the end-of-sequence token is, and not of the policy: the tokens up to there have the full softmax as
their distribution, with which entropies and log-probabilities are taken, and nothing is left out or reweighted.
Sampling on and cutting gives the same distribution as stopping would, with any engine, for the cost of the tokens
that are cut.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any


def cut_at_stop(token_ids: Sequence[int], stop: Sequence[str], tokenizer: Any) -> int | None:
    """Tokens up to the one that completes a stop text, that one included; None if none is completed.

    Special tokens count with their text, so that a stop text may be one of them.
    """

    def is_complete(length: int) -> bool:
        text = tokenizer.decode(list(token_ids[:length]), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return any(s in text for s in stop)

    if not is_complete(len(token_ids)):
        return None
    # more tokens never take a stop text away, so the first length with one is found by bisection
    return bisect_left(range(len(token_ids)), True, key=is_complete)
