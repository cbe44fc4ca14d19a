"""Token ids as a model takes them: sequences without their padding, one to a row or several around a shared prompt.

Rows are padded on the right, so results do not depend on the caller's padding side or order. In a shared row the
prompt's tokens stand once, followed by the tokens of each response; an attention mask keeps the responses apart and
position ids count as if each followed the prompt directly. Scores and gradients are those of each sequence on its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from entropy_probe.rollouts.batch import Rollouts

ROW_MULTIPLE = 16
"""Rows are padded to a multiple of this many tokens. Sums over tokens inside the model are then taken in the same order
however long the other rows are: on the CPU a sequence's scores then do not depend on what else is in its microbatch, to
the bit but where a product has a single row."""


@dataclass(frozen=True, eq=False)
class Microbatch:
    """Some sequences of a batch, packed into rows of one length.

    Attributes:
        rows: the sequences' indices in the caller's batch, ``[n]``, in the order of the flat tokens.
        input_ids: ``[m, l]``.
        attention_mask: true for real tokens, ``[m, l]``; or what may attend to what, additive, ``[m, 1, l, l]``.
        position_ids: ``[m, l]``; ``None`` where the model's default is right.
        source: flat index into ``[m * l]`` of the position that predicts each response token, ``[T]``.
        targets: the response tokens, sequence by sequence, ``[T]``.
        leaders: one sequence of each row, as its index in the caller's batch, ``[m]``.
        response_mask: the caller's response mask of ``rows``, ``[n, L]``, on the CPU.
    """

    rows: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor | None
    source: Tensor
    targets: Tensor
    leaders: Tensor
    response_mask: Tensor

    def gather(self, values: Tensor) -> Tensor:
        """Per-token values ``[N, L]`` of the caller's batch at these response tokens, flat ``[T]``."""
        return values[self.rows][self.response_mask].to(self.targets.device)

    def scatter(self, flat: Tensor, out: Tensor) -> None:
        """Write flat values ``[T]`` back to their places in ``out`` ``[N, L]``."""
        block = torch.zeros(self.response_mask.shape, dtype=out.dtype)
        block[self.response_mask] = flat.to("cpu", out.dtype)
        out[self.rows] = block


