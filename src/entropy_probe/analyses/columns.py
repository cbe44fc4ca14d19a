"""What the columns of a batch say against each other: masks, ends, log-probabilities, advantages and rewards."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from entropy_probe.results.note import Note, NoteKind
from entropy_probe.rollouts.batch import LOGPROBS, Rollouts

AFTER_END = NoteKind(
    "after_end",
    "{batch}: {tokens} response tokens of {affected} of {sequences} sequences follow an end token ({ids}) directly: "
    "the policy did not sample them, but they count in every number",
    "Let response_mask end with the end token: padding and the next turn's template are not the policy's.",
)
NO_END = NoteKind(
    "no_end",
    "{batch}: no response has an end token ({ids}), though {short} of {responses} are shorter than the longest "
    "possible ({limit} tokens): entropy and gradients are of text that is cut off before its end",
    "Keep the end token that the policy sampled, in the ids and in the mask. Where stop texts end the responses "
    "instead, set generation.stop to them.",
)


IMPOSSIBLE = NoteKind(
    "impossible_logprobs",
    "{batch}: {name} are {bound} at {tokens} response tokens ({worst:.4g} at the most), as no log-probability of a "
    "sampled token is: they are something else, or of other tokens",
    "Record natural logarithms of the probabilities that the tokens were drawn with; look for a mask or column that is "
    "shifted, a sign, or a number that stands for none.",
)
MOST_LOGPROB, LEAST_LOGPROB = 0.01, -80.0
"""What rounding leaves of 0; and what no token that a policy sampled has, however large its vocabulary."""
CUT_OFF = NoteKind(
    "cut_off",
    "{batch}: {cut} of {responses} responses end without an end token ({ids}) below the largest length ({limit} "
    "tokens): cut off by another largest length, or by a mask that ends too early, so entropy is that of beginnings",
    "Sample with the trainer's largest length, and keep the end token. Where stop texts end the responses instead, set "
    "generation.stop to them.",
)
LATE_MASK = NoteKind(
    "late_mask",
    "{batch}: {ids} prompt ids have sequences whose prompts differ in their last token and nowhere else, as where "
    "response_mask starts a token late",
    "Set response_mask from the first token that the policy sampled. Right only if the prompts do differ there.",
)
LOGPROBS_BEFORE = NoteKind(
    "logprobs_before_mask",
    "{batch}: in {rows} of {sequences} sequences log-probabilities begin one token before response_mask does: the mask "
    "starts a token late, or they are a token early",
    "Set response_mask from the first token that the policy sampled, and its log-probability at the same place.",
)
AGAINST_REWARDS = NoteKind(
    "advantages_against_rewards",
    "{batch}: among the responses to one prompt, advantages do not rise with rewards (correlation {correlation:+.2f} "
    "over {sequences} sequences): they are of other sequences or of another step, or have the opposite sign",
    "Look for a column whose rows were shuffled or shifted and the others not. Right only if the trainer's advantages "
    "are of something else than these rewards.",
)
MOST_CUT = 0.05
"""A share of responses cut off for reasons of their own, such as a context that is full."""
LEAST_CORRELATION, LEAST_SEQUENCES = 0.3, 8
"""Penalties and several rewards leave more of a correlation; and too few sequences have any."""


def about_columns(batch: Rollouts, name: str, prompts: Sequence[bytes | None] | None) -> Iterator[Note]:
    """What does not go together in a batch; ``prompts`` are the tokens before each response, if ids are of them."""
    yield from _about_logprobs(batch, name)
    if rows := _logprobs_before(batch):
        yield LOGPROBS_BEFORE(batch=name, rows=rows, sequences=len(batch))
    if prompts is not None and batch.trajectory_ids is None and (late := _late_starts(batch, prompts)):
        yield LATE_MASK(batch=name, ids=late)
    if name == "update" and prompts is not None and batch.rewards is not None and batch.advantages is not None:
        yield from _about_advantages(batch, name)


def _logprobs_before(batch: Rollouts) -> int:
    """How many sequences have a log-probability at the last token of the prompt, where no other token of it has one."""
    rows, first = torch.arange(len(batch)), batch.response_mask.int().argmax(1)
    prompt = batch.attention_mask & (batch.response_mask.cumsum(1) == 0) & batch.response_mask.any(1)[:, None]
    for values in (x for column in LOGPROBS if (x := getattr(batch, column)) is not None):
        there = prompt & torch.isfinite(values) & (values != 0)
        last = there[rows, first - 1] & (prompt.sum(1) > 1)
        if int(there.sum()) == int(last.sum()) > len(batch) // 2:
            return int(last.sum())
    return 0


def _late_starts(batch: Rollouts, prompts: Sequence[bytes | None]) -> int:
    """How many ids have prompts that are equal but for their last token, if that is no exception.

    A policy may begin all of its responses to a prompt with one token.
    """
    by_id, size = defaultdict(list), batch.input_ids.element_size()
    for one, prompt in zip(batch.prompt_ids.tolist(), prompts, strict=True):
        if prompt is not None:
            by_id[one].append(prompt)
    several = [own for own in by_id.values() if len(own) > 1]
    late = sum(
        len(set(own)) > 1 and {len(prompt) > size and prompt[:-size] for prompt in own} == {own[0][:-size]}
        for own in several
    )
    return late if 10 * late > len(several) else 0


def _about_advantages(batch: Rollouts, name: str) -> Iterator[Note]:
    """The correlation of advantages with rewards within prompts, where each sequence has one advantage."""
    assert batch.rewards is not None
    spread, answered = batch.token_advantages, batch.response_mask.any(1)
    high = spread.masked_fill(~batch.response_mask, -torch.inf).amax(1)
    low = spread.masked_fill(~batch.response_mask, torch.inf).amin(1)
    if not torch.equal(high[answered], low[answered]):
        return
    rewards, advantages, ids = (x[answered] for x in (batch.rewards.double(), high.double(), batch.prompt_ids))
    index = ids.unique(return_inverse=True)[1]
    counts = torch.bincount(index).double()

    def centred(values: Tensor) -> Tensor:
        return values - (torch.zeros_like(counts).index_add_(0, index, values) / counts)[index]

    r, a = centred(rewards), centred(advantages)
    telling = int((r.abs() > 1e-9 * rewards.abs().max()).sum())
    sizes = r.norm() * a.norm()
    if telling < LEAST_SEQUENCES or not sizes > 0:
        return
    correlation = ((r * a).sum() / sizes).item()
    if correlation < LEAST_CORRELATION:
        yield AGAINST_REWARDS(batch=name, correlation=correlation, sequences=telling)


def _about_logprobs(batch: Rollouts, name: str) -> Iterator[Note]:
    """Numbers that are no log-probabilities; a reference's may be as low as they like, since it did not sample."""
    for column in LOGPROBS:
        values = getattr(batch, column)
        if values is None:
            continue
        own = values[batch.response_mask].double()
        off = {"above 0": own > MOST_LOGPROB, f"below {LEAST_LOGPROB:g}": own < LEAST_LOGPROB}
        for bound, at in list(off.items())[: 1 if column == "reference_logprobs" else 2]:
            if bool(at.any()):
                worst = own[at][own[at].abs().argmax()].item()
                yield IMPOSSIBLE(batch=name, name=column, bound=bound, tokens=int(at.sum()), worst=worst)


