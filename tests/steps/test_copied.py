"""Steps taken on copies against the real ones, and optimizers whose step cannot be reproduced."""

import copy

import pytest
import torch
from torch import nn

from entropy_probe.steps.adamw import optimizer_parameters
from entropy_probe.steps.copied import check_optimizer, check_repeatable, copied_step
from entropy_probe.steps.preconditioner import frozen_preconditioner
from tests.steps.optimizers import Lion

optim = torch.optim


class Coupled(Lion):
    """The step of each parameter depends on the gradients of all."""

    @torch.no_grad()
    def step(self, closure=None):
        held = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in held]).norm()
        for p in held:
            p.sub_(p.grad / norm, alpha=self.param_groups[0]["lr"])


class MyAdamW(optim.AdamW):
    """Adam by name only."""

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad, alpha=self.param_groups[0]["lr"])


def hf_adafactor(params, lr):
    from transformers.optimization import Adafactor

    return Adafactor(params, lr=lr, relative_step=False, scale_parameter=True)


KINDS = {
    "sgd": lambda p: optim.SGD(p, lr=0.1),
    "sgd momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, dampening=0.1),
    "sgd nesterov": lambda p: optim.SGD(p, lr=torch.tensor(0.1), momentum=0.9, nesterov=True),
    "sgd nesterov foreach": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, foreach=True),
    "sgd fused": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "sgd foreach": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "rmsprop": lambda p: optim.RMSprop(p, lr=0.1, momentum=0.5, centered=True),
    "nadam": lambda p: optim.NAdam(p, lr=0.1, weight_decay=0.1),
    "radam": lambda p: optim.RAdam(p, lr=0.1),
    "adagrad": lambda p: optim.Adagrad(p, lr=0.1),
    "adagrad fused": lambda p: optim.Adagrad(p, lr=0.1, fused=True),
    "adamax": lambda p: optim.Adamax(p, lr=0.1),
    "adadelta": lambda p: optim.Adadelta(p, lr=0.1),
    "adafactor": lambda p: optim.Adafactor(p, lr=0.1, weight_decay=0.1),
    "adafactor of transformers": lambda p: hf_adafactor(p, 0.1),
    "lion": lambda p: Lion(p, lr=0.1, scale=3.0),
    "coupled": lambda p: Coupled(p, lr=0.1),
    "subclass of AdamW": lambda p: MyAdamW(p, lr=0.1),
}
if hasattr(optim, "Muon"):  # not in the oldest torch that is supported
    KINDS["muon"] = lambda p: optim.Muon(p, lr=0.1)


def setup(kind, steps=7):
    """A model, an optimizer with a history and a scheduler, and the next gradient."""
    generator = torch.Generator().manual_seed(0)
    model = nn.ParameterDict({n: nn.Parameter(torch.randn(s, generator=generator)) for n, s in SHAPES.items()})
    optimizer = KINDS[kind](list(model.values()))
    optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    optimizer.register_step_post_hook(lambda *_: None)
    for _ in range(steps):
        for p in model.values():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return model, optimizer, {n: torch.randn(p.shape, generator=generator) for n, p in model.items()}


SHAPES = {"a": (6, 5), "b": (7, 4), "c": (3, 3)}


