"""What a batch's columns say against each other is named, and an intact batch says nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from entropy_probe import Rollouts
from entropy_probe.rollouts.batch import LOGPROBS
from tests.analyses.batches import END, admitted, batch
from tests.notes import texts


@pytest.mark.parametrize("name", LOGPROBS)
def test_numbers_that_are_no_log_probabilities_are_named(name):
    given = batch([[1, 2], [2, 1]], [[3, 4, 5], [3, 6, 7]], [0, 1], masks=[[1, 0, 1], [1, 1, 1]])
    values = torch.full((2, 5), -1.0)
    values[0, 3] = 9.0  # of a tool
    assert not admitted(replace(given, **{name: values})).notes
    values[1, 2:4] = torch.tensor([0.7, 0.004])  # the second is rounding
    (text,) = texts(admitted(replace(given, **{name: values})).notes)
    assert text.startswith(f"update: {name} are above 0 at 1 response tokens (0.7 at the most)")
    values[1, 2:4] = torch.tensor([-9999.0, -100.0])
    found = texts(admitted(replace(given, **{name: values})).notes)
    of_sampler = [f"update: {name} are below -80 at 2 response tokens (-9999 at the most)"]
    assert [text.partition(", as no")[0] for text in found] == ([] if name == "reference_logprobs" else of_sampler)


def groups() -> Rollouts:
    """Six prompts, four responses to each: of two to five tokens, ended but for the longest; advantages by group."""
    generator = torch.Generator().manual_seed(0)
    prompts = [[2 + k // 4, 1, 7] for k in range(24)]
    lengths = [2 + (k * 7) % 4 for k in range(24)]
    responses = [[*torch.randint(10, 40, (n,), generator=generator).tolist(), END][: max(n, 2)] for n in lengths]
    responses = [r if len(r) > 4 else [*r[:-1], END] for r in responses]
    rewards = torch.rand(24, generator=generator)
    advantages = (rewards.view(6, 4) - rewards.view(6, 4).mean(1, keepdim=True)).flatten()
    return batch(prompts, responses, [k // 4 for k in range(24)], rewards=rewards, advantages=advantages)


def late(given: Rollouts) -> Rollouts:
    mask, rows = given.response_mask.clone(), torch.arange(len(given))
    mask[rows, mask.int().argmax(1)] = False
    return replace(given, response_mask=mask)


def cut(given: Rollouts) -> Rollouts:
    keep = given.response_mask.cumsum(1) <= 3
    attention = given.attention_mask & (keep | ~given.response_mask)
    return replace(given, attention_mask=attention, response_mask=given.response_mask & keep)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda given: given, None),
        (lambda given: replace(given, advantages=given.advantages / (given.advantages.abs().amax() + 1) + 0.3), None),
        (lambda given: replace(given, advantages=given.rewards - given.rewards.mean()), None),
        (lambda given: replace(given, advantages=given.token_advantages), None),
        (lambda given: replace(given, rewards=None, advantages=-given.advantages), None),
        (lambda given: replace(given, advantages=given.advantages.roll(1)), "advantages_against_rewards"),
        (lambda given: replace(given, advantages=given.advantages.roll(8)), "advantages_against_rewards"),
        (lambda given: replace(given, advantages=-given.token_advantages), "advantages_against_rewards"),
        (lambda given: replace(given, rewards=given.rewards.flip(0)), "advantages_against_rewards"),
        (late, "late_mask"),
        (lambda given: replace(late(given), prompt_ids=given.prompt_ids * 9), "late_mask"),
        (lambda given: late(replace(given, sampled_logprobs=-given.response_mask.double())), "logprobs_before_mask"),
        (lambda given: replace(given, sampled_logprobs=-torch.ones(given.input_ids.shape)), None),
        (cut, "cut_off"),
        (lambda given: cut(late(given)), "cut_off"),
    ],
)
def test_columns_that_do_not_go_together(change: Callable[[Rollouts], Rollouts], code: str | None):
    codes = {note.code for note in admitted(change(groups()), end_ids=(END,), longest=5).notes}
    assert (code in codes) if code else not codes, codes


def test_turns_of_a_conversation_do_not_start_late():
    first = batch([[1, 2]] * 3, [[5, 6, END]] * 3, [0] * 3)
    turns = batch([[1, 2], [1, 2, 5, 6, END, 3], [1, 2, 5, 7, END, 3]], [[5, END], [6, END], [8, END]], [0, 0, 0])
    assert not admitted(first).notes
    assert not admitted(turns).notes
    longer = batch([[1, 2, 3], [1, 2, 4]], [[5, END], [5, END]], [0, 0])
    assert [note.code for note in admitted(longer).notes] == ["late_mask"]
    apart = admitted(replace(longer, trajectory_ids=torch.tensor([0, 1]))).notes
    assert "late_mask" not in {note.code for note in apart}
    assert texts(admitted(longer).notes)[0].startswith("update: 1 prompt ids have sequences whose prompts differ in")
