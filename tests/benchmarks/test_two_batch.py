"""The benchmark runs at tiny size, and its figures are of the kind they claim to be."""

import pytest


def test_cost(run):
    printed, figures = run("two_batch", "--quick", "--only", "lora", "full")
    assert "LoRA" in printed
    assert "full weights" in printed
    for kind, per_unit in (("lora", "linear-layer hooks"), ("full", "hooks")):
        cost = figures[kind]
        assert cost["per_sample_gradients"].startswith(per_unit)
        assert cost["head"] == "chunked"
        assert cost["ratio"] == pytest.approx(cost["probe_seconds"] / cost["training_seconds"])
        assert cost["ratio_min"] <= cost["ratio_max"]
        assert cost["ratio"] > 1  # the probe takes a training gradient and more
        shares = cost["shares"]
        assert shares.keys() == {
            "score evaluation",
            "update gradient",
            "evaluation gradient",
            "length gradient",
            "update error",
            "noise floor",
            "score after step",
            "rest",
        }
        assert sum(shares.values()) == pytest.approx(1, abs=0.1)  # medians of shares, so only about 1
    assert figures["full"]["num_trained"] > figures["lora"]["num_trained"]


@pytest.mark.slow
def test_memory(run):
    printed, figures = run("two_batch", "--quick", "--only", "memory")
    assert "Peak memory" in printed
    memory = figures["memory"]
    assert memory["fills_a_microbatch"]
    for kind in ("stored", "second_pass"):
        small, large = memory[kind]["sizes"]
        assert large["num_sequences"] == 8 * small["num_sequences"]
        for size in (small, large):
            assert 0 < size["imports"] < size["ready"] <= size["probe"]
        assert memory[kind]["growth"] == pytest.approx(large["probe"] / small["probe"] - 1)


@pytest.mark.slow
def test_variance(run):
    printed, figures = run("two_batch", "--quick", "--only", "variance")
    assert "Variance ratios" in printed
    variance = figures["variance"]
    for ratio in variance["variance_ratios"].values():
        assert ratio["reported_min"] <= ratio["reported"] <= ratio["reported_max"]
        low, high = ratio["empirical_interval"]
        assert 0 < low < high
    # the paired difference is of second order in the step
    assert variance["variance_ratios"]["paired_difference_of_delta_h"]["reported_max"] < 0.1
    estimates = variance["estimates"]
    ours, reference = estimates["delta_h ours"], estimates["delta_h reference"]
    assert abs(ours["mean"] - reference["mean"]) < 4 * reference["first_standard_error"]
