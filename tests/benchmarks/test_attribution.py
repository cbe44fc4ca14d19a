"""The benchmark runs at tiny size."""


def test_ratios(run):
    _, figures = run("attribution", "--quick", "--rounds", "1")
    assert [f["weights"] for f in figures] == ["LoRA", "full"]
    for f in figures:
        assert f["method"] == "forward-mode"
        assert f["probe"] > 0
        assert f["sum_error"] < 1e-5
