"""Rollouts refuse what would give plausible wrong numbers."""

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

from entropy_probe import Rollouts
from entropy_probe.estimators.baselines import strictly_after


def fields(n: int = 3, length: int = 5) -> dict[str, torch.Tensor]:
    ids = torch.ones(n, length, dtype=torch.long)
    response = torch.zeros(n, length, dtype=torch.long)
    response[:, 2:] = 1
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "response_mask": response,
            "prompt_ids": torch.arange(n), "advantages": torch.zeros(n)}  # fmt: skip


def change(name: str, index: tuple[int, ...], value: float) -> dict[str, torch.Tensor]:
    out = fields()
    out[name][index] = value
    return out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (fields() | {"input_ids": torch.ones(5, dtype=torch.long)}, r"input_ids: expected shape \[N, L\]"),
        (fields() | {"input_ids": torch.ones(3, 5)}, "input_ids: expected integers"),
        (fields() | {"response_mask": torch.ones(3, 4)}, r"response_mask: expected shape \[3, 5\] to match"),
        (fields() | {"prompt_ids": torch.arange(2)}, r"prompt_ids: expected shape \[3\]"),
        (fields() | {"advantages": torch.zeros(4)}, r"advantages: expected shape \[3\] or \[3, 5\]"),
        (
            fields() | {"response_mask": torch.zeros(3, 5)},
            "expected response tokens, got a response_mask that is false",
        ),
        (
            fields() | {"prompt_ids": ["a", 2, "b"]},
            "prompt_ids: expected integers, or strings for all sequences, got 'a'",
        ),
        (fields() | {"trajectory_ids": [0.5, 1.0, 2.0]}, r"trajectory_ids: expected integers, .* got 0.5"),
        (fields() | {"trajectory_ids": torch.zeros(3)}, "trajectory_ids: expected integers, got torch.float32"),
        (fields() | {"trajectory_ids": torch.arange(2)}, r"trajectory_ids: expected shape \[3\]"),
        (change("attention_mask", (1, 4), 0), r"response_mask covers padding in 1 of 3 sequences \(index 1\)"),
        (change("attention_mask", (2, 1), 0), "not one contiguous run"),
        (fields() | {"response_mask": torch.ones(3, 5)}, "response starts at the first token"),
        (change("advantages", (0,), float("nan")), r"advantages are not finite in 1 of 3 sequences \(index 0\)"),
        (change("advantages", (0,), float("inf")), "advantages are not finite"),
    ],
)
def test_bad_rollouts(given, message):
    with pytest.raises(ValueError, match=message) as caught:
        Rollouts(**given)
    assert "\n" not in str(caught.value)


def test_advantages_per_token_may_be_anything_off_the_response():
    given = fields()
    advantages = torch.full((3, 5), float("nan"))
    advantages[:, 2:] = 1.0
    batch = Rollouts(**given | {"advantages": advantages})
    assert batch.token_advantages.tolist() == [[0, 0, 1, 1, 1]] * 3
    with pytest.raises(ValueError, match=r"advantages: expected \[N\] or \[N, L\] on an update batch"):
        _ = Rollouts(**{k: v for k, v in given.items() if k != "advantages"}).token_advantages


def test_ids_may_be_text():
    batch = Rollouts(**fields() | {"prompt_ids": ["u-9", "u-1", "u-9"]}, trajectory_ids=list(np.array([5, 6, 5])))
    assert batch.prompt_ids.tolist() == [0, 1, 0]
    assert batch.trajectory_ids.tolist() == [5, 6, 5]
    assert batch.select(torch.tensor([1])).trajectory_ids.tolist() == [6]


def test_a_masked_out_response_needs_no_numbers():
    given = fields()
    given["response_mask"][1] = 0
    given["advantages"] = torch.tensor([1.0, float("nan"), 2.0])
    batch = Rollouts(**given, sampled_logprobs=torch.where(given["response_mask"] > 0, -1.0, torch.nan))
    assert batch.token_advantages.isfinite().all()
    assert batch.shortest_first.tolist() == [0, 2]


def test_select_keeps_every_column():
    batch = Rollouts(**fields(), rewards=torch.arange(3.0), sampled_logprobs=torch.zeros(3, 5))
    picked = batch.select(torch.tensor([2, 0]))
    assert picked.prompt_ids.tolist() == [2, 0]
    assert picked.rewards.tolist() == [2.0, 0.0]
    assert picked.num_prompts == len(picked) == 2
    moved = batch.cpu()
    assert torch.equal(moved.rewards, batch.rewards)
    assert moved.sampled_logprobs is not None
    assert picked.response_lengths.tolist() == [3, 3]


@pytest.mark.parametrize("checked", [True, pytest.param(False, marks=pytest.mark.unchecked)])
def test_shapes_are_checked_where_no_marker_says_otherwise(checked):
    with pytest.raises(TypeCheckError if checked else RuntimeError, match="strictly_after" if checked else "size"):
        strictly_after(torch.zeros(2, 3), torch.zeros(3, 2, dtype=torch.bool))
