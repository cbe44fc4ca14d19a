"""An evaluation batch of another policy: biased as it is, right once reweighted, refused where it is too far off."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.func import jvp

from entropy_probe import TokenScores
from entropy_probe.analyses.realized import measure_change
from entropy_probe.estimators.first_order import entropy
from entropy_probe.estimators.importance import sequence_importance_weights, sequence_log_weights
from entropy_probe.estimators.realized import noise_floor
from entropy_probe.estimators.uncertainty import Sampled
from entropy_probe.types import Units
from tests.invariants.exact import TARGET, Setting, sampled_elsewhere, sampler_scores, scores_at
from tests.invariants.problems import TABLE, batches, numbers, probe, same
from tests.notes import texts
from tests.reference.enumeration import TinyPolicy, trained_optimizer
from tests.whole_batch import coefficients, derivatives, per_decision, predicted, snis

CASES = [
    (what, norm, kind)
    for norm in ("token", "sequence")
    for what, kind in (
        ("H", "rao_blackwell"),
        ("first_order", "rao_blackwell"),
        ("first_order", "surprisal"),
        ("snis", "surprisal"),
        ("per_decision", "rao_blackwell"),
    )
]


def weighted(scores: TokenScores, log_weights: Tensor) -> TokenScores:
    """As the probe does it: over their mean in the batch."""
    return replace(scores, log_weights=(log_weights.exp() / log_weights.exp().mean()).log())


class Other(Setting):
    """The enumerable setting, sampled by another policy."""

    def prepare(self) -> None:
        sampler = sampler_scores(self.model)
        self.base = (self.before.sequence_logprobs - sampler.sequence_logprobs).detach()
        self.probabilities = sampler.sequence_logprobs.exp() / 3

    def of(self, what: str, rows: Tensor, norm: str, kind: str, *, reweight: bool) -> Sampled:
        before, after, slope = (s.select(rows) for s in (self.before, self.after, self.slope))
        before = weighted(before, self.base[rows]) if reweight else before
        units = Units.sequences(len(rows))
        if what == "H":
            return entropy(before, units, norm, kind).ratio()
        if what == "snis":
            return snis(before, after, "snis", units, norm, kind)
        if what == "per_decision":
            return per_decision(before, after, units, norm)
        return predicted(before, slope, TABLE.rollouts.prompt_ids[rows], units, norm, kind)


@pytest.fixture(scope="module")
def other() -> Other:
    setting = Other.build()
    setting.prepare()
    effective = 1 / (setting.probabilities * setting.base.exp().square()).sum()
    assert 0.9 < effective < 0.95  # share of effective samples, in the limit
    return setting


@pytest.mark.parametrize(("what", "norm", "kind"), CASES)
def test_reweighting_removes_the_bias_and_its_error_covers(other, what, norm, kind):
    generator = torch.Generator().manual_seed(21)
    batches_of_rows = [other.draw(300, generator) for _ in range(400)]
    exact = other.exact[norm][TARGET[what]]

    def found(*, reweight: bool) -> tuple[float, float]:
        estimates = [other.of(what, rows, norm, kind, reweight=reweight) for rows in batches_of_rows]
        values = torch.tensor([e.value for e in estimates])
        errors = torch.tensor([e.standard_error for e in estimates])
        covered = ((values - exact).abs() <= 1.96 * errors).double().mean()
        return ((values.mean() - exact) / (values.std() / len(values) ** 0.5)).item(), covered.item()

    z, covered = found(reweight=True)
    assert abs(z) < 4
    assert 0.92 <= covered <= 0.98
    z, _ = found(reweight=False)
    assert abs(z) > 5, "the bias should be visible"


def test_equal_weights_are_no_weights(other):
    rows = other.draw(50, torch.Generator().manual_seed(1))
    equal = replace(other.before.select(rows), log_weights=torch.zeros(50, dtype=torch.float64))
    units = Units.prompts(torch.arange(50) // 5)
    for norm in ("token", "sequence"):
        for kind in ("rao_blackwell", "surprisal"):
            a, b = (
                coefficients(s, torch.arange(50) // 5, units, norm, kind) for s in (equal, other.before.select(rows))
            )
            assert torch.equal(a.logprobs, b.logprobs)
        a, b = (per_decision(s, other.after.select(rows), units, norm) for s in (equal, other.before.select(rows)))
        assert a.value == b.value


@pytest.mark.parametrize("norm", ["token", "sequence"])
def test_a_weight_of_three_is_a_sequence_three_times(other, norm):
    rows = other.draw(30, torch.Generator().manual_seed(2))
    times = torch.randint(1, 4, (30,), generator=torch.Generator().manual_seed(3))
    repeated = rows.repeat_interleave(times)
    once = weighted(other.before.select(rows), times.double().log())
    after = other.after.select(rows)
    for a, b in (
        (
            entropy(once, Units.sequences(30), norm).ratio(),
            entropy(other.before.select(repeated), Units.sequences(len(repeated)), norm).ratio(),
        ),
        (
            snis(once, after, "snis", Units.sequences(30), norm),
            snis(
                other.before.select(repeated),
                other.after.select(repeated),
                "snis",
                Units.sequences(len(repeated)),
                norm,
            ),
        ),
        # with the copies of a sequence as one unit the baselines are the same as well
        (
            per_decision(once, after, Units.sequences(30), norm),
            per_decision(
                other.before.select(repeated),
                other.after.select(repeated),
                Units(torch.arange(30).repeat_interleave(times), 30),
                norm,
            ),
        ),
    ):
        assert a.value == pytest.approx(b.value, rel=1e-12)
        assert a.size_change == pytest.approx(b.size_change, rel=1e-9) if hasattr(a, "size_change") else True
    c = coefficients(once, torch.arange(30), Units.sequences(30), norm)
    of_copies = coefficients(
        other.before.select(repeated),
        torch.arange(30).repeat_interleave(times),
        Units(torch.arange(30).repeat_interleave(times), 30),
        norm,
    )
    summed = torch.zeros(30, of_copies.logprobs.shape[1], dtype=torch.float64)
    summed.index_add_(0, torch.arange(30).repeat_interleave(times), of_copies.logprobs)
    torch.testing.assert_close(c.logprobs * times.double().mean(), summed, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("norm", ["token", "sequence"])
def test_surprisal_coefficients_equal_a_loop(other, norm):
    """With groups of several sequences and of one, whose baseline is the rest of the batch."""
    rows = other.draw(9, torch.Generator().manual_seed(7))
    prompts = [0, 0, 0, 1, 1, 2, 3, 3, 4]
    scores = weighted(other.before.select(rows), other.base[rows])
    v, s, t = scores.weights.tolist(), scores.sequence_logprobs.tolist(), scores.response_lengths.tolist()
    per_token = -sum(a * b for a, b in zip(v, s, strict=True)) / sum(a * b for a, b in zip(v, t, strict=True))
    x = [-s[i] - (per_token * t[i] if norm == "token" else 0.0) for i in range(9)]
    found = coefficients(scores, torch.tensor(prompts), Units.sequences(9), norm, "surprisal")
    for i in range(9):
        others = [j for j in range(9) if j != i and prompts[j] == prompts[i]] or [j for j in range(9) if j != i]
        mean = sum(v[j] * x[j] for j in others) / sum(v[j] for j in others)
        expected = v[i] * (x[i] - mean) * scores.response_mask[i].double()
        torch.testing.assert_close(found.logprobs[i], expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("norm", ["token", "sequence"])
def test_derivatives_are_those_of_the_reweighted_change(other, norm):
    """Slope and second derivative against differences of the estimate itself; the slope is the first-order change."""
    rows, eta = other.draw(40, torch.Generator().manual_seed(4)), 1e-3
    units, base = Units.sequences(40), other.base[rows]
    theta = {n: p.detach() for n, p in other.model.named_parameters()}
    generator = torch.Generator().manual_seed(3)
    direction = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in theta.items()}

    def at(x: Tensor) -> TokenScores:
        return scores_at(other, {n: theta[n] + x * direction[n] for n in theta})

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        found = at(x)
        return found.logprobs, found.entropies

    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    first = jvp(both, (zero,), (one,))[1]
    second = jvp(lambda x: jvp(both, (x,), (one,))[1], (zero,), (one,))[1]
    mask = TABLE.rollouts.response_mask
    one_, two = (TokenScores(*(x.detach() for x in d), mask).select(rows) for d in (first, second))
    before = weighted(other.before.select(rows), base)
    slope, curve = derivatives(before, one_, two, units, norm)

    def change(x: float) -> float:
        found = at(torch.tensor(x, dtype=torch.float64))
        after = TokenScores(found.logprobs.detach(), found.entropies.detach(), mask).select(rows)
        return per_decision(before, after, units, norm).value

    assert slope.value == pytest.approx((change(eta) - change(-eta)) / (2 * eta), rel=1e-4)
    assert curve.value == pytest.approx((change(eta) + change(-eta)) / eta**2, rel=1e-3)
    first_order = predicted(before, one_, TABLE.rollouts.prompt_ids[rows], units, norm)
    assert first_order.value == pytest.approx(slope.value, rel=1e-10)
    torch.testing.assert_close(first_order.influence, slope.influence, rtol=1e-9, atol=1e-12)


def test_the_product_of_weights_is_what_a_change_is_judged_by(other):
    rows = other.draw(60, torch.Generator().manual_seed(5))
    before, after = weighted(other.before.select(rows), other.base[rows]), other.after.select(rows)
    log_weights, base = sequence_log_weights(before, after)
    found = sequence_importance_weights(log_weights, base=base)
    product = (after.sequence_logprobs - before.sequence_logprobs + other.base[rows]).exp()
    assert found.ess == pytest.approx((product.sum() ** 2 / product.square().sum()).item())


@pytest.mark.parametrize("settings", [{}, {"normalization": "sequence", "realized": "snis", "entropy": "surprisal"}])
def test_the_probe_reweights(settings):
    model = TinyPolicy()
    update, _ = batches()
    given, drawn = sampled_elsewhere(model, 400)
    subject = probe(model, trained_optimizer(model), on_mismatch="reweight", **settings)
    result = subject.run(update=update, evaluation=given)
    assert any("sequences are reweighted" in m for m in texts(result.diagnostics.notes))
    assert not any("biased" in m for m in texts(result.diagnostics.notes))
    scores, sampled = drawn
    v = (scores.sequence_logprobs - sampled.sequence_logprobs).exp()
    if settings:
        expected = (v * -scores.sequence_logprobs).sum() / v.sum()
    else:
        expected = (v * scores.entropies.sum(1)).sum() / (v * scores.response_lengths).sum()
    assert result.entropy.value == pytest.approx(expected.item(), rel=1e-10)
    as_it_is = probe(model, trained_optimizer(model), **settings).run(update=update, evaluation=given)
    assert as_it_is.predicted.value != pytest.approx(result.predicted.value, rel=0.04)
    assert result.realized.ess_fraction == pytest.approx(result.diagnostics.mismatch.ess_fraction, rel=0.05)
    assert result.realized.ess_fraction < 0.95 < as_it_is.realized.ess_fraction
    # what the step does to the batch is of second order beside what it is predicted to do, weights or not
    assert abs(result.difference.value) < 0.2 * abs(result.predicted.value) + 4 * result.difference.standard_error


@pytest.mark.parametrize(
    "cut", [{"is_mode": "clip", "weight_clip": 1.2}, {"is_mode": "psis"}, {"log_weight_clamp": 0.1}], ids=str
)
def test_what_is_cut_off_the_weights_vanishes_with_the_step(cut):
    """Caps and the like act on what the step does to the weights, not on those that the batch is reweighted by."""
    model = TinyPolicy()
    update, _ = batches()
    given, _ = sampled_elsewhere(model, 400, away=0.3)
    settings = {"realized": "snis", "learning_rate": 1e-6, "on_mismatch": "reweight"} | cut
    result = probe(model, trained_optimizer(model), **settings).run(update=update, evaluation=given)
    assert result.realized.value == pytest.approx(result.predicted.value, rel=0.05)


@pytest.mark.parametrize("norm", ["token", "sequence"])
def test_what_a_small_step_leaves_of_the_difference_is_of_second_order(norm):
    """Sequence by sequence, so the errors of both changes are the same to first order."""
    model = TinyPolicy()
    update, _ = batches()
    given, _ = sampled_elsewhere(model, 200)
    settings = {"normalization": norm, "learning_rate": 1e-6, "on_mismatch": "reweight"}
    result = probe(model, trained_optimizer(model), **settings).run(update=update, evaluation=given)
    assert result.difference.standard_error < 1e-4 * result.realized.standard_error
    assert abs(result.difference.value) < 1e-4 * abs(result.predicted.value)


def test_rounding_averages_out_over_the_effective_sequences(monkeypatch):
    """And is seen with the baselines of the whole batch."""
    model = TinyPolicy()
    update, _ = batches()
    given, _ = sampled_elsewhere(model, 200)
    numbers_of_sequences, tokens = [], []

    def floor(spurious, number):
        numbers_of_sequences.append(number)
        return noise_floor(spurious, number)

    def change(*args):
        tokens.append(args[3].reaching.sum().item())
        return measure_change(*args)

    monkeypatch.setattr("entropy_probe.analyses.noise.noise_floor", floor)
    monkeypatch.setattr("entropy_probe.analyses.noise.measure_change", change)
    result = probe(model, trained_optimizer(model), on_mismatch="reweight").measure(update=update, evaluation=given)
    assert numbers_of_sequences == [pytest.approx(200 * result.diagnostics.mismatch.ess_fraction)]
    assert set(tokens) == {float(given.response_mask.sum())}


def test_the_fallback_smooths_what_the_step_does_to_the_weights():
    model = TinyPolicy()
    update, _ = batches()
    update = replace(update, advantages=-10 * update.advantages)
    given, _ = sampled_elsewhere(model, 400, away=0.3)
    settings = {"learning_rate": 1e-5, "max_grad_norm": None, "on_mismatch": "reweight"}
    plain = probe(model, trained_optimizer(model), **settings).run(update=update, evaluation=given)
    between = (plain.realized.ess_fraction + plain.diagnostics.mismatch.ess_fraction) / 2
    assert plain.realized.ess_fraction < between
    settings |= {"on_low_ess": "psis", "min_ess_fraction": between}
    smoothed = probe(model, trained_optimizer(model), **settings).run(update=update, evaluation=given)
    assert smoothed.realized.estimator == "psis"
    assert smoothed.realized.value == pytest.approx(plain.realized.value, rel=0.05)


def test_a_batch_of_the_policy_itself_is_left_alone():
    model = TinyPolicy()
    update, _ = batches()
    given, _ = sampled_elsewhere(model, 60, away=0.0)
    results = [
        probe(model, trained_optimizer(model), on_mismatch=what).run(update=update, evaluation=given)
        for what in ("reweight", "report")
    ]
    same(*map(numbers, results), rel=1e-15)


def test_what_cannot_be_reweighted_is_refused():
    model = TinyPolicy()
    update, evaluation = batches()
    subject = probe(model, trained_optimizer(model), on_mismatch="reweight")
    with pytest.raises(ValueError, match=r"expected sampled_logprobs in the rollouts, got none; record"):
        subject.run(update=update, evaluation=evaluation)
    with pytest.raises(ValueError, match=r"to reweight it, expected an effective sample size of at least 50% .* got "):
        subject.predict(update=update, evaluation=sampled_elsewhere(model, 200, away=1.0)[0])
    grouped = replace(sampled_elsewhere(model, 200)[0], prompt_ids=torch.arange(200) // 4, advantages=torch.ones(200))
    with pytest.raises(ValueError, match=r"one batch: expected rollouts of the policy itself, got those of another"):
        subject.cross_prompt(grouped)
