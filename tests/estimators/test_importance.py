"""Importance weights: raw, capped, Pareto-smoothed, and the diagnosis of their tail."""

import numpy as np
import pytest
import torch

from entropy_probe import ProbeConfig, TokenScores
from entropy_probe.analyses.realized import measure_change
from entropy_probe.estimators.baselines import PositionSums
from entropy_probe.estimators.first_order import entropy
from entropy_probe.estimators.importance import sequence_importance_weights
from entropy_probe.estimators.realized import change, noise_floor, rounding_of
from entropy_probe.estimators.uncertainty import Sampled
from entropy_probe.parallel.batch import LocalRows
from entropy_probe.types import Clusters
from tests.whole_batch import per_decision, snis


def scores(total, entropies=None) -> TokenScores:
    total = torch.as_tensor(total, dtype=torch.float64)
    logprobs = torch.zeros(len(total), 3, dtype=torch.float64)
    logprobs[:, 1] = total
    h = torch.ones_like(logprobs) if entropies is None else entropies[:, None].expand(-1, 3)
    mask = torch.tensor([[0, 1, 1]] * len(total)).bool()
    return TokenScores(logprobs, h * mask, mask)


def pareto(k: float, n: int, seed: int = 0) -> torch.Tensor:
    """Log-weights whose tail has shape ``k``."""
    return torch.from_numpy(np.log1p(np.random.default_rng(seed).pareto(1 / k, n)))


def weights(log_weights, mode="snis", **options):
    log_weights = torch.as_tensor(log_weights, dtype=torch.float64)
    return sequence_importance_weights(log_weights, mode, **options)


def test_extreme_steps_stay_finite():
    got = weights([2000.0, 2000.0])
    assert got.normalized.tolist() == [1.0, 1.0]
    assert got.ess == pytest.approx(2.0)
    got = weights([-3000.0, -2000.0, -3000.0])
    assert got.ess == pytest.approx(1.0)
    assert got.max_weight == pytest.approx(3.0)
    with pytest.raises(ValueError, match="finite log-probabilities"):
        weights([float("inf")])
    with pytest.raises(ValueError, match="far beyond the reach of importance sampling"):
        per_decision(scores([0.0, 0.0]), scores([2000.0, 0.0]), Clusters.sequences(2))


@pytest.mark.parametrize("k", [0.3, 0.6, 0.9])
def test_pareto_k_is_that_of_the_large_weights(k):
    got = [weights(pareto(k, 4000, seed)).pareto_k for seed in range(8)]
    assert np.mean(got) == pytest.approx(k, abs=0.12)
    # the other tail, of the small weights, is bounded
    assert max(weights(-pareto(k, 4000, seed)).pareto_k for seed in range(8)) < 0


def test_threshold_depends_on_the_sample_size():
    assert weights(torch.zeros(100)).pareto_k_threshold == pytest.approx(0.5)
    assert weights(torch.zeros(10_000)).pareto_k_threshold == pytest.approx(0.7)
    assert weights(pareto(0.9, 4000)).heavy_tailed
    assert not weights(pareto(0.3, 4000)).heavy_tailed
    # the same shape of tail in weights that all but agree does no harm
    assert weights(1e-3 * pareto(0.9, 4000)).pareto_k == pytest.approx(0.5, abs=0.6)
    assert not weights(torch.log1p(1e-6 * pareto(0.9, 4000).exp())).heavy_tailed


@pytest.mark.parametrize(
    "log_weights",
    [torch.zeros(500), torch.randn(24), torch.tensor([0.0, 1.0]).repeat(200), torch.tensor([3.0] + [0.0] * 1999)],
    ids=["equal", "few", "two values", "one outlier"],
)
def test_where_there_is_no_tail_to_fit_there_is_no_k(log_weights):
    assert weights(log_weights).pareto_k is None
    assert not weights(log_weights).heavy_tailed
    if len(log_weights) >= 25:
        assert torch.allclose(weights(log_weights, "psis").normalized, weights(log_weights).normalized)


