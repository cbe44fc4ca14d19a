"""The benchmark runs at tiny size; it raises if the two algorithms disagree."""

import pytest


def test_ratios(run):
    _, figures = run("one_batch", "--quick", "--rounds", "1")
    assert [f["weights"] for f in figures] == ["LoRA", "full"]
    for f in figures:
        assert f["straightforward_over_exact"] == pytest.approx(
            f["straightforward_over_training"] / f["exact_over_training"]
        )
        assert f["gradients"].startswith("one pass, gradients of 4 units kept")