def after_end(batch: Rollouts, end_ids: Sequence[int]) -> Bool[Tensor, "N L"]:
    """Response tokens behind an end token of the same run of sampled tokens.

    Where a tool or the next turn comes in between (a gap in the mask), the policy was asked anew.
    """
    mask = batch.response_mask
    ends = mask & torch.isin(batch.input_ids, torch.tensor(end_ids, dtype=batch.input_ids.dtype))
    before = ends.cumsum(1) - ends.long()
    run_starts = mask & ~torch.nn.functional.pad(mask, (1, 0))[:, :-1]
    return mask & (before > torch.where(run_starts, before, 0).cummax(1).values)


def about_ends(batch: Rollouts, name: str, end_ids: Sequence[int], longest: int | None, stop_texts: bool) -> list[Note]:
    """Tokens behind an end, and responses without one; arguments as for ``admission.admit``."""
    notes: list[Note] = []
    if not end_ids:
        return notes
    shown, behind = ", ".join(map(str, end_ids)), after_end(batch, end_ids)
    if bool(behind.any()):
        tokens, affected = int(behind.sum()), int(behind.any(1).sum())
        notes.append(AFTER_END(batch=name, tokens=tokens, affected=affected, sequences=len(batch), ids=shown))
    lengths = batch.response_lengths[batch.response_mask.any(1)]
    limit = max(longest or 0, int(lengths.max()))
    short = int((lengths < limit).sum())
    ended = torch.isin(batch.input_ids, torch.tensor(end_ids, dtype=batch.input_ids.dtype)) & batch.response_mask
    if short and not (stop_texts or bool(ended.any())):
        notes.append(NO_END(batch=name, ids=shown, short=short, responses=len(lengths), limit=limit))
    elif not stop_texts:
        cut = int(_cut_off(batch, ended, limit).sum())
        if cut > MOST_CUT * len(lengths):
            notes.append(CUT_OFF(batch=name, cut=cut, responses=len(lengths), ids=shown, limit=limit))
    return notes


def _cut_off(batch: Rollouts, ended: Bool[Tensor, "N L"], limit: int) -> Bool[Tensor, " N"]:
    """Which responses end below a limit with another token than one that ends them, but for those of full contexts."""
    mask, rows = batch.response_mask, torch.arange(len(batch))
    last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
    total, lengths = batch.attention_mask.sum(1), batch.response_lengths
    full = (total == total.max()) & (lengths < lengths.max())
    return mask.any(1) & ~ended[rows, last] & (lengths < limit) & ~full
