"""The benchmark runs at tiny size."""


def test_ratios(run):
    _, figures = run("sweep", "--quick", "--rounds", "1")
    assert [f["weights"] for f in figures] == ["LoRA", "full"]
    for f in figures:
        # twelve scorings and a prediction cost more than one gradient
        assert 1 < f["ratio_min"] <= f["ratio"] <= f["ratio_max"]
        assert f["ratio_with_direct_curvature"] > f["ratio"]