@pytest.mark.parametrize("steps", [0, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_the_step_of_a_copy_is_the_real_step_bitwise(kind, steps):
    model, optimizer, gradient = setup(kind, steps)
    parameters = optimizer_parameters(model, optimizer)
    check_optimizer(optimizer)
    live = copy.deepcopy((dict(model.items()), optimizer.state_dict()))
    pointers = {n: p.data_ptr() for n, p in model.items()}
    random, given = torch.get_rng_state(), copy.deepcopy(gradient)
    stepped = copied_step(parameters, optimizer, gradient)
    assert all(torch.equal(gradient[n], given[n]) for n in given)
    check_repeatable(parameters, optimizer, gradient, stepped)
    assert all(torch.equal(p, live[0][n]) and p.data_ptr() == pointers[n] for n, p in model.items())
    now = optimizer.state_dict()
    assert str(now["param_groups"]) == str(live[1]["param_groups"])
    for i, state in live[1]["state"].items():
        for key, value in state.items():
            same = torch.equal(now["state"][i][key], value) if isinstance(value, torch.Tensor) else True
            assert same, key
    assert now["state"].keys() == live[1]["state"].keys()
    assert torch.equal(torch.get_rng_state(), random)
    for n, p in model.items():
        p.grad = gradient[n].clone()
    optimizer.step()
    assert all(torch.equal(stepped[n], p) for n, p in model.items())
    assert not any(torch.equal(stepped[n], live[0][n]) for n in model)


def test_an_unreached_parameter_stays_and_the_rate_can_be_replaced():
    model, optimizer, gradient = setup("sgd momentum")
    parameters = optimizer_parameters(model, optimizer)
    stepped = copied_step(parameters, optimizer, gradient | {"b": None})
    assert torch.equal(stepped["b"], model["b"])
    deltas = [copied_step(parameters, optimizer, gradient, rate)["a"] - model["a"] for rate in (1e-3, 2e-3)]
    torch.testing.assert_close(2 * deltas[0], deltas[1], rtol=1e-3, atol=1e-6)
    assert optimizer.param_groups[0]["lr"] == 0.1


class Wrapper(Lion):
    """Keeps another optimizer inside, as Lookahead and SAM do."""

    def __init__(self, params):
        params = list(params)
        super().__init__(params)
        self.base = optim.SGD(params, lr=0.1)


class Random(Lion):
    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.add_(torch.randn_like(p))


class Dummy(Lion):
    """As transformers uses for layer-wise optimizers: its step does nothing."""

    def step(self, closure=None):
        return None


class Diverging(Lion):
    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.div_(0.0)


class NeedsClosure(Lion):
    def step(self, closure):
        closure()


def patched(params):
    optimizer = optim.SGD(params, lr=0.1)
    optimizer.step = lambda closure=None: None
    return optimizer


def of_library(name, base=Lion):
    return type("Fancy8bit", (base,), {"__module__": f"{name}.optim"})


def with_quantised_state(params):
    params = list(params)
    optimizer = Lion(params)
    for p in params:
        optimizer.state[p]["moment"] = torch.zeros(p.shape).as_subclass(type("Quantised", (torch.Tensor,), {}))
    return optimizer


def with_group_entry(params, **entry):
    optimizer = optim.SGD(params, lr=0.1)
    optimizer.param_groups[0].update(entry)
    return optimizer


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda p: optim.LBFGS(p), r"torch\.optim\.LBFGS is not supported: its step needs a closure"),
        (lambda p: optim.SparseAdam(p), r"torch\.optim\.SparseAdam is not supported: it takes sparse gradients"),
        (
            lambda p: of_library("bitsandbytes")(p),
            r"bitsandbytes\.optim\.Fancy8bit is not supported: .*quantised state",
        ),
        (lambda p: of_library("torchao")(p), r"torchao\.optim\.Fancy8bit is not supported: .*tensor subclasses"),
        (lambda p: type("Mine", (of_library("torchao"),), {})(p), r"Mine is not supported: .*tensor subclasses"),
        (lambda p: of_library("schedulefree")(p), "is not supported: its parameters are not those of the policy"),
        (lambda p: with_group_entry(p, train_mode=True), "its parameters are not those of the policy"),
        (lambda p: of_library("deepspeed")(p), "is not supported: it keeps the parameters it steps elsewhere"),
        (Wrapper, "Wrapper is not supported: it keeps base outside of its state and parameter groups"),
        (NeedsClosure, "NeedsClosure is not supported: its step needs a closure"),
        (patched, r"SGD is not supported: its step\(\) was replaced"),
        (with_quantised_state, "its state holds tensors of class Quantised"),
        (lambda p: optim.SGD(p, lr=0.1, maximize=True), "expected maximize=False"),
        (lambda p: with_group_entry(p, lr=None), "expected a finite learning rate >= 0, got None"),
        (lambda p: with_group_entry(p, lr=float("nan")), "expected a finite learning rate"),
        (lambda p: "adamw", r"expected a torch\.optim\.Optimizer, got builtins\.str"),
    ],
)
def test_what_a_copy_cannot_reproduce_is_refused_by_name(build, message):
    model, _, gradient = setup("sgd")
    optimizer = build(model.values())
    with pytest.raises(ValueError, match=message) as caught:
        check_optimizer(optimizer)
    assert "\n" not in str(caught.value)
    if isinstance(optimizer, optim.Optimizer):
        with pytest.raises(ValueError, match=message):
            copied_step(dict(model.items()), optimizer, gradient)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Random, "Random is not supported: two copies of it take different steps"),
        (Dummy, "a copy of .*Dummy moves no parameter"),
        (Diverging, "expected finite values after the step"),
    ],
)
def test_steps_that_are_none_are_refused(kind, message):
    model, _, gradient = setup("sgd")
    parameters, optimizer = dict(model.items()), kind(model.values())
    with pytest.raises(ValueError, match=message):
        check_repeatable(parameters, optimizer, gradient, copied_step(parameters, optimizer, gradient))


def test_eight_bit_adam_of_bitsandbytes_is_refused():
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model, _, _ = setup("sgd")
    with pytest.raises(ValueError, match=r"bitsandbytes\.optim\.adamw\.AdamW8bit is not supported"):
        check_optimizer(bitsandbytes.optim.AdamW8bit(model.values(), lr=1e-3))


def test_the_frozen_geometry_needs_the_moments_of_adam():
    """NAdam has an ``exp_avg_sq`` too, but its step is another."""
    for kind in ("nadam", "sgd momentum"):
        model, optimizer, _ = setup(kind)
        parameters = optimizer_parameters(model, optimizer)
        with pytest.raises(
            ValueError, match=r"frozen geometry: expected torch\.optim\.AdamW or Adam.*got torch\.optim"
        ):
            frozen_preconditioner(parameters, optimizer)
        accepted = frozen_preconditioner(parameters, optimizer, identity_if_coverage_below=1.0)
        assert all(torch.equal(s, torch.ones_like(s)) for s in accepted.scale.values())
        assert (accepted.report.coverage, accepted.report.num_identity) == (0.0, 67)
