"""A dump as a batch of rollouts: tokens, masks, prompts, advantages, and what to say of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from entropy_probe.dumps.advantages import compared, recomputed, rewards_of
from entropy_probe.dumps.files import files_of, read_samples
from entropy_probe.dumps.layouts import Layout
from entropy_probe.dumps.samples import Sample
from entropy_probe.dumps.texts import encode_texts
from entropy_probe.results.note import Note, NoteKind
from entropy_probe.results.record import file_errors
from entropy_probe.rollouts.batch import LOGPROBS, Rollouts
from entropy_probe.rollouts.parquet import is_rollouts
from entropy_probe.sampling.responses import side_by_side

RESTORED = NoteKind(
    "end_tokens_restored",
    "{restored} of {sequences} responses of text, all that are not cut off at the largest length, were given back the "
    "end token that the text has lost; {failing} do not give their text back",
    "Make sure that probe.max_completion_length is the one of training. Recorded token ids do without.",
)
OTHER_STEP = NoteKind(
    "other_step",
    "the dump is of step {step}; the next batch of a checkpoint after {after} steps is that of step {next}",
    "Give the dump of that step.",
)
NO_STEP = NoteKind(
    "step_not_known",
    "nothing tells the step of the dump or of the checkpoint, so it was not checked that one is the other's next batch",
    "The next batch of checkpoint N is that of step N + 1; make sure of it.",
)


@dataclass(frozen=True)
class Converted:
    """A dump as a batch.

    Attributes:
        rollouts: the batch.
        advantages: how its advantages come about, in a few words.
        notes: what a reader should know.
    """

    rollouts: Rollouts
    advantages: str
    notes: tuple[Note, ...] = ()


@dataclass(frozen=True)
class Dump:
    """The rollouts of one step, as a trainer left them; texts are not tokenized yet.

    Attributes:
        path: the file or folder.
        files: where its rollouts are.
        layout: whose.
        step: the trainer's step.
        samples: the rollouts.
    """

    path: Path
    files: tuple[Path, ...]
    layout: Layout
    step: int | None
    samples: Sequence[Sample]

    @property
    def is_text(self) -> bool:
        """Whether responses are texts."""
        return any(sample.is_text for sample in self.samples)

    @property
    def needs_tokenizer(self) -> bool:
        """Whether prompts or responses are texts."""
        return any(s.is_text or isinstance(s.prompt, str) or isinstance(s.prompt[0], Mapping) for s in self.samples)

    def alignment(self, after: int | None) -> Note | None:
        """What is wrong with this as the next batch of a checkpoint after so many steps; None if nothing is."""
        if self.step is None or after is None:
            return NO_STEP()
        return None if self.step == after + 1 else OTHER_STEP(step=self.step, after=after, next=after + 1)

    def convert(
        self,
        tokenizer: Any = None,
        longest: int | None = None,
        weights: Sequence[float] | None = None,
        *,
        mask_truncated: bool = False,
    ) -> Converted:
        """The batch.

        Args:
            tokenizer: the policy's; needed where there are texts.
            longest: the trainer's limit on response tokens; needed where responses are texts.
            weights: of several rewards, in their order; 1 each by default.
            mask_truncated: whether the trainer's loss leaves out responses that are cut off.

        Raises:
            ValueError: if texts cannot be tokenized without doubt, or the rollouts are inconsistent.
        """
        if self.needs_tokenizer and tokenizer is None:
            raise ValueError(
                f"{self.path}: expected a tokenizer, since the dump has texts, got none; give the checkpoint "
                "(--checkpoint), or the base model that has it"
            )
        encoded = encode_texts(tokenizer, self.layout, self.samples, longest)
        notes = []
        if self.is_text:
            notes.append(RESTORED(restored=encoded.restored, sequences=len(self.samples), failing=encoded.failing))
        end = getattr(tokenizer, "eos_token_id", None)
        masks = [
            _mask(sample, ids, longest, end, mask_truncated)
            for sample, ids in zip(self.samples, encoded.responses, strict=True)
        ]
        grouped = all(sample.group is not None for sample in self.samples)
        prompt_ids = _numbered([sample.group for sample in self.samples] if grouped else encoded.prompts)
        padded = _Padded.of(encoded.prompts, encoded.responses, masks)
        microbatches = [sample.microbatch for sample in self.samples]
        try:
            advantages, rewards, how, more = self._advantages(padded, prompt_ids, weights, grouped)
            rollouts = Rollouts(
                padded.input_ids,
                padded.attention_mask,
                padded.response_mask,
                prompt_ids,
                advantages,
                rewards,
                *(padded.of_response([getattr(s, name.partition("_")[0]) for s in self.samples]) for name in LOGPROBS),
                microbatch_ids=None if None in microbatches else _numbered(microbatches),
                retokenised=self.is_text,
            )
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error
        return Converted(rollouts, how, (*notes, *more))

    def _advantages(
        self, padded: _Padded, prompt_ids: Int[Tensor, " N"], weights: Sequence[float] | None, grouped: bool
    ) -> tuple[Tensor | None, Tensor | None, str, tuple[Note, ...]]:
        """Advantages and rewards, how the former come about, and what to say of them."""
        rewards = rewards_of(self.samples, weights)
        comparable = rewards is not None and bool((prompt_ids.unique(return_counts=True)[1] > 1).all())
        given = [sample.advantage for sample in self.samples]
        if None in given:
            if any(x is not None for x in given):
                raise ValueError(f"expected advantages in all rollouts or none, got {given.count(None)} without")
            if rewards is None or not comparable:
                return None, rewards, "none", ()
            advantages, how, notes = recomputed(self.layout, rewards, prompt_ids, grouped=grouped)
            return advantages, rewards, how, notes
        own, per_token = padded.constant(given)
        if rewards is None or not comparable or own is None:
            return (per_token if own is None else own), rewards, "the dump's", ()
        rule, note = compared(self.layout, own, rewards, prompt_ids)
        if note is None:
            return own, rewards, f"the dump's, which are {rule}", ()
        several = weights is None and any(len(sample.rewards or ()) > 1 for sample in self.samples)
        return own, None if several else rewards, "the dump's", (note,)


@file_errors()
def read_dump(path: str | Path, step: int | None = None, after: int | None = None) -> Dump | Rollouts:
    """What is in a dump; a file of ours is a batch already.

    Args:
        path: a file, or a folder with those of one step or of all.
        step: which step, where there are several.
        after: a checkpoint's step: without ``step`` the one after it is taken where there are several.

    Raises:
        ValueError: if there is none, its layout is not known or ambiguous, or a record does not fit it.
    """
    path = Path(path)
    if not path.is_dir() and is_rollouts(path):
        return Rollouts.from_parquet(path)
    wanted = after + 1 if step is None and after is not None else step
    files = files_of(path, wanted)
    layout, step, samples = read_samples(files, step, after)
    return Dump(path, tuple(files), layout, step, tuple(samples))


def describe_batch(rollouts: Rollouts) -> dict[str, str]:
    """What a batch holds, in words."""
    lengths, counts = rollouts.response_lengths, rollouts.prompt_ids.unique(return_counts=True)[1]
    low, high, masked = int(counts.min()), int(counts.max()), int((lengths == 0).sum())
    mean = float(lengths.float().mean())
    there = [name.removesuffix("_logprobs") for name in LOGPROBS if getattr(rollouts, name) is not None]
    each = low if low == high else f"{low} to {high}"
    told = {
        "sequences": f"{len(rollouts)}, {each} to each of {rollouts.num_prompts} prompts",
        "response tokens": f"{int(lengths.sum()):,}, {mean:.1f} a response, {int(lengths.max())} at most",
        "tokens": "of texts tokenized again" if rollouts.retokenised else "ids, as sampled",
        "log-probabilities": ", ".join(there) or "none",
    }
    if masked:
        told["masked out"] = f"{masked} responses, which count in what a loss divides by"
    if rollouts.rewards is not None:
        told["reward"] = f"{float(rollouts.rewards.mean()):.4g} on average"
    return told


def _mask(sample: Sample, ids: Sequence[int], longest: int | None, end: int | None, mask_truncated: bool) -> list[bool]:
    """Which tokens of a response count."""
    cut = sample.truncated
    if cut is None:
        cut = longest is not None and len(ids) >= longest and ids[-1] != end
    if not sample.kept or (mask_truncated and cut):
        return [False] * len(ids)
    return [True] * len(ids) if sample.mask is None else list(sample.mask)


@dataclass(frozen=True, eq=False)
class _Padded:
    """Sequences side by side, padded on the right."""

    input_ids: Int[Tensor, "N L"]  # prompts and responses
    attention_mask: Bool[Tensor, "N L"]  # where they are
    responses: Bool[Tensor, "N L"]  # where the responses are
    response_mask: Bool[Tensor, "N L"]  # which of their tokens count
    lengths: tuple[int, ...]  # of the responses

    @classmethod
    def of(
        cls, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], masks: Sequence[Sequence[bool]]
    ) -> _Padded:
        input_ids, there, inside = side_by_side(prompts, responses)
        mask = torch.tensor([on for own in masks for on in own], dtype=torch.bool)
        counted = torch.zeros_like(inside).masked_scatter(inside, mask)
        return cls(input_ids, there, inside, counted, tuple(map(len, responses)))

    def of_response(self, values: Sequence[Sequence[float] | None]) -> Float[Tensor, "N L"] | None:
        """A number for each token of the responses, NaN for those without; None where no sequence has any."""
        if all(own is None for own in values):
            return None
        flat = [x for own, n in zip(values, self.lengths, strict=True) for x in (own or (math.nan,) * n)]
        return torch.zeros(self.attention_mask.shape).masked_scatter(self.responses, torch.tensor(flat))

    def constant(self, values: Sequence[Any]) -> tuple[Float[Tensor, " N"] | None, Float[Tensor, "N L"] | None]:
        """Numbers per sequence, where all tokens that count have the same; else None, and the numbers per token."""
        if not any(isinstance(own, tuple) for own in values):
            return torch.tensor(values), None
        spread = [own if isinstance(own, tuple) else (own,) * n for own, n in zip(values, self.lengths, strict=True)]
        per_token = self.of_response(spread)
        assert per_token is not None
        low = per_token.masked_fill(~self.response_mask, math.inf).amin(1)
        high = per_token.masked_fill(~self.response_mask, -math.inf).amax(1)
        answered = self.response_mask.any(1)
        if bool(((high - low)[answered] > 1e-6).any()):
            return None, per_token
        return torch.where(answered, low, 0.0), per_token


def _numbered(keys: Sequence[Any]) -> Int[Tensor, " N"]:
    numbers = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    return torch.tensor([numbers[key] for key in keys])
