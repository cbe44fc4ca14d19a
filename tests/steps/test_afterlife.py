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


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.Adam])
def test_zero_gradients_move_the_parameters_as_far(cls, amsgrad):
    model = TinyPolicy()
    optimizer = trained_optimizer(model, cls=cls, weight_decay=0.0, amsgrad=amsgrad)
    named, generator = dict(model.named_parameters()), torch.Generator().manual_seed(1)
    gradient = {n: 1e-2 * torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in named.items()}
    for state in optimizer.state.values() if amsgrad else ():
        state["max_exp_avg_sq"] = 4 * state["max_exp_avg_sq"]  # above what this step makes of it
    moves = coasting(named, optimizer, gradient, 1e-3)
    twins, state = dict(copy.deepcopy(model).named_parameters()), copy.deepcopy(optimizer.state_dict())
    real = cls(list(twins.values()), lr=1e-3, weight_decay=0.0, amsgrad=amsgrad)
    real.load_state_dict(state)
    for p, name in zip(twins.values(), twins, strict=True):
        p.grad = gradient[name].clone()
    real.param_groups[0]["lr"] = 1e-3
    real.step()
    after = {n: p.detach().clone() for n, p in twins.items()}
    for p in twins.values():
        p.grad = torch.zeros_like(p)
    for _ in range(200):
        real.step()
    for name, p in twins.items():
        torch.testing.assert_close(moves[name], p.detach() - after[name], rtol=2e-3, atol=1e-9)


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
