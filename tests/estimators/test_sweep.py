"""Fits and the linear range, on curves whose answers are known."""

import pytest
import torch

from entropy_probe.estimators.sweep import Coefficient, Quadratic, cancelling_rate, linear_range, power_law, quadratic

RATES = torch.tensor([1e-5, 3e-5, 1e-4, 3e-4, 1e-3], dtype=torch.float64)


def noise(k: int = len(RATES), clusters: int = 50) -> torch.Tensor:
    return torch.randn(k, clusters, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_a_quadratic_is_recovered_exactly():
    fit = quadratic(RATES, -9.0 * RATES + 570.0 * RATES**2, noise())
    assert fit.linear.value == pytest.approx(-9.0, rel=1e-12)
    assert fit.quadratic.value == pytest.approx(570.0, rel=1e-10)
    assert fit.r_squared == pytest.approx(1.0, abs=1e-12)
    star = cancelling_rate(fit)
    assert star is not None
    assert star.value == pytest.approx(9.0 / 570.0, rel=1e-10)


def test_the_quadratic_is_the_least_squares_one():
    """Against the normal equations, solved by another route."""
    y = -9.0 * RATES + 570.0 * RATES**2 + 1e-5 * noise(clusters=1)[:, 0]
    design = torch.stack([RATES, RATES**2], 1)
    expected = torch.linalg.lstsq(design, y).solution
    fit = quadratic(RATES, y, noise())
    assert [fit.linear.value, fit.quadratic.value] == pytest.approx(expected.tolist(), rel=1e-7)
    residual = y - design @ expected
    assert fit.r_squared == pytest.approx(1 - float(residual.square().sum() / y.square().sum()), rel=1e-12)
    assert fit.r_squared < 1


def test_rounding_of_every_change_is_part_of_the_error():
    """Over many draws of independent rounding the coefficients scatter as their errors say."""
    exact, size = -9.0 * RATES + 570.0 * RATES**2, 1e-6
    silent = torch.zeros(len(RATES), 50, dtype=torch.float64)
    fits = [quadratic(RATES, exact + size * row, silent) for row in noise(clusters=2000).T]
    for name in ("linear", "quadratic"):
        found = [getattr(fit, name) for fit in fits]
        scatter = torch.tensor([f.value for f in found]).std().item()
        assert found[0].error(size) == pytest.approx(scatter, rel=0.08)
        assert found[0].error(0.0) == found[0].standard_error == 0
    stars = [cancelling_rate(fit) for fit in fits]
    scatter = torch.tensor([star.value for star in stars]).std().item()
    assert cancelling_rate(quadratic(RATES, exact, silent)).error(size) == pytest.approx(scatter, rel=0.08)


def test_errors_come_from_influences_and_not_from_scatter():
    """Noise that all rates share moves the whole curve: it does not scatter about the fit, yet it is an error.

    The influences are those of ``a_u lr + b_u lr^2`` with known spread of a and b over units.
    """
    a, b = noise(2)
    influences = a * RATES[:, None] + 50 * b * RATES[:, None] ** 2
    fit = quadratic(RATES, -9.0 * RATES + 570.0 * RATES**2, influences)
    assert fit.linear.standard_error == pytest.approx(float(a.std() / 50**0.5), rel=1e-9)
    assert fit.quadratic.standard_error == pytest.approx(50 * float(b.std() / 50**0.5), rel=1e-9)
    star = cancelling_rate(fit)
    assert star is not None
    rate = 9.0 / 570.0
    assert star.standard_error == pytest.approx(float((a + rate * 50 * b).std() / 50**0.5 / 570.0), rel=1e-9)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_power_is_recovered_exactly(sign):
    y = sign * 3.0 * RATES**1.02
    law = power_law(RATES, y, noise() * y[:, None])
    assert law is not None
    assert law.slope.value == pytest.approx(1.02, rel=1e-12)
    assert law.r_squared == pytest.approx(1.0, abs=1e-12)
    x = RATES.log() - RATES.log().mean()
    expected = (x / x.square().sum()) @ noise()
    assert law.slope.standard_error == pytest.approx(float(expected.std() / 50**0.5), rel=1e-12)


def test_changes_of_both_signs_have_no_power():
    y = RATES - 2e-4
    assert power_law(RATES, y, noise()) is None
    assert power_law(RATES, torch.zeros_like(y), noise()) is None


@pytest.mark.parametrize(("a", "b"), [(-9.0, -570.0), (9.0, 570.0), (-9.0, 0.0), (0.0, 570.0)])
def test_parts_of_one_sign_never_cancel(a, b):
    influence, weights = torch.ones(4, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    parts = (Coefficient(x, influence, weights) for x in (a, b))
    assert cancelling_rate(Quadratic(*parts, 1.0)) is None


@pytest.mark.parametrize(
    ("rates", "match"),
    [
        ([1e-5, 1e-4], r"expected at least 3, positive and increasing, got \["),
        ([1e-5, 1e-3, 1e-4], "increasing"),
        ([0.0, 1e-5, 1e-4], "positive"),
    ],
)
def test_unusable_rates(rates, match):
    rates = torch.tensor(rates, dtype=torch.float64)
    for fit in (quadratic, power_law):
        with pytest.raises(ValueError, match=match):
            fit(rates, rates, noise(len(rates)))


def found(gaps, errors=None, measured=None, predicted=-1.0):
    """The linear range for predictions of one size and given relative gaps."""
    k = len(gaps)
    p = torch.full((k,), predicted, dtype=torch.float64)
    e = torch.tensor(errors or [0.0] * k, dtype=torch.float64)
    return linear_range(p, e, p + torch.tensor(gaps, dtype=torch.float64), torch.tensor(measured or [True] * k))


def test_linear_range_rule():
    assert found([0.0, 0.05, -0.0999, 0.11, 0.2]) == 2
    assert found([0.0, 0.05, 0.09]) == 2
    assert found([0.11, 0.05, 0.01]) is None
    # all smaller rates have to comply
    assert found([0.0, 0.2, 0.0, 0.0]) == 0
    # a tenth of the standard error, where that is larger
    assert found([0.3, 0.3, 0.3], errors=[4.0, 3.01, 2.9]) == 1
    assert found([0.01, 0.3], errors=[0.01, 0.01]) == 0
    # a change predicted to be 0 is within its error or not at all
    assert found([0.05, 0.2], errors=[1.0, 1.0], predicted=0.0) == 0


def test_rates_without_a_measurement_do_not_comply_except_below_the_first_with_one():
    assert found([0.0, 0.0, 0.0, 0.0], measured=[True, True, False, True]) == 1
    assert found([9.0, 0.0, 0.0, 0.2], measured=[False, True, True, True]) == 2
    assert found([0.0, 0.0], measured=[False, False]) is None
