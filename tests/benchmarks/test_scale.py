"""The benchmark of scale runs at tiny size."""

import pytest


@pytest.mark.slow
def test_peaks_and_times(run):
    _, (small, large) = run("scale", "--quick", "--max-completion-length", "4")
    for size, sequences in ((small, 300), (large, 600)):
        assert size["sequences"] == sequences
        assert 0 < size["imports"] <= size["sampled"] <= size["read"] <= size["probed"]
        assert size["delta_h1"] != 0
