"""What the moments do after a step, against torch's own optimizer and a first moment updated by hand."""

import copy

import pytest
import torch

from entropy_probe import EntropyProbe, ProbeConfig
from entropy_probe.analyses.batches import admit_batches
from entropy_probe.analyses.plan import plan
from entropy_probe.analyses.predict import predict
from entropy_probe.named import dot
from entropy_probe.steps.afterlife import coasted, coasting, lifetime_factor
from tests.invariants.problems import batches
from tests.reference.enumeration import TEMPERATURE, TinyPolicy, trained_optimizer


def after_zero_gradients(model, optimizer, gradient, steps):
    """How far torch's own optimizer moves a copy in so many steps with zero gradients, after one with this gradient."""
    twin, real = copy.deepcopy((model, optimizer))
    for name, p in twin.named_parameters():
        p.grad = gradient[name].clone()
    real.step()
    after = {name: p.detach().clone() for name, p in twin.named_parameters()}
    for p in twin.parameters():
        p.grad = torch.zeros_like(p)
    for _ in range(steps):
        real.step()
    return {name: p.detach() - after[name] for name, p in twin.named_parameters()}


def trained(cls=torch.optim.AdamW, **options):
    model = TinyPolicy()
    optimizer = trained_optimizer(model, cls=cls, lr=1e-3, weight_decay=0.0, **options)
    generator = torch.Generator().manual_seed(1)
    sizes = {name: (p.shape, p.dtype) for name, p in model.named_parameters()}
    return model, optimizer, {n: 1e-2 * torch.randn(s, generator=generator, dtype=t) for n, (s, t) in sizes.items()}


@pytest.mark.parametrize(
    ("cls", "betas", "amsgrad"),
    [
        (torch.optim.AdamW, (0.9, 0.999), False),
        (torch.optim.Adam, (0.9, 0.999), True),
        (torch.optim.AdamW, (0.9, 0.85), False),
        (torch.optim.AdamW, (0.9, 0.5), True),  # held denominators do not shrink
        (torch.optim.Adam, (0.95, 0.95), False),
        (torch.optim.Adam, (0.0, 0.9), False),
    ],
)
def test_zero_gradients_move_the_parameters_as_far(cls, betas, amsgrad):
    model, optimizer, gradient = trained(cls, betas=betas, amsgrad=amsgrad)
    for state in optimizer.state.values() if amsgrad else ():
        state["max_exp_avg_sq"] = 4 * state["max_exp_avg_sq"]  # above what this step makes of it
    moves = coasting(dict(model.named_parameters()), optimizer, gradient)
    for name, moved in after_zero_gradients(model, optimizer, gradient, 500).items():
        torch.testing.assert_close(moves[name], moved, rtol=2e-3, atol=1e-9)


@pytest.mark.parametrize("betas", [(0.9, 0.81), (0.9, 0.8), (0.95, 0.9)])
def test_denominators_that_shrink_with_the_momentum_have_no_end(betas):
    model, optimizer, gradient = trained(betas=betas)
    named = dict(model.named_parameters())
    assert coasting(named, optimizer, gradient) is coasted(named, optimizer, gradient).parameters is None
    near, far = (after_zero_gradients(model, optimizer, gradient, steps) for steps in (70, 140))
    assert all(far[name].norm() > 1.8 * near[name].norm() for name in named)
    # with denominators that are all eps, steps shrink by beta1
    model, optimizer, gradient = trained(betas=betas, eps=10.0)
    moves = coasting(dict(model.named_parameters()), optimizer, gradient)
    for name, moved in after_zero_gradients(model, optimizer, gradient, 250).items():
        torch.testing.assert_close(moves[name], moved, rtol=2e-3, atol=1e-12)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.95, 0.95)])
def test_steps_on_copies_go_on_until_they_are_negligible(betas):
    model, optimizer, gradient = trained(betas=betas)
    named = dict(model.named_parameters())
    alone, moves = coasted(named, optimizer, gradient), coasting(named, optimizer, gradient)
    stepped = coasted(named, optimizer, gradient, steps=0).parameters
    for name, p in alone.parameters.items():
        torch.testing.assert_close(p - stepped[name], moves[name], rtol=1e-9, atol=1e-15)


def test_the_lifetime_is_that_of_one_gradient_in_the_first_moment():
    model = TinyPolicy()
    optimizer = trained_optimizer(model)  # of three steps
    moment, moved = 0.0, []
    for j in range(300):
        moment = 0.9 * moment + 0.1 * (j == 0)
        moved.append(moment / (1 - 0.9 ** (4 + j)))
    expected = sum(moved) / moved[0]
    assert lifetime_factor(dict(model.named_parameters()), optimizer) == pytest.approx(expected, rel=1e-3)
    optimizer.state[model.out.bias]["step"] += 5
    assert lifetime_factor(dict(model.named_parameters()), optimizer) is None


def test_a_result_has_both():
    model = TinyPolicy()
    optimizer = trained_optimizer(model)
    update, evaluation = batches()
    config = ProbeConfig(temperature=TEMPERATURE, learning_rate=1e-3, normalization="sequence", loss_type="grpo")
    probe = EntropyProbe(model, optimizer, config)
    with probe._opened() as policy:
        prediction = predict(plan(policy, *admit_batches(policy, update, evaluation)))
        moves = coasting(policy.parameters, optimizer, prediction.plan.step.gradient.values, 1e-3)
    along = dot({n: x for n, x in prediction.slope.total.items() if x is not None}, moves)
    result = probe.predict(update=update, evaluation=evaluation)
    assert result.committed.value == pytest.approx(along / len(evaluation), rel=1e-9)
    assert sum(part.value for part in result.components.values()) == pytest.approx(result.predicted.value, rel=1e-12)
    factor = lifetime_factor(dict(model.named_parameters()), optimizer)
    assert result.lifetime.value == pytest.approx(factor * result.components["gradient"].value, rel=1e-12)
    sgd = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    plain = EntropyProbe(model, sgd, config).predict(update=update, evaluation=evaluation)
    assert plain.committed is plain.lifetime is None


class Normalised(torch.optim.SGD):
    """Divides by the length of the gradient, so that it has no step without one."""

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad / p.grad.norm(), alpha=self.param_groups[0]["lr"])


def test_a_step_that_needs_a_gradient_has_no_coasting():
    model = TinyPolicy()
    named = dict(model.named_parameters())
    gradient = {n: torch.ones_like(p) for n, p in named.items()}
    before = copy.deepcopy(named)
    assert coasted(named, Normalised(model.parameters(), 0.1), gradient).parameters is None
    assert all(torch.equal(before[n], p) for n, p in named.items())
    assert all(bool((g == 1).all()) for g in gradient.values())
