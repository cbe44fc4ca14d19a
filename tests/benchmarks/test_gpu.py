"""The GPU benchmark runs at tiny size on the CPU, and writes its section of a file and nothing else of it."""

import pytest

PHASES = [
    "score evaluation",
    "update gradient",
    "evaluation gradient",
    "length gradient",
    "update error",
    "score after step",
    "noise floor",
]
FILE = """# Benchmark results

First words.

## GPU

Old figures.

## Scale

| a | b |
|---|---|
"""


@pytest.mark.parametrize("precision", ["bfloat16", pytest.param("autocast", marks=pytest.mark.slow)])
def test_figures_and_section(run, tmp_path, precision):
    results = tmp_path / "RESULTS.md"
    results.write_text(FILE)
    printed, found = run(
        "gpu", "--size", "tiny", "--rounds", "1", "--precision", precision, "--results", str(results), "--device", "cpu"
    )
    figures = found["figures"]
    assert figures["ratio"] == pytest.approx(figures["probe_seconds"] / figures["training_seconds"])
    assert figures["per_sample_gradients"] == "linear-layer hooks"
    assert sorted(figures["phases"]) == sorted(PHASES)
    shares = [phase["share_of_time"] for phase in figures["phases"].values()]
    assert all(share > 0 for share in shares)
    assert sum(shares) <= 1
    # products of each phase: a backward pass takes about as many as a forward pass, and those of the adapters
    work = {name: phase["share_of_rate"] * phase["share_of_time"] for name, phase in figures["phases"].items()}
    assert 0 < work["score after step"] <= work["score evaluation"]
    assert 1.5 <= work["evaluation gradient"] / work["score after step"] <= 4
    assert figures["training_share_of_rate"] > 0
    assert figures["peak"] == 0  # the CPU keeps no account of it
    text = results.read_text()
    assert "Old figures" not in text
    before, after = FILE.split("## GPU\n\nOld figures.\n")
    assert text.startswith(before + "## GPU\n")
    assert text.endswith(after)
    assert text.split(before)[1].split(after)[0].strip() in printed.strip()
    assert {path.name for path in tmp_path.iterdir()} == {"RESULTS.md", "figures.json"}