def test_smoothing_keeps_the_order_and_tames_the_largest_weights():
    log_weights = pareto(0.6, 1000)
    raw, smooth = weights(log_weights), weights(log_weights, "psis")
    assert torch.equal(raw.normalized.argsort(), smooth.normalized.argsort())
    assert smooth.normalized.mean() == pytest.approx(1.0)
    assert (smooth.ess, smooth.max_weight, smooth.pareto_k) == (raw.ess, raw.max_weight, raw.pareto_k)

    def error(mode: str) -> float:
        """Of the mean of a bounded function, over many samples of weights with infinite variance."""
        found = []
        for seed in range(200):
            x = pareto(0.7, 400, seed)
            w = weights(x, mode).normalized
            # the second half of the log-weight's range has the function's value 1
            found.append((w * (x > 1.0)).mean().item())
        return float(np.std(found))

    assert error("psis") < 0.95 * error("snis")
    with pytest.raises(ValueError, match="at least 25 evaluation sequences"):
        weights(torch.randn(24), "psis")


@pytest.mark.parametrize("options", [{"mode": "clip", "weight_clip": 1.5}, {"mode": "clip"}, {"log_weight_clamp": 0.4}])
def test_a_base_of_three_is_a_weight_three_times(options):
    g = torch.Generator().manual_seed(4)
    x, times = 3 * torch.randn(12, generator=g, dtype=torch.float64), torch.randint(1, 4, (12,), generator=g)
    once = weights(x, base=times.double().log(), **options)
    copies = weights(x.repeat_interleave(times), **{"weight_clip": 12**0.5 if "mode" in options else None, **options})
    summed = torch.zeros(12, dtype=torch.float64)
    summed.index_add_(0, torch.arange(12).repeat_interleave(times), copies.normalized)
    torch.testing.assert_close(once.normalized * times.double().mean(), summed)


def test_caps_and_clamps():
    log_weights = torch.tensor([0.0] * 99 + [5.0])
    raw = weights(log_weights)
    expected = raw.normalized.clamp(max=10.0)
    assert torch.allclose(weights(log_weights, "clip").normalized, expected / expected.mean())
    expected = raw.normalized.clamp(max=2.0)
    assert torch.allclose(weights(log_weights, "clip", weight_clip=2.0).normalized, expected / expected.mean())
    assert torch.allclose(
        weights(log_weights, log_weight_clamp=1.5).normalized, weights(log_weights.clamp(-1.5, 1.5)).normalized
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"is_mode": "psis"}, "is_mode: expected realized: snis beside it, got per_decision"),
        ({"log_weight_clamp": 3.0}, "log_weight_clamp: expected realized: snis"),
        ({"realized": "snis", "weight_clip": 3.0}, "weight_clip: expected is_mode: clip"),
        ({"weight_clip": 0.5}, "greater than or equal to 1"),
    ],
)
def test_options_that_would_change_nothing_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        ProbeConfig(**settings)


def measure(before, after, resample=None, **settings):
    local = LocalRows.whole(Clusters.sequences(len(before.response_mask)))
    return measure_change(before, after, local, PositionSums.of(before), ProbeConfig(**settings), resample=resample)


def batch(log_weights):
    generator = torch.Generator().manual_seed(1)
    h = torch.rand(len(log_weights), generator=generator, dtype=torch.float64)
    return scores(torch.zeros(len(log_weights)), h), scores(log_weights, h + 0.1)


