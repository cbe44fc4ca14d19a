from __future__ import annotations

import random

import pytest

from entropy_probe.report.numbers import common_exponent, format_estimate, format_number, format_percent


@pytest.mark.parametrize(
    ("value", "standard_error", "expected"),
    [
        (-1.4321e-3, 0.0812e-3, "-1.432e-3 ± 0.081e-3"),
        (-1.4321e-3, 0.12e-3, "-1.43e-3 ± 0.12e-3"),
        (0.8421, 0.0123, "0.842 ± 0.012"),
        (99.96, 0.5, "99.96 ± 0.50"),
        (12345.6, 321.0, "12350 ± 320"),
        (123456.0, 1234.0, "1.235e5 ± 0.012e5"),
        # an error that rounds up to the next power of ten
        (0.0, 0.0996, "0.00 ± 0.10"),
        (9.996e-3, 9.99e-6, "9.996e-3 ± 0.010e-3"),
        # a value lost in its error has no sign
        (-1e-9, 1e-3, "0.0e-3 ± 1.0e-3"),
        (1.5, 0.0, "1.500 ± 0"),
        (0.0, 0.0, "0 ± 0"),
        # no digits of mere rounding
        (-0.5e-3, 1e-18, "-5.000000e-4 ± 1.0e-18"),
        (3e-320, 1e-320, "3.0e-320 ± 1.0e-320"),
    ],
)
def test_value_and_error_share_digits(value, standard_error, expected):
    assert format_estimate(value, standard_error) == expected


@pytest.mark.parametrize(
    ("value", "standard_error", "expected"),
    [
        (-5.2e-4, 0.3e-4, "-0.520e-3 ± 0.030e-3"),
        (-5.2e-5, 0.3e-5, "-0.0520e-3 ± 0.0030e-3"),
        (-5.2e-6, 0.3e-6, "-5.20e-6 ± 0.30e-6"),
        (-5.2e-2, 0.3e-2, "-0.0520 ± 0.0030"),
    ],
)
def test_a_column_shares_an_exponent_unless_a_number_is_far_below(value, standard_error, expected):
    assert format_estimate(value, standard_error, exponent=-3) == expected


def test_printed_numbers_are_the_numbers():
    source = random.Random(0)
    for _ in range(2000):
        error = 10 ** source.uniform(-12, 6)
        value = error * source.choice([-1, 1]) * 10 ** source.uniform(-3, 5)
        exponent = source.choice([None, common_exponent(value, error)])
        printed_value, printed_error = format_estimate(value, error, exponent).split(" ± ")
        assert float(printed_error) == pytest.approx(error, rel=0.0501)
        assert abs(float(printed_value) - value) <= 0.0501 * error


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.0, "0"),
        (0.99996, "1.00"),
        (-12.3456, "-12.3"),
        (0.00999, "9.99e-3"),
        (99999.9, "1.00e5"),
        (1.6e-6, "1.60e-6"),
    ],
)
def test_single_numbers(value, expected):
    assert format_number(value) == expected


@pytest.mark.parametrize(
    ("fraction", "expected"), [(1.0, "100%"), (0.99999, "99.9%"), (0.9832, "98.3%"), (0.004, "0.4%"), (0.0, "0%")]
)
def test_percentages_reach_100_only_exactly(fraction, expected):
    assert format_percent(fraction) == expected


def test_common_exponent_is_that_of_the_largest_as_printed():
    assert common_exponent(-1.4e-3, 5e-4, 0.0) == -3
    assert common_exponent(9.999e-4) == -3
    assert common_exponent(0.0) is None
