"""Fingerprints of tensors by content, and scores remembered under them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from entropy_probe.parallel.shards import local
from entropy_probe.rollouts.batch import Rollouts
from entropy_probe.types import TokenScores

_CHUNK = 2**22
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MULTIPLIERS = (0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9)
"""Odd constants below 2**63; products wrap around."""


@torch.no_grad()
def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A 128-bit digest of named tensors: names, shapes, types and every bit of their values.

    Equal content on the same kind of device gives an equal digest, whatever object holds it. Of a sharded tensor, this
    rank's part counts.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        flat = local(tensor.detach()).contiguous().reshape(-1)
        if flat.device.type == "cpu":
            digest.update(flat.view(torch.uint8).numpy().data)
        else:
            digest.update(mixed_sums(flat).cpu().numpy().tobytes())
    return digest.hexdigest()


def mixed_sums(values: Tensor) -> Tensor:
    """Two sums over mixed pairs of value and position, int64 ``[2]``, so that a tensor is digested where it is.

    It guards against mistakes, not malice.
    """
    words = values.view(_WORDS[values.element_size()])
    total = torch.zeros(len(_MULTIPLIERS), dtype=torch.int64, device=values.device)
    for start in range(0, words.numel(), _CHUNK):
        chunk = words[start : start + _CHUNK].long()
        position = torch.arange(start + 1, start + 1 + chunk.numel(), device=values.device)
        for k, multiplier in enumerate(_MULTIPLIERS):
            mixed = (chunk + position * multiplier) * multiplier
            total[k] += ((mixed ^ (mixed >> 29)) * multiplier).sum()
    return total


def rollouts_fingerprint(rollouts: Rollouts) -> str:
    """The fingerprint of what scores depend on: tokens and masks."""
    names = ("input_ids", "attention_mask", "response_mask", "prompt_ids")
    return fingerprint((name, getattr(rollouts, name)) for name in names)


def digest(content: bytes) -> bytes:
    """A digest of 16 bytes."""
    return hashlib.blake2b(content, digest_size=16).digest()


def sequence_digests(rollouts: Rollouts) -> list[bytes]:
    """A digest of each sequence: its tokens and which of them are the response, whatever the padding."""
    masks = (rollouts.attention_mask.cpu(), rollouts.response_mask.cpu())
    return [
        digest(ids[real].numpy().tobytes() + response[real].numpy().tobytes())
        for ids, real, response in zip(rollouts.input_ids.cpu(), *masks, strict=True)
    ]


class ScoreCache:
    """The scores of the last few batches, found again by the content of policy and batch."""

    def __init__(self, size: int = 2) -> None:
        self._size = size
        self._scores: dict[str, TokenScores] = {}

    def get(self, key: str, compute: Callable[[], TokenScores]) -> TokenScores:
        """The scores under ``key``, computed if they are not there; the oldest make room."""
        if key not in self._scores:
            scores = compute()
            while len(self._scores) >= self._size:
                del self._scores[next(iter(self._scores))]
            self._scores[key] = scores
        return self._scores[key]
