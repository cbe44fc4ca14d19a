"""Second derivatives along the step against enumeration, against finite differences, and where there are none."""

import re

import pytest
import torch
from torch import Tensor, nn
from torch.func import jvp

from entropy_probe import TokenScores
from entropy_probe.estimators.sweep import FIT_REACH, linear_range, quadratic
from entropy_probe.estimators.uncertainty import Sampled
from entropy_probe.scoring.directional import directional_derivatives, why_not_forward_mode
from entropy_probe.scoring.forward import Scorer
from entropy_probe.scoring.isolation import evaluating, parameters_at
from entropy_probe.types import Clusters
from tests.invariants.exact import Bound, Setting
from tests.invariants.hf_problems import policy, rollouts
from tests.reference.enumeration import TEMPERATURE, Table, TinyPolicy
from tests.whole_batch import derivatives, per_decision

NORMALIZATIONS = ["token", "sequence"]
THIRD_ORDER = 0.015
"""Within what the fit leaves out stays up to a third of the linear range, relative."""


def derivative(f):
    return lambda eta: jvp(f, (eta,), (torch.ones_like(eta),))[1]


class Line:
    """The enumerable policy along a direction: scores with their derivatives, and exact entropy derivatives."""

    def __init__(self, rates: Tensor) -> None:
        self.setting = Setting.build()
        model, table = self.setting.model, self.setting.table
        mask = table.rollouts.response_mask
        generator = torch.Generator().manual_seed(3)
        theta = {n: p.detach() for n, p in model.named_parameters()}
        self.direction = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in theta.items()}

        def at(eta: Tensor) -> Bound:
            return Bound(model, {n: theta[n] + eta * self.direction[n] for n in theta})

        def scores(eta: Tensor) -> tuple[Tensor, Tensor]:
            found = table.token_scores(at(eta))
            return found.logprobs, found.entropies

        zero = torch.zeros((), dtype=torch.float64)
        routes = (scores, derivative(scores), derivative(derivative(scores)))
        self.scores, self.first, self.second = (
            TokenScores(*(x.detach() for x in route(zero)), mask) for route in routes
        )
        self.rates = rates
        self.after = [TokenScores(*(x.detach() for x in scores(rate)), mask) for rate in rates]
        self.exact: dict[str, tuple[float, float]] = {}
        self.change: dict[str, Tensor] = {}
        for norm in NORMALIZATIONS:

            def entropy(eta: Tensor, norm: str = norm) -> Tensor:
                return table.entropy(at(eta), norm)

            slope, second = derivative(entropy), derivative(derivative(entropy))
            self.exact[norm] = slope(zero).item(), second(zero).item() / 2
            self.change[norm] = torch.stack([entropy(rate) - entropy(zero) for rate in rates]).detach()


@pytest.fixture(scope="module")
def line() -> Line:
    # the linear range ends between 0.01 and 0.03
    return Line(torch.logspace(-4, -1.5, 9, dtype=torch.float64))


def fitted(line: Line, rows: Tensor, norm: str) -> tuple[Sampled, Sampled]:
    """``a`` and ``b`` from one batch, by the sweep's own rules."""
    clusters = Clusters.sequences(len(rows))
    before = line.scores.select(rows)
    changes = [per_decision(before, after.select(rows), clusters, norm) for after in line.after]
    slope, _ = derivatives(before, line.first.select(rows), line.second.select(rows), clusters, norm)
    values = torch.tensor([c.value for c in changes], dtype=torch.float64)
    everything = torch.ones(len(values), dtype=torch.bool)
    last = linear_range(slope.value * line.rates, slope.standard_error * line.rates, values, everything)
    assert last is not None
    near = line.rates <= FIT_REACH * line.rates[last]
    curve = quadratic(line.rates[near], values[near], torch.stack([c.influence for c in changes])[near])
    return curve.linear, curve.quadratic


def direct(line: Line, rows: Tensor, norm: str) -> tuple[Sampled, Sampled]:
    """``a`` and ``b`` from one batch, by derivatives of the scores."""
    picked = (x.select(rows) for x in (line.scores, line.first, line.second))
    slope, second = derivatives(*picked, Clusters.sequences(len(rows)), norm)
    return slope, Sampled(second.value / 2, second.influence / 2)


