from __future__ import annotations

import pytest
import torch

from entropy_probe.sampling import group_advantages


def _trl(rewards, size, scale_rewards):
    """TRL's arithmetic, with TRL's own standard deviation (GRPOTrainer, sum_then_normalize)."""
    utils = pytest.importorskip("trl.trainer.utils")
    grouped = rewards.view(-1, size)
    advantages = rewards - grouped.nanmean(1).repeat_interleave(size)
    if scale_rewards == "group":
        deviations = torch.stack([utils.nanstd(group) for group in grouped])  # `dim` is not in every TRL
        return advantages / (deviations.repeat_interleave(size) + 1e-4)
    if scale_rewards == "batch":
        return advantages / (utils.nanstd(rewards) + 1e-4)
    return advantages


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
def test_equals_trl(scale_rewards):
    rewards = torch.randn(24, generator=torch.Generator().manual_seed(0))
    prompt_ids = torch.tensor([7, 3, 9, 1, 5, 0]).repeat_interleave(4)
    torch.testing.assert_close(group_advantages(rewards, prompt_ids, scale_rewards), _trl(rewards, 4, scale_rewards))


def test_group_of_two_by_hand():
    advantages = group_advantages(torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([0, 0]))
    expected = 0.5 / (0.5**0.5 + 1e-4)  # unbiased standard deviation of (1, 0)
    assert advantages.tolist() == pytest.approx([expected, -expected], rel=1e-12)


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
def test_groups_may_be_scattered_and_unequal(scale_rewards):
    rewards = torch.tensor([1.0, 0.0, 3.0, 0.5, 0.0], dtype=torch.float64)
    prompt_ids = torch.tensor([4, 2, 4, 2, 4])
    got = group_advantages(rewards, prompt_ids, scale_rewards)
    for prompt in (2, 4):
        own = rewards[prompt_ids == prompt]
        divisor = {"group": own.std() + 1e-4, "batch": rewards.std() + 1e-4, "none": 1.0}[scale_rewards]
        torch.testing.assert_close(got[prompt_ids == prompt], (own - own.mean()) / divisor)


def test_equal_rewards_give_exactly_zero():
    rewards = torch.tensor([0.1, 0.1, 0.1, 0.7, 0.7, 0.7])
    assert group_advantages(rewards, torch.tensor([0, 0, 0, 1, 1, 1])).tolist() == [0.0] * 6


@pytest.mark.parametrize(
    ("rewards", "ids", "scale_rewards", "match"),
    [
        ([1.0, 2.0, 3.0], [0, 0, 5], "group", "at least 2 responses per prompt, got 1 for prompt 5"),
        ([1.0], [0], "batch", "at least 2 rewards, got 1"),
        ([1.0, float("nan")], [0, 0], "none", "expected finite numbers, got nan at index 1"),
    ],
)
def test_errors(rewards, ids, scale_rewards, match):
    with pytest.raises(ValueError, match=match):
        group_advantages(torch.tensor(rewards), torch.tensor(ids), scale_rewards)