LIGHT = 1.3 * torch.randn(2000, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
"""Few effective samples, but a tail that smoothing can handle."""
HEAVY = pareto(1.2, 2000)


@pytest.mark.parametrize(
    ("log_weights", "settings", "estimator", "diagnosis", "measured"),
    [
        (0.1 * LIGHT, {}, "per_decision", "ok", True),
        (0.1 * LIGHT, {"realized": "snis"}, "snis", "ok", True),
        (0.1 * LIGHT, {"realized": "snis", "is_mode": "clip"}, "clip", "ok", True),
        (0.1 * LIGHT, {"realized": "snis", "is_mode": "psis"}, "psis", "ok", True),
        (LIGHT, {}, "per_decision", "low_ess", False),
        (LIGHT, {"min_ess_fraction": 0.0}, "per_decision", "ok", True),
        (LIGHT, {"on_low_ess": "psis"}, "psis", "low_ess", True),
        (LIGHT, {"realized": "snis", "is_mode": "psis"}, "psis", "ok", True),
        (LIGHT, {"on_low_ess": "resample"}, "resampled", "low_ess", True),
        (HEAVY, {"min_ess_fraction": 0.0}, "per_decision", "high_pareto_k", False),
        (HEAVY, {"on_low_ess": "psis"}, "psis", "high_pareto_k", False),
        (HEAVY, {"realized": "snis", "is_mode": "psis"}, "psis", "high_pareto_k", False),
        (HEAVY, {"on_low_ess": "resample"}, "resampled", "high_pareto_k", True),
    ],
)
def test_the_path_that_produced_the_number_is_named(log_weights, settings, estimator, diagnosis, measured):
    before, after = batch(log_weights)
    clusters = Clusters.sequences(len(log_weights))
    found = measure(before, after, resample=lambda: after, **settings)
    assert (found.estimator, found.diagnosis, found.change is not None) == (estimator, diagnosis, measured)
    assert (found.note is None) == (diagnosis == "ok")
    record = found.report(clusters, "nats/token", None, "evaluation")
    assert (record.value is None) == (record.estimate is None) == (not measured)
    assert record.status == ("ok" if measured else diagnosis)
    if not measured:
        assert "no realized change is given" in found.note.text
        return
    expected = {
        "per_decision": lambda: per_decision(before, after, clusters),
        "resampled": lambda: change(entropy(after, clusters), entropy(before, clusters)),
    }.get(
        estimator,
        lambda: snis(before, after, estimator, clusters),
    )()
    assert record.value == expected.value
    assert record.standard_error == expected.standard_error


def test_few_sequences_are_refused_where_smoothing_has_no_tail_to_fit():
    before, after = batch(torch.tensor([0.0] * 9 + [6.0]))
    found = measure(before, after, on_low_ess="psis")
    assert (found.change, found.diagnosis) == (None, "low_ess")


def test_rounding_of_opposite_moves_is_that_of_one_change():
    g = torch.Generator().manual_seed(0)
    here, there, opposite, move = torch.randn(4, 5000, generator=g, dtype=torch.float64)
    pair = [Sampled(0.0, 100 * move + there - here), Sampled(0.0, -100 * move + opposite - here)]
    assert rounding_of(*pair).influence.std() == pytest.approx((there - here).std().item(), rel=0.05)
    assert rounding_of(Sampled(5.0, move), Sampled(-2.0, move)).value == pytest.approx(3 / 3**0.5)


def test_noise_floor_separates_systematic_from_random_rounding():
    generator = torch.Generator().manual_seed(3)
    influence = torch.randn(16, generator=generator, dtype=torch.float64)
    influence -= influence.mean()
    random = [Sampled(0.0, influence), Sampled(0.0, influence)]
    assert noise_floor(random, 1600) == pytest.approx(2 * influence.std().item() / 40)
    assert noise_floor(random, 400) == pytest.approx(2 * noise_floor(random, 1600))
    # means as large as such a spread leaves them
    by_chance = [Sampled(0.9 * influence.std().item() / 4, influence)] * 2
    assert noise_floor(by_chance, 1600) == pytest.approx(noise_floor(random, 1600))
    assert noise_floor([Sampled(10.0, influence), Sampled(-10.0, influence)], 10**9) == pytest.approx(20.0, rel=0.01)
    before, after = batch(torch.zeros(30))
    found = measure(before, after)
    value = found.change.value
    assert found.report(Clusters.sequences(30), "nats/token", abs(value), "evaluation").status == "below_noise_floor"
    assert found.report(Clusters.sequences(30), "nats/token", abs(value) / 2, "evaluation").status == "ok"
