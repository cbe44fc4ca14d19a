"""What a run makes of the batches it is given, once, before anything looks at them.

Prompts with the same tokens are one prompt, whatever their ids, and what was sampled together belongs together: from
here on ``prompt_ids`` are what sequences depend on each other by. And what looks wrong with a batch by itself is said.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn

from entropy_probe.analyses.columns import about_columns, about_ends
from entropy_probe.estimators.uncertainty import is_grouped
from entropy_probe.results.note import NOTHING_TO_DO, Note, NoteKind
from entropy_probe.rollouts.batch import Rollouts
from entropy_probe.types import Clusters

Role = Literal["update", "evaluation", "batch"]
ClusterName = Literal["sequence", "prompt", "trajectory"]

EQUAL_PROMPTS = NoteKind(
    "equal_prompts",
    "{batch}: {ids} prompt ids have {prompts} distinct prompts: equal prompts are one, under the smallest of its ids "
    "(merge_equal_prompts keeps them apart)",
    "Right where a data set holds a prompt several times. Set probe.merge_equal_prompts to false where ids with equal "
    "tokens are different prompts (images, say).",
)
OTHER_IDS = NoteKind(
    "other_prompts_ids",
    "{batch}: {ids} prompt ids are each given to sequences with different prompts, which other ids have too: groups, "
    "and the errors that go by them, are of prompts mixed up",
    "Give every sequence the id of its own prompt; look for ids or rows that were shuffled or shifted.",
)
SAME_BATCH = NoteKind(
    "same_batch",
    "update and evaluation are the same sequences: the step is fitted to the responses that it is judged on, so "
    "predicted and realized changes are biased by what they share; cross_prompt predicts without that bias, and other "
    "evaluation rollouts measure without it",
    "Give or sample a separate evaluation batch, or read the one-batch prediction (mode: one_batch).",
)
TRAJECTORIES = NoteKind(
    "trajectories",
    "{batch}: {sequences} sequences are parts of {trajectories} trajectories: what has a trajectory in common counts "
    "as sampled together, and prompts that do as one ({prompts} in all)",
    f"{NOTHING_TO_DO} Leave trajectory_ids out to count every sequence by itself.",
)
NO_ADVANTAGES = NoteKind(
    "no_advantages",
    "{batch}: every advantage is 0, so the policy gradient is 0: only momentum (and a KL term) is left",
    "Compare the rewards with the responses: a reward that finds nothing to tell apart teaches nothing.",
)
WITH_REPLACEMENT = NoteKind(
    "with_replacement",
    "evaluation prompts repeat and are taken as drawn with replacement: every {drawn} counts as independent (set "
    "evaluation_unit to change this)",
    "Set probe.evaluation_unit to prompt if responses to one prompt were drawn together.",
)
RETOKENISED = NoteKind(
    "retokenised",
    "{batch}: the tokens are those of a text that was tokenized again: some may not be what the policy sampled",
    "Record token ids in training. The command rollouts, given the checkpoint, says how surprising the tokens are.",
)
MASKED_OUT = NoteKind(
    "masked_out",
    "{masked} of {responses} responses are masked out: they count in what the loss divides by, but entropy is that of "
    "the others, which are not a random sample of the policy's responses",
    "Read the entropy as that of the responses the trainer keeps, or give evaluation rollouts with full masks.",
)


@dataclass(frozen=True, eq=False)
class Admitted:
    """A batch as a run counts it.

    Attributes:
        rollouts: on the CPU; ids of one prompt, or of prompts that a trajectory goes through, are the smallest of them.
        notes: what a reader should know of it.
        not_modelled: what no number from it can show.
    """

    rollouts: Rollouts
    notes: list[Note]
    not_modelled: list[str]


def admit(
    batch: Rollouts,
    role: Role,
    merge: bool,
    end_ids: Sequence[int],
    longest: int | None,
    stop_texts: bool = False,
) -> Admitted:
    """Look at a batch before anything else does.

    Args:
        batch: as given.
        role: what it is used for; ``batch`` where it is both.
        merge: whether prompts with equal tokens are one.
        end_ids: the tokens that end a response; none where they are not known.
        longest: the trainer's limit on response tokens; ``None`` where it is not known.
        stop_texts: whether responses may end at a stop text, without an end token.

    Raises:
        ValueError: if a response is masked out, or its tokens are not the sampled ones, and entropy is that of all of
            them.
    """
    batch, notes, not_modelled = batch.cpu(), [], []
    name = "update" if role == "batch" else role
    if batch.retokenised:
        if role != "update":
            raise ValueError(
                f"{role}: expected the tokens that the policy sampled, since entropy is taken on them, got those of a "
                "text that was tokenized again; give or sample other evaluation rollouts (mode: two_batch)"
            )
        notes.append(RETOKENISED(batch=name))
    ids = batch.prompt_ids
    keys = list(_prompts(batch))
    mixed = 0 if batch.trajectory_ids is not None else _num_mixed(ids, keys)
    if mixed:
        notes.append(OTHER_IDS(batch=name, ids=mixed))
    if merge:
        ids = joined(ids, keys)
        before, after = batch.num_prompts, ids.unique().numel()
        if after < before and not mixed:
            notes.append(EQUAL_PROMPTS(batch=name, ids=before, prompts=after))
    if (count := draws_of(batch).count) < len(batch):
        assert batch.trajectory_ids is not None
        ids = joined(ids, batch.trajectory_ids.tolist())
        prompts = ids.unique().numel()
        notes.append(TRAJECTORIES(batch=name, sequences=len(batch), trajectories=count, prompts=prompts))
        if role != "update":
            not_modelled.append(
                "how the step changes the prompts of a trajectory's later sequences, which are held as they are"
            )
    if role != "update":
        notes += _about_masked_out(batch, role)
    if role != "evaluation" and batch.advantages is not None and not bool(batch.advantages.any()):
        notes.append(NO_ADVANTAGES(batch=name))
    batch = replace(batch, prompt_ids=ids)
    notes += about_ends(batch, name, end_ids, longest, stop_texts)
    notes += about_columns(batch, name, None if mixed else keys)
    return Admitted(batch, notes, not_modelled)


def joined(ids: Int[Tensor, " N"], keys: Iterable[Hashable | None]) -> Int[Tensor, " N"]:
    """The ids, with the smallest one in place of all that equal keys connect; a key ``None`` connects nothing."""
    distinct, index = ids.unique(return_inverse=True)
    root = list(range(len(distinct)))

    def find(i: int) -> int:
        while root[i] != i:
            root[i] = root[root[i]]
            i = root[i]
        return i

    first: dict[Hashable, int] = {}
    for i, key in zip(index.tolist(), keys, strict=True):
        if key is not None:
            low, high = sorted((find(i), find(first.setdefault(key, i))))
            root[high] = low
    return distinct[torch.tensor([find(i) for i in range(len(root))])][index]


def _num_mixed(ids: Int[Tensor, " N"], keys: Sequence[bytes | None]) -> int:
    """How many ids have several prompts, of which some have several ids."""
    prompts, owners = defaultdict(set), defaultdict(set)
    for one, key in zip(ids.tolist(), keys, strict=True):
        if key is not None:
            prompts[one].add(key)
            owners[key].add(one)
    return sum(len(own) > 1 and any(len(owners[key]) > 1 for key in own) for own in prompts.values())


def _prompts(batch: Rollouts) -> Iterable[bytes | None]:
    """The tokens before each response; ``None`` where no response says where the prompt ends."""
    answered = batch.response_mask.any(1).tolist()
    starts = batch.attention_mask.int().argmax(1).tolist()
    ends = batch.response_mask.int().argmax(1).tolist()
    for ids, some, start, end in zip(batch.input_ids.numpy(), answered, starts, ends, strict=True):
        yield ids[start:end].tobytes() if some else None


def draws_of(batch: Rollouts) -> Clusters:
    """What was drawn together at the least: the rows of a trajectory, else every sequence by itself."""
    return Clusters.sequences(len(batch)) if batch.trajectory_ids is None else Clusters.prompts(batch.trajectory_ids)


def in_groups(batch: Rollouts) -> bool:
    """Whether every prompt has as many draws, by the ids that the batch has."""
    ids, draws = batch.prompt_ids, draws_of(batch)
    return is_grouped(ids.new_zeros(draws.count).scatter_reduce(0, draws.index, ids, "amin", include_self=False))


def evaluation_clusters(
    evaluation: Rollouts, asked: Literal["auto", "sequence", "prompt"], *, grouped: bool
) -> tuple[ClusterName, Clusters, list[Note]]:
    """What is independent in an admitted evaluation batch, and what a reader should know of the choice.

    ``grouped`` says whether it was sampled in groups (:func:`in_groups`), which a batch no longer shows once two groups
    of one prompt are merged or responses are left out.
    """
    ids, draws, notes = evaluation.prompt_ids, draws_of(evaluation), []
    unit = asked
    if unit == "auto":
        unit = "prompt" if grouped else "sequence"
        if unit == "sequence" and evaluation.num_prompts < draws.count:
            drawn = "sequence" if draws.count == len(ids) else "trajectory"
            notes.append(WITH_REPLACEMENT(drawn=drawn))
    if unit == "prompt":
        return "prompt", Clusters.prompts(ids), notes
    return "sequence" if draws.count == len(ids) else "trajectory", draws, notes


def _about_masked_out(batch: Rollouts, role: Role) -> list[Note]:
    """Responses without tokens, which entropy cannot be estimated on."""
    empty = (~batch.response_mask.any(1)).nonzero()[:, 0]
    if len(empty) and role == "evaluation":
        raise ValueError(
            f"evaluation: expected response tokens in every sequence, got none in {len(empty)} of {len(batch)} (index "
            f"{int(empty[0])} first); entropy is that of all responses, those that the trainer masks out of its loss "
            "too, so give these unmasked"
        )
    return [MASKED_OUT(masked=len(empty), responses=len(batch))] if len(empty) else []


def end_tokens(model: nn.Module, more: Sequence[int] = ()) -> tuple[int, ...]:
    """The ids that end a response, by the model's generation config or else its config, and more that are known."""
    for holder in ("generation_config", "config"):
        eos = getattr(getattr(model, holder, None), "eos_token_id", None)
        if eos is not None:
            return tuple(sorted({*more, *([eos] if isinstance(eos, int) else eos)}))
    return tuple(sorted(set(more)))
