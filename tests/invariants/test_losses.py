"""A trainer's loss in full, off policy, by enumeration: the prediction is unbiased and its interval covers."""

from dataclasses import replace

import pytest
import torch

from tests.invariants.problems import TABLE, probe
from tests.losses.trl_formulas import DEFAULTS
from tests.reference.enumeration import TinyPolicy, trained_optimizer

GROUP = 4
LOSS = {"trainer": "trl", "loss_type": "grpo", "epsilon": 0.2, "beta": 0.3, "entropy_coef": 0.2}
SETTINGS = {"geometry": "frozen", "normalization": "sequence", "frozen_max_scale": 1e12, "loss": LOSS}


def policies() -> tuple[TinyPolicy, TinyPolicy, TinyPolicy]:
    """The policy, the one that its rollouts are from, and the reference."""
    found = []
    for seed, size in ((7, 0.0), (8, 0.15), (9, 0.3)):
        model = TinyPolicy(train_embedding=False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters():
                p += size * torch.randn(p.shape, generator=generator, dtype=torch.float64)
        found.append(model)
    return tuple(found)


def exact_gradient(policy, old, reference) -> list[torch.Tensor]:
    """The expected gradient of the loss over responses of the old policy, with the reward minus 1/2 as advantage."""
    scores, p = TABLE.token_scores(policy), TABLE.probabilities(old).detach()
    s_old, s_ref = (TABLE.token_scores(model).logprobs.detach() for model in (old, reference))
    mask, advantages = scores.response_mask, (TABLE.rollouts.rewards - 0.5)[:, None]
    ratio, d = (scores.logprobs - s_old).exp(), s_ref - scores.logprobs
    clip = DEFAULTS["epsilon"]
    per_token = -torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    per_token = per_token + LOSS["beta"] * ratio * (d.exp() - d - 1)
    lengths = mask.sum(1)
    loss = (p * (per_token * mask).sum(1) / lengths).sum()
    loss = loss - LOSS["entropy_coef"] * (p * scores.entropies.sum(1)).sum() / (p * lengths).sum()
    return torch.autograd.grad(loss, [p for p in policy.parameters() if p.requires_grad])


def exact_change(policy, optimizer, gradient) -> float:
    """To first order, by the frozen step."""
    theta = [p for p in policy.parameters() if p.requires_grad]
    change = 0.0
    for p, h, g in zip(theta, torch.autograd.grad(TABLE.entropy(policy, "sequence"), theta), gradient, strict=True):
        scale = 1 / ((optimizer.state[p]["exp_avg_sq"] / (1 - 0.999**3)).sqrt() + 1e-8)
        change -= 1e-3 * (h * scale * g).sum().item()
    return change


def covered(batches: int, groups: int, n: int, seed: int) -> tuple[torch.Tensor, float, float]:
    """Predictions, the exact change, and how many of their intervals cover it."""
    policy, old, reference = policies()
    optimizer = trained_optimizer(policy)
    exact = exact_change(policy, optimizer, exact_gradient(policy, old, reference))
    columns = {"old_logprobs": old, "reference_logprobs": reference}
    logprobs = {name: TABLE.token_scores(model).logprobs.detach() for name, model in columns.items()}
    generator = torch.Generator().manual_seed(seed)
    values, hits = [], 0
    subject = probe(policy, optimizer, **SETTINGS)
    for _ in range(batches):
        rows = TABLE.sample_groups(old, groups, GROUP, generator)
        update = TABLE.update_batch(rows, GROUP)
        update = replace(update, advantages=update.rewards - 0.5, **{k: x[rows] for k, x in logprobs.items()})
        evaluation = TABLE.rollouts.select(TABLE.sample(policy, n, generator))
        predicted = subject.predict(update=update, evaluation=evaluation).predicted
        values.append(predicted.value)
        hits += abs(predicted.value - exact) <= 1.96 * predicted.standard_error
    return torch.tensor(values), exact, hits / batches


def test_the_ratio_is_not_one_and_clips():
    policy, old, _ = policies()
    ratio = (TABLE.token_scores(policy).logprobs - TABLE.token_scores(old).logprobs).exp()
    p = TABLE.probabilities(old)
    share = (p[:, None] * ((ratio - 1).abs() > 0.2)).sum() / (p[:, None] * TABLE.rollouts.response_mask).sum()
    assert 0.1 < share < 0.8


def test_unbiased_and_covering_off_policy_with_kl_and_bonus():
    values, exact, share = covered(batches=100, groups=40, n=50, seed=3)
    assert abs(values.mean() - exact) < 4 * values.std() / len(values) ** 0.5
    assert values.std() < 2 * abs(exact), "too noisy to see a bias"
    assert 0.92 <= share <= 0.98


@pytest.mark.slow
def test_unbiased_and_covering_off_policy_with_kl_and_bonus_long():
    values, exact, share = covered(batches=1500, groups=80, n=200, seed=4)
    assert abs(values.mean() - exact) < 4 * values.std() / len(values) ** 0.5
    assert 0.93 <= share <= 0.97
