"""Student's t against scipy's, and the degrees of freedom of combined errors."""

import pytest
from scipy.special import stdtrit

from entropy_probe.results.probe import Estimate
from entropy_probe.results.student import combined_degrees, critical_value, degrees_of


@pytest.mark.parametrize("degrees", [0.5, 1, 1.7, 2, 9, 19, 99, 2047, 1e5, 1e7])
def test_critical_values(degrees):
    assert critical_value(degrees) == pytest.approx(stdtrit(degrees, 0.975), rel=1e-9)


def test_no_degree_of_freedom_is_refused():
    with pytest.raises(ValueError, match="expected a standard error from at least 2 independent clusters, got 1"):
        critical_value(0)


@pytest.mark.parametrize("clusters", [3, 10, 400])
def test_skew_clusters_have_fewer_degrees_of_freedom(clusters):
    by_chance = 6 * (clusters - 2) / ((clusters + 1) * (clusters + 3))
    assert degrees_of(clusters, 0.0) == clusters - 1
    assert degrees_of(clusters, 0.999 * by_chance**0.5) == clusters - 1
    t, square = stdtrit(clusters - 1, 0.975), 0.9
    expected = t * (1 + t**2 * square / (4 * clusters)) ** 0.5
    for sign in (1, -1):
        degrees = degrees_of(clusters, sign * (square + by_chance) ** 0.5)
        assert degrees < clusters - 1
        assert stdtrit(degrees, 0.975) == pytest.approx(expected, rel=1e-5)


def test_combined_degrees():
    assert combined_degrees([(1.0, 7), (0.0, 3)]) == 7
    assert combined_degrees([(0.0, 7), (0.0, 3)]) == 3
    assert combined_degrees([(2.0, 7), (2.0, 7)]) == pytest.approx(14)
    a, b = 0.3e-200, 0.4e-200
    assert combined_degrees([(a, 9), (b, 4)]) == pytest.approx(0.25**2 / (0.09**2 / 9 + 0.16**2 / 4))


def test_intervals_of_estimates():
    few = Estimate(value=-2.0, standard_error=1.0, num_clusters=10, unit="nats/token")
    assert few.interval == pytest.approx((-2 - stdtrit(9, 0.975), -2 + stdtrit(9, 0.975)))
    assert not few.distinguishable
    assert few.model_copy(update={"num_clusters": 400}).distinguishable
    assert few.model_copy(update={"degrees_of_freedom": 200.0}).distinguishable
