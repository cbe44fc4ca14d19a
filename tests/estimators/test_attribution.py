"""Covariance terms and rank correlation against other code."""

import pytest
import torch
from scipy.stats import spearmanr

from entropy_probe.estimators.attribution import (
    covariance_terms,
    others_only,
    rank_correlation,
    rank_correlation_interval,
)
from entropy_probe.estimators.uncertainty import ClusterSums


def test_covariance_terms_average_to_the_covariance():
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(7, 5, generator=g) < 0.6
    a, s = torch.randn(2, 7, 5, generator=g, dtype=torch.float64)
    terms = covariance_terms(a, s, mask)
    expected = torch.cov(torch.stack([a[mask], s[mask]]), correction=0)[0, 1]
    assert terms[mask].mean().item() == pytest.approx(expected.item(), rel=1e-12)
    assert (terms[~mask] == 0).all()
    i, t = mask.nonzero()[3].tolist()
    assert terms[i, t].item() == pytest.approx(
        ((a[i, t] - a[mask].mean()) * (s[i, t] - s[mask].mean())).item(), rel=1e-12
    )


def test_rank_correlation_with_ties():
    g = torch.Generator().manual_seed(1)
    a, b = torch.randint(0, 6, (2, 40), generator=g).double()
    assert rank_correlation(a, a + b) == pytest.approx(spearmanr(a, a + b).statistic, rel=1e-12)
    assert rank_correlation(a, -a) == pytest.approx(-1)
    assert rank_correlation(a, 0 * b) is None
    assert rank_correlation(a[:1], b[:1]) is None


def test_interval_of_a_rank_correlation():
    """Covers the correlation of a large sample about as often as it says, also where it is high."""
    g = torch.Generator().manual_seed(2)
    for weight, spearman in ((0.0, 0.0), (3.0, 0.9436)):
        covered = 0
        for _ in range(400):
            x, noise = torch.randn(2, 40, generator=g, dtype=torch.float64)
            low, high = rank_correlation_interval(rank_correlation(weight * x + noise, x), 40)
            covered += low <= spearman <= high
        assert 0.92 <= covered / 400 <= 0.98
    # tanh(atanh 0.5 +- 1.96 sqrt(1.125 / 3)), worked out by hand
    assert rank_correlation_interval(0.5, 6) == pytest.approx((-0.5723, 0.9413), abs=1e-4)
    with pytest.raises(ValueError, match="expected at least 4 pairs"):
        rank_correlation_interval(0.5, 3)


@pytest.mark.parametrize("n", [4, 6, 40])
def test_interval_of_a_perfect_rank_correlation(n):
    """It has a width: that of the next best order, in which two neighbours have changed places."""
    order = torch.arange(n).double()
    swapped = order.clone()
    swapped[[0, 1]] = swapped[[1, 0]]
    next_best = rank_correlation(order, swapped)
    low, high = rank_correlation_interval(next_best, n)
    assert low < next_best < high < 1
    assert rank_correlation_interval(1.0, n) == pytest.approx((low, 1.0))
    assert rank_correlation_interval(-1.0, n) == pytest.approx((-1.0, -low))
    assert rank_correlation_interval(1 - 1e-15, n)[0] == pytest.approx(low), "perfect up to rounding"
    assert rank_correlation_interval(-next_best, n) == pytest.approx((-high, -low))


def test_folds_of_other_prompts_alone():
    """Against products of each prompt with each other, added up one by one."""
    generator = torch.Generator().manual_seed(0)
    products, fold_of = torch.randn(6, 6, generator=generator, dtype=torch.float64), torch.arange(6) % 2
    prompts = ClusterSums(torch.rand(2, 6, generator=generator, dtype=torch.float64) + 1)
    folds = ClusterSums(torch.stack([prompts.table[:, fold_of == k].sum(1) for k in range(2)], 1))
    whole = torch.stack([products[fold_of == k].sum(0) for k in range(2)])
    contributions = (products.sum(0) - products.diagonal()) * 6 / 5 / prompts.size.sum()
    numerators, sums = others_only(whole, folds, prompts, contributions, fold_of)
    for w in range(6):
        for k in range(2):
            others = [u for u in range(6) if u % 2 == k and u != w]
            assert numerators[k, w].item() == pytest.approx(products[others, w].sum().item(), rel=1e-12)
            torch.testing.assert_close(sums[w].table[:, k], prompts.table[:, others].sum(1))
