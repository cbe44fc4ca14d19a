"""A probe's numbers against the trainer's log: alarm where they are of different things, and only there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from entropy_probe import Rollouts
from entropy_probe.analyses.log_check import against_log
from tests.report.results import make_result

LENGTHS = torch.tensor([3, 5, 4, 6, 3, 5, 4, 6])


def batch(rewards: bool = True) -> Rollouts:
    position = torch.arange(9)
    return Rollouts(
        input_ids=torch.ones(8, 9, dtype=torch.long),
        attention_mask=position < (2 + LENGTHS)[:, None],
        response_mask=(position >= 2) & (position < (2 + LENGTHS)[:, None]),
        prompt_ids=torch.arange(8) // 2,
        advantages=torch.ones(8),
        rewards=torch.tensor([0.0, 1.0] * 4) if rewards else None,
    )


def said(logged: dict[str, tuple[float, ...]], rollouts: Rollouts | None = None, **more: bool) -> list[str]:
    result = make_result()
    return [note.code for note in against_log(logged, result, rollouts or batch(), **more)]


RESULT = make_result()
NORM, H = RESULT.diagnostics.gradient_norm, RESULT.entropy.value
AGREES = {
    "grad_norm": (NORM, 3 * NORM),
    "entropy": (H, 1.02 * H, 0.98 * H),
    "completions/mean_length": (4.4, 4.6, 4.5),
    "reward": (0.5, 0.45),
}


def test_a_log_that_agrees_or_is_silent_has_no_note():
    assert said(AGREES) == []
    assert said({}) == []
    assert said({"reward": (0.9, 0.91)}, batch(rewards=False)) == []


@pytest.mark.parametrize(
    ("logged", "code"),
    [
        ({"grad_norm": (NORM / 4.2, NORM / 9)}, "logged_gradient_norm"),
        ({"grad_norm": (NORM * 4.2, NORM * 9)}, "logged_gradient_norm"),
        ({"entropy": (1.3 * H, 1.31 * H, 1.32 * H)}, "logged_entropy"),
        ({"entropy": (0.7 * H, 0.71 * H)}, "logged_entropy"),
        ({"completions/mean_length": (9.0, 9.2, 9.1)}, "logged_length"),
        ({"reward": (5.0, 5.1, 5.2)}, "logged_reward"),
    ],
)
def test_each_number_that_disagrees_is_said(logged, code):
    assert said(AGREES | logged) == [code]


@pytest.mark.parametrize(
    "logged",
    [
        {"grad_norm": (NORM / 3.9,)},  # within the factor
        {"grad_norm": (NORM * 100, NORM * 3.9)},  # the nearest counts
        {"entropy": (1.09 * H,) * 5},  # far in errors, not in size
        {"entropy": (0.2 * H, 2.9 * H, 1.6 * H)},  # training moves it as much itself
        {"completions/mean_length": (5.3,)},  # within the errors of two such batches
    ],
)
def test_what_noise_explains_is_not_said(logged):
    assert said(AGREES | logged) == []


def test_a_selected_batch_is_not_judged_by_its_means():
    other = AGREES | {"completions/mean_length": (9.0, 9.1), "reward": (5.0, 5.1), "entropy": (2 * H, 2.01 * H)}
    assert said(other, selected=True) == ["logged_entropy"]
    assert said(other) == ["logged_entropy", "logged_length", "logged_reward"]


def test_entropy_is_not_compared_where_the_trainer_masked_responses():
    masked = replace(batch(), response_mask=batch().response_mask & (torch.arange(8) != 3)[:, None])
    assert said({"entropy": (1.3 * H, 1.31 * H)}, masked) == []


def test_notes_have_both_numbers():
    (note,) = against_log({"completions/mean_length": (9.0, 9.2, 9.1)}, make_result(), batch())
    assert note.text == (
        "update responses have 4.5 ± 0.29 tokens, the trainer logged 9.1 on average in its last 3 steps"
    )
    assert note.numbers == pytest.approx({"own": 4.5, "error": 0.2887, "logged": 9.1, "steps": 3.0}, abs=1e-4)


def test_a_single_prompt_has_no_error_to_judge_by():
    rollouts = batch().select(torch.arange(2))
    assert said({"completions/mean_length": (90.0, 91.0)}, rollouts) == []
