"""The benchmark runs at tiny size, and every estimator measures the same change."""

import pytest


@pytest.mark.slow
def test_variances(run):
    printed, figures = run("realized", "--quick")
    assert "variance over that of" in printed
    for variances in figures["variance"].values():
        reference = variances["snis, surprisal"]
        assert reference["reported"] == reference["spread"] == 1
        error = reference["standard_error"]
        for name, v in variances.items():
            if name != "paired difference from the prediction":
                assert abs(v["mean"] - reference["mean"]) < 5 * error, name
