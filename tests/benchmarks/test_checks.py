"""The benchmark of the checks runs at tiny size."""


def test_ratios(run):
    _, figures = run("checks", "--quick", "--rounds", "1")
    assert [f["weights"] for f in figures] == ["LoRA", "full"]
    for f in figures:
        assert 0 < f["ratio"]["layout"] + f["ratio"]["length"] < f["ratio"]["whole"]
        assert f["calls"] > 0
        assert f["tokens"] > f["calls"]