def padded(length: int) -> int:
    """The length of a row that is to hold so many tokens."""
    return -(-length // ROW_MULTIPLE) * ROW_MULTIPLE


def bounded_groups(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Group items of similar length so that each group padded to its longest holds at most ``max_tokens``.

    An item longer than the bound gets a group of its own.
    """
    groups: list[list[int]] = []
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= max_tokens:
            groups[-1].append(item)
        else:
            groups.append([item])
    return groups


def pack(rollouts: Rollouts, rows: Tensor, device: torch.device, context: int | None = None) -> Microbatch:
    """Pack sequences one to a row.

    Where it is known how many positions the model has (``context``), rows are padded to a multiple of 16 tokens, and no
    further than that.
    """
    attention = rollouts.attention_mask[rows]
    lengths = attention.sum(1)
    longest = int(lengths.max())
    column = torch.arange(max(longest, min(padded(longest), context or 0)))
    source = (attention.int().argmax(1)[:, None] + column).clamp(max=attention.shape[1] - 1)
    real = column < lengths[:, None]
    ids = torch.where(real, rollouts.input_ids[rows].gather(1, source), 0)
    response = rollouts.response_mask[rows].gather(1, source) & real
    return Microbatch(
        rows=rows,
        input_ids=ids.to(device),
        attention_mask=real.long().to(device),
        position_ids=None,
        # a response never starts a row, so the position before each of its tokens is in the same row
        source=(response.flatten().nonzero()[:, 0] - 1).to(device),
        targets=ids[response].to(device),
        leaders=rows,
        response_mask=rollouts.response_mask[rows],
    )


def shared_rows(rollouts: Rollouts, rows: Tensor) -> list[tuple[int, list[int]]]:
    """Sequences with the same prompt id and the same prompt tokens: the prompt's length, and their indices."""
    groups: dict[tuple[int, ...], list[int]] = {}
    starts = rollouts.attention_mask[rows].int().argmax(1).tolist()
    ends = rollouts.response_mask[rows].int().argmax(1).tolist()
    for row, start, end in zip(rows.tolist(), starts, ends, strict=True):
        key = (int(rollouts.prompt_ids[row]), *rollouts.input_ids[row, start:end].tolist())
        groups.setdefault(key, []).append(row)
    return [(len(key) - 1, members) for key, members in groups.items()]


def row_tokens(rollouts: Rollouts, group: Tensor) -> int:
    """Tokens of a row that sequences of one prompt share: the prompt once, and what of each response is a context."""
    lengths = rollouts.attention_mask[group].sum(1)
    prompt = int(rollouts.response_mask[group[0]].int().argmax() - rollouts.attention_mask[group[0]].int().argmax())
    return int(lengths.sum()) - (len(group) - 1) * prompt - len(group)


def shared_groups(
    rollouts: Rollouts, rows: Tensor, width: int, max_tokens: int, context: int | None = None
) -> tuple[list[Tensor], float]:
    """Sequences grouped for shared rows, and what of the arithmetic is left.

    Linear layers cost per token what attention costs per ``6 * width`` tokens attended to, and attention in a shared
    row runs over all its tokens: a row of ``l`` tokens, padding included, costs ``6 width l + l^2``. A prompt's
    responses are divided over as many rows as make that least, all padded to the longest.

    Args:
        rollouts: the batch.
        rows: which sequences to group.
        width: the model's hidden size.
        max_tokens: the most tokens in a row of several responses.
        context: the most tokens in a row by any means, as many as the model has positions for.
    """
    lengths = rollouts.attention_mask.sum(1)
    most = min(max_tokens, context or max_tokens)
    shared: list[Tensor] = []
    alone = together = 0.0
    for prompt, members in shared_rows(rollouts, rows):
        of_members = lengths[members].tolist()
        # what responses add to a row: all but their last token, which predicts nothing
        ends = [0, *accumulate(length - prompt - 1 for length in of_members)]
        options = []
        for number in range(1, len(members) + 1):
            bounds = [len(members) * k // number for k in range(number + 1)]
            longest = prompt + max(ends[b] - ends[a] for a, b in pairwise(bounds))
            if longest <= most or number == len(members):
                options.append((number * _cost(width, padded(longest)), bounds))
        cost, bounds = min(options)
        shared += [torch.tensor(members[a:b]) for a, b in pairwise(bounds)]
        together += cost
        alone += sum(_cost(width, padded(length)) for length in of_members)
    return shared, together / alone


def shared_prompts(
    rollouts: Rollouts, rows: Tensor, width: int, max_tokens: int, context: int | None = None
) -> list[Tensor] | None:
    """:func:`shared_groups`, or ``None`` where sharing would save less than a tenth of the arithmetic."""
    groups, left = shared_groups(rollouts, rows, width, max_tokens, context)
    return groups if left < 0.9 else None


def _cost(width: int, tokens: float) -> float:
    return 6 * width * tokens + tokens**2


def pack_shared(
    rollouts: Rollouts, groups: list[Tensor], device: torch.device, dtype: torch.dtype, context: int | None = None
) -> Microbatch:
    """Pack groups of sequences with the same prompt, one group to a row.

    The last token of a response predicts nothing and is left out. Rows are padded to a multiple of 16 tokens, and no
    further than the model has positions, if it says how many.
    """
    built = [_shared_row(rollouts, group) for group in groups]
    longest = max(len(row.ids) for row in built)
    length = max(longest, min(padded(longest), context or padded(longest)))
    ids, positions, segments = (
        torch.stack([torch.nn.functional.pad(torch.tensor(x), (0, length - len(x)), value=fill) for x in columns])
        for columns, fill in (
            ([row.ids for row in built], 0),
            ([row.positions for row in built], 0),
            ([row.segments for row in built], -1),
        )
    )
    before = torch.ones(length, length, dtype=torch.bool).tril()
    same = segments[:, :, None] == segments[:, None, :]
    prompt = (segments == 0)[:, None, :] & (segments >= 0)[:, :, None]
    forbidden = ~((same | prompt) & before)
    rows = torch.cat(groups)
    return Microbatch(
        rows=rows,
        input_ids=ids.to(device),
        attention_mask=torch.zeros(forbidden.shape, dtype=dtype)
        .masked_fill_(forbidden, torch.finfo(dtype).min)[:, None]
        .to(device),
        position_ids=positions.to(device),
        source=torch.tensor([k * length + s for k, row in enumerate(built) for s in row.source]).to(device),
        targets=torch.tensor([t for row in built for t in row.targets]).to(device),
        leaders=torch.stack([group[0] for group in groups]),
        response_mask=rollouts.response_mask[rows],
    )


@dataclass
class _SharedRow:
    """One prompt and its responses, laid out in a row; segment 0 is the prompt, k the k-th response."""

    ids: list[int]
    positions: list[int]
    segments: list[int]
    source: list[int]
    targets: list[int]


def _shared_row(rollouts: Rollouts, group: Tensor) -> _SharedRow:
    row: _SharedRow | None = None
    prompt = 0
    for k, index in enumerate(group.tolist(), start=1):
        real = rollouts.attention_mask[index]
        ids, response = rollouts.input_ids[index, real].tolist(), rollouts.response_mask[index, real].tolist()
        if row is None:
            prompt = response.index(True)
            row = _SharedRow(ids[:prompt], list(range(prompt)), [0] * prompt, [], [])
        offset = len(row.ids) - prompt
        for t in range(prompt, len(ids)):
            if response[t]:
                row.source.append(t - 1 if t == prompt else offset + t - 1)
                row.targets.append(ids[t])
        row.ids += ids[prompt:-1]
        row.positions += range(prompt, len(ids) - 1)
        row.segments += [k] * (len(ids) - 1 - prompt)
    assert row is not None
    return row
