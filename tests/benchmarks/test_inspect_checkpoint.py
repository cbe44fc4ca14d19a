"""The benchmark runs at tiny size; it raises if its checkpoints are not usable."""


def test_ratios(run):
    _, figures = run("inspect_checkpoint", "--quick", "--rounds", "1")
    assert [(f["weights"], f["manifest"], f["tensors"]) for f in figures] == [
        ("full", False, 51),
        ("full", True, 51),
        ("LoRA", False, 42),
    ]
    assert all(f["smallest"] <= f["inspect_over_load"] <= f["largest"] for f in figures)
