"""Surprisal minus entropy: calibrated on policy, also where a normal approximation is not, and off it elsewhere."""

import math

import pytest
import torch

from entropy_probe.estimators.policy_fit import MAX_Z, excess_sums, policy_fit
from tests.reference.enumeration import Table, TinyPolicy
from tests.reference.samplers import at_temperature, cut, draw, full_scores, trained

TABLE, MODEL = Table.build(), TinyPolicy()
SCORES = full_scores(TABLE, MODEL)
SUMS = excess_sums(SCORES)


def zs(sums: torch.Tensor, logprobs: torch.Tensor, batches: int, n: int = 256, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.tensor([policy_fit(sums[:, draw(TABLE, logprobs, n, generator)]).z for _ in range(batches)])


def test_it_has_mean_zero_and_variance_one_exactly():
    """Over all responses: the mean is 0, and both parts of the denominator are the variance of the numerator."""
    p = SCORES.sequence_logprobs.exp() / 3
    x, squares, variances, tokens = SUMS
    assert float(p @ x) == pytest.approx(0, abs=1e-12)
    assert float(p @ squares) == pytest.approx(float(p @ x.square()), rel=1e-10)
    assert float(p @ variances) == pytest.approx(float(p @ x.square()), rel=1e-10)
    assert torch.equal(tokens, TABLE.rollouts.response_mask.sum(1).double())


@pytest.mark.parametrize("n", [8, 256])
def test_on_policy_batches_seldom_ring(n):
    found = zs(SUMS, SCORES.logprobs, 200, n)
    assert int((found.abs() > MAX_Z).sum()) <= 1
    assert abs(found.mean()) < 4 * found.std() / 200**0.5
    assert found.std() == pytest.approx(1, abs=0.2)


@pytest.mark.slow
def test_on_policy_batches_seldom_ring_in_many():
    assert int((zs(SUMS, SCORES.logprobs, 20_000).abs() > MAX_Z).sum()) <= 6


@pytest.mark.parametrize(
    ("name", "sign", "least"),
    [("temperature 0.9", -1, 1.7), ("temperature 0.6", -1, 7), ("top_p 0.95", -1, 2.2), ("temperature 1.3", 1, 4)],
)
def test_power(name, sign, least):
    """The mean of z at N = 256, as in the table of ``docs/theory.md``."""
    how, value = name.split()
    logprobs = cut(TABLE, MODEL, top_p=0.95) if how == "top_p" else at_temperature(TABLE, MODEL, float(value))
    assert sign * float(zs(SUMS, logprobs, 100).mean()) > least


def test_an_older_policy_shows():
    """Ten steps, which raise the entropy here: the old tokens are less surprising than the new policy is uncertain."""
    new = full_scores(TABLE, trained(TABLE))
    assert float(zs(excess_sums(new), SCORES.logprobs, 100).mean()) < -3.5


def test_a_rare_token_that_did_not_come_is_no_alarm():
    """Nearly all tokens are certain: spread within the batch alone would give z = -16, or -4 once in 200 batches."""
    p = 1e-3
    h = -p * math.log(p) - (1 - p) * math.log(1 - p)
    v = p * math.log(p) ** 2 + (1 - p) * math.log(1 - p) ** 2 - h**2
    likely = torch.tensor([-math.log(1 - p) - h, (-math.log(1 - p) - h) ** 2, v, 1.0], dtype=torch.float64)
    rare = torch.tensor([-math.log(p) - h, (-math.log(p) - h) ** 2, v, 1.0], dtype=torch.float64)
    batch = likely[:, None].repeat(1, 256)
    assert float(batch[0].sum() / batch[1].sum().sqrt()) == pytest.approx(-16)
    assert abs(policy_fit(batch).z) < 1
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(2000):
        is_rare = torch.rand(256, generator=generator) < p
        found.append(policy_fit(torch.where(is_rare, rare[:, None], likely[:, None])).z)
    assert sum(abs(z) > MAX_Z for z in found) <= 2
    # 12 of them where 0.3 are expected
    assert policy_fit(torch.cat([batch[:, 12:], rare[:, None].repeat(1, 12)], 1)).z > 5


def test_a_certain_policy_fits_up_to_rounding():
    certain = torch.tensor([[2e-6], [4e-12], [0.0], [1.0]], dtype=torch.float64).repeat(1, 10_000)
    assert abs(policy_fit(certain).z) < 0.5


def test_few_sequences_of_another_kind_are_enough():
    """A bound on z by the number of sequences would keep eight of them quiet, however strange."""
    strange = torch.tensor([[30.0], [120.0], [6.0], [10.0]], dtype=torch.float64).repeat(1, 8)
    fit = policy_fit(strange)
    assert fit.z > 10
    assert fit.excess == pytest.approx(3.0)


def test_weights_that_are_right_bring_it_back_to_zero():
    flat = at_temperature(TABLE, MODEL, 1.4)
    log_weights = SCORES.sequence_logprobs - flat.sum(1)
    generator = torch.Generator().manual_seed(3)
    plain, right, wrong = [], [], []
    for _ in range(100):
        rows = draw(TABLE, flat, 256, generator)
        plain.append(policy_fit(SUMS[:, rows]).z)
        right.append(policy_fit(SUMS[:, rows], log_weights[rows]).z)
        wrong.append(policy_fit(SUMS[:, rows], -log_weights[rows]).z)
    assert torch.tensor(plain).mean() > 4
    assert abs(torch.tensor(right).mean()) < 0.5
    assert torch.tensor(right).abs().max() < MAX_Z
    assert torch.tensor(wrong).mean() > 4