def repeat(line: Line, route, norm: str, n: int, batches: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Values and standard errors of ``a`` and of ``b`` over many batches."""
    generator = torch.Generator().manual_seed(seed)
    pairs = [route(line, line.setting.draw(n, generator), norm) for _ in range(batches)]
    return [
        (torch.tensor([p[k].value for p in pairs]), torch.tensor([p[k].standard_error for p in pairs])) for k in (0, 1)
    ]


@pytest.mark.parametrize("norm", ["token", pytest.param("sequence", marks=pytest.mark.slow)])
@pytest.mark.parametrize("route", [fitted, direct])
def test_slope_and_curvature_are_unbiased_and_covered(line, route, norm):
    for (values, errors), exact in zip(repeat(line, route, norm, 400, 300, seed=21), line.exact[norm], strict=True):
        left_out = THIRD_ORDER * abs(exact) if route is fitted else 0.0
        error = values.std() / len(values) ** 0.5
        assert abs(values.mean() - exact) < 4 * error + left_out, f"mean {values.mean():.4f}, exact {exact:.4f}"
        covered = ((values - exact).abs() <= 1.96 * errors).double().mean()
        assert 0.915 <= covered <= 0.98
        assert values.std() < 0.5 * abs(exact), "too noisy to see a bias"


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMALIZATIONS)
@pytest.mark.parametrize("route", [fitted, direct])
def test_slope_and_curvature_are_covered_long(line, route, norm):
    for (values, errors), exact in zip(repeat(line, route, norm, 600, 4000, seed=22), line.exact[norm], strict=True):
        covered = ((values - exact).abs() <= 1.96 * errors).double().mean()
        assert 0.92 <= covered <= 0.98
        left_out = THIRD_ORDER * abs(exact) if route is fitted else 0.0
        # and the bias of a ratio, small beside the error of one batch
        assert abs(values.mean() - exact) < 4 * values.std() / len(values) ** 0.5 + 0.05 * values.std() + left_out


def test_second_derivative_has_no_bias_per_sequence_even_in_tiny_batches(line):
    for (values, _), exact in zip(repeat(line, direct, "sequence", 4, 4000, 23), line.exact["sequence"], strict=True):
        assert abs(values.mean() - exact) < 4 * values.std() / len(values) ** 0.5


@pytest.mark.parametrize("norm", NORMALIZATIONS)
@pytest.mark.parametrize("grouped", [False, True])
def test_derivatives_are_those_of_the_realized_change(line, norm, grouped):
    """Value and every unit's influence, against central differences of the estimator itself."""
    rows = line.setting.draw(40, torch.Generator().manual_seed(24))
    clusters = Clusters.prompts(torch.arange(40) // 4) if grouped else Clusters.sequences(40)
    before, first, second = (x.select(rows) for x in (line.scores, line.first, line.second))

    def change(eta: float) -> Tensor:
        # the scores' own expansion, so that the step can be small without rounding
        s, h = (
            getattr(before, k) + eta * getattr(first, k) + eta**2 / 2 * getattr(second, k)
            for k in ("logprobs", "entropies")
        )
        found = per_decision(before, TokenScores(s, h, before.response_mask), clusters, norm)
        return torch.cat([torch.tensor([found.value]), found.influence])

    eta = 1e-4
    above, below, middle = change(eta), change(-eta), change(0.0)
    for got, expected in zip(
        derivatives(before, first, second, clusters, norm),
        ((above - below) / (2 * eta), (above + below - 2 * middle) / eta**2),
        strict=True,
    ):
        together = torch.cat([torch.tensor([got.value]), got.influence])
        torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def random_direction(model: nn.Module, size: float) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {n: size * torch.randn(p.shape, generator=g, dtype=p.dtype) for n, p in named(model).items()}


@pytest.mark.checked
def test_scores_of_the_enumerable_policy(line):
    """The model path, on every response, against the differentiated reference."""
    model, batch = TinyPolicy(), Table.build().rollouts
    scorer = Scorer(model, TEMPERATURE, 64)
    with evaluating(model):
        scorer.prepare(batch)
        assert why_not_forward_mode(scorer, batch, named(model), line.direction) is None
        got = directional_derivatives(scorer, batch, named(model), line.direction)
    for found, expected in zip(got, (line.first, line.second), strict=True):
        torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found.entropies, expected.entropies, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize(("kind", "architecture"), [("lora", "qwen2"), ("full", "qwen3"), ("full", "llama")])
@pytest.mark.parametrize("head", ["chunked", "logits"])
def test_scores_of_hugging_face_models(kind, architecture, head):
    model, _ = policy(kind, architecture)
    batch, eta = rollouts(), 0.02
    direction = random_direction(model, 0.05)
    scorer = Scorer(model, 0.7, 64)
    with evaluating(model):
        scorer.prepare(batch)
        if head == "logits":
            scorer.lay_out(None)
        assert why_not_forward_mode(scorer, batch, named(model), direction) is None
        got = directional_derivatives(scorer, batch, named(model), direction)

        def at(x: float) -> TokenScores:
            with parameters_at(named(model), {n: p.detach() + x * direction[n] for n, p in named(model).items()}):
                return scorer.score(batch)

        above, middle, below = at(eta), at(0.0), at(-eta)
    for name in ("logprobs", "entropies"):
        a, m, b = (getattr(x, name).double() for x in (above, middle, below))
        for found, expected in zip(got, ((a - b) / (2 * eta), (a + b - 2 * m) / eta**2), strict=True):
            assert (getattr(found, name) - expected).norm() < 0.03 * expected.norm()


class Layers(nn.Module):
    """An embedding, an operation, an output layer."""

    def __init__(self, operation: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.operation, self.out = nn.Embedding(12, 8), operation, nn.Linear(8, 12)

    def forward(self, input_ids, attention_mask):
        class Output:
            logits = self.out(self.operation(self.embed(input_ids)))

        return Output


class DirectLayerNorm(nn.Module):
    """Not by way of ``torch.nn.functional``: torch's own rule for the second derivative, which is wrong."""

    def forward(self, x):
        return torch.layer_norm(x, (8,))


@pytest.mark.checked
@pytest.mark.parametrize(
    ("operation", "reason"),
    [
        (nn.LayerNorm(8), None),
        (nn.SiLU(), None),
        (nn.GELU(), None),
        (nn.Mish(), "Trying to use forward AD with aten::mish_backward that does not support it"),
        (DirectLayerNorm(), r"its second derivative is off by 0\.\d+ of a finite difference"),
    ],
    ids=["layer_norm", "silu", "gelu", "mish", "torch.layer_norm"],
)
def test_operations_without_second_derivatives_are_found_out(operation, reason):
    model, batch = Layers(operation), rollouts()
    scorer = Scorer(model, 1.0, 64)
    with evaluating(model):
        scorer.prepare(batch)
        found = why_not_forward_mode(scorer, batch, named(model), random_direction(model, 1.0))
    if reason is None:
        assert found is None
    else:
        assert found is not None
        assert re.fullmatch(reason, found), found
