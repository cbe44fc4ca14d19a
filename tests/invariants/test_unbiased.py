"""Estimates against exact sums over all responses: bias within error, intervals that cover."""

import pytest
import torch
from torch import Tensor
from torch.func import jvp

from entropy_probe import TokenScores
from entropy_probe.estimators.first_order import entropy
from entropy_probe.types import Units
from tests.invariants.exact import TARGET, Bound, Setting
from tests.whole_batch import per_decision, predicted


@pytest.fixture(scope="module")
def setting() -> Setting:
    return Setting.build()


CASES = [
    (what, norm, kind)
    for what in TARGET
    for norm in ("token", "sequence")
    for kind in ("rao_blackwell", "surprisal")
    if not (what == "per_decision" and kind == "surprisal")
]


def repeat(setting: Setting, what: str, norm: str, kind: str, n: int, batches: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = [setting.estimate(what, setting.draw(n, generator), norm, kind) for _ in range(batches)]
    return torch.tensor([f.value for f in found]), torch.tensor([f.standard_error for f in found])


@pytest.mark.parametrize(("what", "norm", "kind"), CASES)
def test_unbiased_and_covering(setting, what, norm, kind):
    values, errors = repeat(setting, what, norm, kind, n=200, batches=500, seed=11)
    exact = setting.exact[norm][TARGET[what]]
    z = (values.mean() - exact) / (values.std() / len(values) ** 0.5)
    assert abs(z) < 4, f"mean {values.mean():.6f}, exact {exact:.6f}"
    covered = ((values - exact).abs() <= 1.96 * errors).double().mean()
    assert 0.92 <= covered <= 0.98
    assert values.std() / abs(exact) < 2, "too noisy to see a bias"


@pytest.mark.slow
@pytest.mark.parametrize(("what", "norm", "kind"), CASES)
def test_unbiased_and_covering_long(setting, what, norm, kind):
    values, errors = repeat(setting, what, norm, kind, n=600, batches=10_000, seed=12)
    exact = setting.exact[norm][TARGET[what]]
    assert abs(values.mean() - exact) < 4 * values.std() / len(values) ** 0.5 + 0.3 * values.std() / 600**0.5
    assert 0.935 <= ((values - exact).abs() <= 1.96 * errors).double().mean() <= 0.965


@pytest.mark.parametrize("what", ["first_order", "per_decision"])
def test_sequence_estimates_have_no_bias_even_in_tiny_batches(setting, what):
    values, _ = repeat(setting, what, "sequence", "rao_blackwell", n=4, batches=4000, seed=13)
    z = (values.mean() - setting.exact["sequence"][TARGET[what]]) / (values.std() / len(values) ** 0.5)
    assert abs(z) < 4


@pytest.mark.parametrize(("what", "norm"), [("H", "token"), ("snis", "sequence")])
def test_ratio_bias_shrinks_with_the_batch(setting, what, norm):
    exact = setting.exact[norm][TARGET[what]]
    small, _ = repeat(setting, what, norm, "rao_blackwell", n=3, batches=6000, seed=14)
    large, _ = repeat(setting, what, norm, "rao_blackwell", n=12, batches=6000, seed=15)
    bias_small, error = small.mean() - exact, small.std() / len(small) ** 0.5
    bias_large = large.mean() - exact
    assert abs(bias_small) > 4 * error, "the bias should be visible at n = 3"
    assert abs(bias_large) < 0.5 * abs(bias_small)


def test_same_prompt_groups_need_prompt_units(setting):
    """Responses of one prompt are correlated: with prompts as units the interval covers, with sequences it is short."""
    generator = torch.Generator().manual_seed(16)
    exact, covered = setting.exact["sequence"]["H"], {"prompt": 0, "sequence": 0}
    for _ in range(400):
        rows = setting.table.sample_groups(setting.model, 40, 8, generator)
        groups = torch.arange(40).repeat_interleave(8)
        scores = setting.before.select(rows)
        for name, units in (("prompt", Units.prompts(groups)), ("sequence", Units.sequences(320))):
            found = entropy(scores, units, "sequence").ratio()
            covered[name] += abs(found.value - exact) <= 1.96 * found.standard_error
    assert 0.91 <= covered["prompt"] / 400 <= 0.98
    assert covered["sequence"] / 400 < 0.9


def test_per_decision_becomes_the_first_order_sequence_by_sequence(setting):
    model, table = setting.model, setting.table
    generator = torch.Generator().manual_seed(17)
    rows = setting.draw(64, generator)
    theta = {n: p.detach() for n, p in model.named_parameters()}
    direction = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in theta.items()}

    def scores(q: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        found = table.token_scores(Bound(model, q))
        return found.logprobs, found.entropies

    _, slope = jvp(scores, (theta,), (direction,))
    before = setting.before.select(rows)
    for norm, units in (
        ("token", Units.sequences(64)),
        ("sequence", Units.sequences(64)),
        ("token", Units.prompts(torch.arange(64) // 4)),
        ("sequence", Units.prompts(torch.arange(64) // 4)),
    ):
        slopes = TokenScores(slope[0][rows], slope[1][rows], before.response_mask)
        along = predicted(before, slopes, table.rollouts.prompt_ids[rows], units, norm)
        each = along.value + along.influence
        errors = []
        for eta in (1e-4, 1e-5, 1e-6):
            s, h = scores({n: theta[n] + eta * direction[n] for n in theta})
            after = TokenScores(s.detach(), h.detach(), table.rollouts.response_mask).select(rows)
            change = per_decision(before, after, units, norm)
            longer = change.size_change - eta * along.length_change
            gap = change.minus(along.times(eta), entropy(before, units, norm).ratio(), longer)
            errors.append(((gap.value + gap.influence).abs() / (eta * each.abs().max())).max().item())
        assert errors[0] < 5e-2
        assert errors[1] < 0.15 * errors[0]
        assert errors[2] < 0.15 * errors[1]


def test_reference_estimator_is_noisier(setting):
    """What Rao-Blackwell and per-decision weights are for."""
    variance = {}
    pairs = [(w, k) for w in ("first_order", "per_decision", "snis") for k in ("rao_blackwell", "surprisal")]
    for what, kind in [pair for pair in pairs if pair != ("per_decision", "surprisal")]:
        values, _ = repeat(setting, what, "sequence", kind, n=100, batches=300, seed=18)
        variance[what, kind] = values.var()
    assert variance["first_order", "rao_blackwell"] < 0.7 * variance["first_order", "surprisal"]
    assert variance["per_decision", "rao_blackwell"] < 0.7 * variance["snis", "surprisal"]
