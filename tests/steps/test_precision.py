"""Steps of weights that training keeps in 16 bits, against the real ones, bit for bit."""

import pytest
import torch
from torch import nn

from entropy_probe.config import ProbeConfig
from entropy_probe.named import add
from entropy_probe.steps.adamw import adamw_step, optimizer_parameters, shadow_step
from entropy_probe.steps.copied import check_optimizer, moved
from entropy_probe.steps.plan import plan_step, stepped_parameters
from entropy_probe.steps.precision import step_dtypes
from entropy_probe.steps.preconditioner import frozen_preconditioner
from tests.steps.optimizers import Lion

KERNELS = {"fused": {"fused": True}, "foreach": {"foreach": True}, "plain": {"foreach": False}}
SHAPES = {"a": (9, 17), "b": (33,), "c": (5, 4)}


def no_frozen_scale():
    raise AssertionError("not the frozen geometry")


def trained(kind=torch.optim.AdamW, dtype=torch.bfloat16, steps=4, **options):
    """Weights and an optimizer after some steps in a precision, and the next gradient."""
    generator = torch.Generator().manual_seed(0)
    model = nn.ParameterDict(
        {n: nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for n, s in SHAPES.items()}
    )
    optimizer = kind(
        [{"params": [model["a"]], "lr": 3e-3}, {"params": [model["b"], model["c"]], "weight_decay": 0.0}],
        **{"lr": 1e-2, "weight_decay": 0.3} | options,
    )
    for _ in range(steps):
        for p in model.values():
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
        optimizer.step()
    optimizer.zero_grad()
    return model, optimizer, {n: torch.randn(p.shape, generator=generator).to(dtype) for n, p in model.items()}


def held_in_float32(model: nn.ParameterDict, optimizer: torch.optim.Optimizer) -> None:
    """As a checkpoint is loaded: weights in float32, the optimizer's state as stored."""
    for p in model.values():
        p.data = p.data.float()


def clipped(gradient, max_norm) -> dict[str, torch.Tensor]:
    """By torch itself, as trainers do."""
    held = {n: nn.Parameter(torch.zeros_like(g)) for n, g in gradient.items()}
    for n, p in held.items():
        p.grad = gradient[n].clone()
    if max_norm is not None:
        torch.nn.utils.clip_grad_norm_(held.values(), max_norm)
    return {n: p.grad for n, p in held.items() if p.grad is not None}


def real_step(model, optimizer, gradient, max_norm) -> dict[str, torch.Tensor]:
    """What training writes."""
    for n, g in clipped(gradient, max_norm).items():
        model[n].grad = g
    optimizer.step()
    return {n: p.detach().clone() for n, p in model.items()}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
@pytest.mark.parametrize("max_norm", [None, 0.37], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("live", [True, False], ids=["live", "held in float32"])
@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "weight_decay": 0.0}], ids=["decay", "amsgrad"])
def test_the_rounded_step_is_the_trainers_bitwise(kernel, kind, max_norm, live, options):
    written = real_step(*trained(kind, **KERNELS[kernel], **options), max_norm)
    model, optimizer, gradient = trained(kind, **KERNELS[kernel], **options)
    if not live:
        held_in_float32(model, optimizer)
    parameters = optimizer_parameters(model, optimizer)
    given = {n: g.float() for n, g in gradient.items()}
    config = ProbeConfig(max_grad_norm=max_norm, dtype="bfloat16")
    step = plan_step(parameters, optimizer, given, config, no_frozen_scale)
    assert set(step.kept.values()) == {torch.bfloat16}
    stepped, beyond = stepped_parameters(parameters, optimizer, step, config, None)
    assert beyond == 0.0
    for n, p in parameters.items():
        assert torch.equal(stepped[n], written[n].to(p.dtype))
        change = written[n].float() - p.detach().float()
        torch.testing.assert_close(step.delta[n], change, rtol=0, atol=1e-7)
    for n, g in clipped(gradient, max_norm).items():
        assert torch.equal(step.taken_with[n], g)
    # the parts that are not rounding are those of float32
    exact = adamw_step(parameters, optimizer, step.gradient.values)
    for part, values in exact.components.items():
        assert all(torch.equal(step.components[part][n], values[n]) for n in values)
    assert any(x.abs().max() > 1e-3 for x in step.components["rounding"].values())


def lion(groups, lr, **_):
    return Lion([p for group in groups for p in group["params"]], lr=lr)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adafactor, lion])
@pytest.mark.parametrize("live", [True, False], ids=["live", "held in float32"])
def test_steps_on_copies_are_rounded_too(kind, live):
    options = {"momentum": 0.9} if kind in (torch.optim.SGD, torch.optim.RMSprop) else {}
    written = real_step(*trained(kind, **options), 0.37)
    model, optimizer, gradient = trained(kind, **options)
    if not live:
        held_in_float32(model, optimizer)
    parameters, config = optimizer_parameters(model, optimizer), ProbeConfig(max_grad_norm=0.37)
    step = plan_step(parameters, optimizer, {n: g.float() for n, g in gradient.items()}, config, no_frozen_scale)
    assert step.stepped
    assert all(torch.equal(step.stepped[n], written[n].to(p.dtype)) for n, p in parameters.items())
    unrounded = plan_step(
        parameters,
        optimizer,
        {n: g.float() for n, g in gradient.items()},
        config.model_copy(update={"step_dtype": "float32"}),
        no_frozen_scale,
    )
    different = any(not torch.equal(unrounded.delta[n], step.delta[n]) for n in step.delta)
    assert different != live  # a live model has no other precision to take a step in


def test_a_gradient_in_float32_is_rounded_before_it_is_clipped():
    model, optimizer, gradient = trained()
    noise = {n: 1e-3 * torch.randn(g.shape, generator=torch.Generator().manual_seed(3)) for n, g in gradient.items()}
    gradient = {n: g.float() + noise[n] for n, g in gradient.items()}
    config = ProbeConfig(max_grad_norm=0.37, dtype="bfloat16")
    step = plan_step(optimizer_parameters(model, optimizer), optimizer, gradient, config, no_frozen_scale)
    written = real_step(*trained()[:2], {n: g.bfloat16() for n, g in gradient.items()}, 0.37)
    assert step.stepped
    assert all(torch.equal(step.stepped[n], written[n]) for n in written)
    assert {g.dtype for g in step.taken_with.values() if g is not None} == {torch.bfloat16}


def test_an_unreached_parameter_stays():
    model, optimizer, gradient = trained()
    held_in_float32(model, optimizer)
    given = {**gradient, "b": None}
    step = plan_step(optimizer_parameters(model, optimizer), optimizer, given, ProbeConfig(), no_frozen_scale)
    assert not step.delta["b"].any()
    assert step.taken_with["b"] is None


def test_what_tells_the_precision_of_training():
    def dtypes(setting="auto", *, weights=None, state=None, untouched=(), dtype=torch.bfloat16):
        model, optimizer, _ = trained(dtype=dtype)
        parameters = optimizer_parameters(model, optimizer)
        for name, p in model.items():
            if weights is not None:
                p.data = p.data.to(weights)
            if name in untouched:
                optimizer.state.pop(p)
            elif state is not None:
                optimizer.state[p] = {k: x if k == "step" else x.to(state) for k, x in optimizer.state[p].items()}
        return step_dtypes(parameters, optimizer, setting)

    bf16 = dict.fromkeys(SHAPES, torch.bfloat16)
    assert dtypes() == dtypes(weights=torch.float32) == dtypes(weights=torch.float64) == bf16
    assert dtypes(weights=torch.float32, dtype=torch.float16) == dict.fromkeys(SHAPES, torch.float16)
    assert dtypes(weights=torch.float32, state=torch.float32) == {}  # a float32 copy somewhere
    assert dtypes(state=torch.float32) == {}  # a float32 checkpoint that was loaded in bfloat16
    assert dtypes(dtype=torch.float32) == dtypes(dtype=torch.float64) == {}
    assert dtypes("float32") == {}
    # what has no state goes with the others, or by its own type
    assert dtypes(weights=torch.float32, untouched=("a",)) == bf16
    assert dtypes(untouched=SHAPES) == bf16
    assert dtypes(weights=torch.float32, untouched=SHAPES) == {}
    # set by hand
    assert dtypes("bfloat16", weights=torch.float32, state=torch.float32) == bf16
    with pytest.raises(ValueError, match=r"numbers of bfloat16, as a trainer .* got 0% of the trained elements"):
        dtypes("bfloat16", dtype=torch.float32)
    # zeros are numbers of every type: no evidence of one, and none against one
    model = nn.ParameterDict({"A": nn.Parameter(torch.randn(2, 3)), "B": nn.Parameter(torch.zeros(9, 2))})
    optimizer = torch.optim.AdamW(model.values())
    with pytest.raises(ValueError, match=r"got 0% of the trained elements"):
        step_dtypes(dict(model.items()), optimizer, "bfloat16")
    assert step_dtypes({"B": model["B"]}, optimizer, "bfloat16") == {"B": torch.bfloat16}


def test_weights_that_were_not_all_kept_in_16_bits_are_told_apart():
    model, optimizer, _ = trained()
    held_in_float32(model, optimizer)
    model["b"].data += 1e-6  # a norm in float32, say
    optimizer.state[model["b"]] = {k: x.float() for k, x in optimizer.state[model["b"]].items()}
    assert step_dtypes(optimizer_parameters(model, optimizer), optimizer, "auto").keys() == {"a", "c"}
    # bfloat16 moments of weights that are no numbers of it
    optimizer.state[model["b"]] = {
        k: x if k == "step" else x.bfloat16() for k, x in optimizer.state[model["b"]].items()
    }
    assert step_dtypes(optimizer_parameters(model, optimizer), optimizer, "auto").keys() == {"a", "c"}


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32])
def test_moments_in_another_type_than_the_weights_can_be_stepped(weights):
    """As where a checkpoint is loaded in less than it was trained in, or its rounding is switched off."""
    state = torch.float32 if weights == torch.bfloat16 else torch.bfloat16
    model, optimizer, gradient = trained()
    for p in model.values():
        p.data = p.data.to(weights)
        optimizer.state[p] = {k: x if k == "step" else x.to(state) for k, x in optimizer.state[p].items()}
    parameters = optimizer_parameters(model, optimizer)
    config = ProbeConfig(step_dtype="float32", max_grad_norm=None)
    step = plan_step(parameters, optimizer, {n: g.float() for n, g in gradient.items()}, config, no_frozen_scale)
    assert step.components.keys() == {"gradient", "momentum", "weight_decay"}
    stepped, beyond = stepped_parameters(parameters, optimizer, step, config, None)
    expected = {n: (p.detach().float() + step.delta[n]).to(weights) for n, p in parameters.items()}
    for n, value in stepped.items():
        assert value.dtype == weights
        torch.testing.assert_close(value, expected[n], rtol=1e-2 if weights == torch.bfloat16 else 1e-6, atol=1e-7)
    assert (beyond > 0.01) == (weights == torch.bfloat16)


def test_moments_in_16_bits_are_computed_with_in_float32():
    model, optimizer, gradient = trained()
    held_in_float32(model, optimizer)
    parameters = optimizer_parameters(model, optimizer)
    low = (adamw_step(parameters, optimizer, gradient), frozen_preconditioner(parameters, optimizer, 1e9).scale)
    for p in model.values():
        optimizer.state[p] = {k: x.float() for k, x in optimizer.state[p].items()}
    wide = (adamw_step(parameters, optimizer, gradient), frozen_preconditioner(parameters, optimizer, 1e9).scale)
    for n in SHAPES:
        assert torch.equal(low[0].delta[n], wide[0].delta[n])
        assert torch.equal(low[1][n], wide[1][n])


def test_numbers_out_of_range_are_refused():
    """1e-8 is 0 in float16, so that a second moment that is 0 there divides by 0."""
    model, optimizer, gradient = trained(dtype=torch.float16, foreach=False)
    held_in_float32(model, optimizer)
    for p in model.values():
        optimizer.state[p]["exp_avg_sq"].zero_()
    small = {n: 1e-5 * g.float() for n, g in gradient.items()}
    with pytest.raises(
        ValueError, match=r"expected finite values after a step in torch\.float16, got others.* float32"
    ):
        plan_step(optimizer_parameters(model, optimizer), optimizer, small, ProbeConfig(), no_frozen_scale)


def test_float16_is_taken_as_it_comes():
    """Squares of usual gradients are hardly numbers of it, so that steps differ by much from those of float32."""

    def small(model, optimizer):
        for p in model.values():
            p.data.mul_(0.01)
            state = optimizer.state[p]
            state["exp_avg"].mul_(0.02)
            state["exp_avg_sq"].mul_(0.0004)
        return model, optimizer

    def scaled(gradient):
        return {n: g * 0.02 for n, g in gradient.items()}

    model, optimizer, gradient = trained(dtype=torch.float16, foreach=False)
    written = real_step(*small(model, optimizer), scaled(gradient), None)
    model, optimizer, gradient = trained(dtype=torch.float16, foreach=False)
    small(model, optimizer)
    held_in_float32(model, optimizer)
    config = ProbeConfig(max_grad_norm=None)
    given = {n: g.float() for n, g in scaled(gradient).items()}
    step = plan_step(optimizer_parameters(model, optimizer), optimizer, given, config, no_frozen_scale)
    assert step.stepped
    assert all(torch.equal(step.stepped[n], written[n].float()) for n in written)


def test_another_step_than_the_closed_form_is_noticed(monkeypatch):
    def wrong(*given):
        return {n: 1.1 * value for n, value in shadow_step(*given).items()}

    monkeypatch.setattr("entropy_probe.steps.plan.shadow_step", wrong)
    model, optimizer, gradient = trained()
    with pytest.raises(RuntimeError, match="the optimizer's own step and its closed form disagree"):
        plan_step(optimizer_parameters(model, optimizer), optimizer, gradient, ProbeConfig(), no_frozen_scale)


class Drawing(Lion):
    """Rounds by drawing, as some optimizers can be told to."""

    def __init__(self, params, **options):
        super().__init__(params, lr=1e-2, scale=1.0)
        self.stochastic_rounding = options.get("on", False)


def test_stochastic_rounding_is_refused():
    model, *_ = trained()
    check_optimizer(Drawing(model.values()))
    with pytest.raises(ValueError, match=r"Drawing is not supported: it rounds stochastically \(stochastic_rounding\)"):
        check_optimizer(Drawing(model.values(), on=True))
    grouped = Lion(model.values(), lr=1e-2, scale=1.0)
    grouped.param_groups[0]["bf16_stochastic_round"] = True
    with pytest.raises(ValueError, match=r"rounds stochastically \(bf16_stochastic_round\), and its draws"):
        check_optimizer(grouped)


def test_the_parts_add_up_to_what_moves():
    model, optimizer, gradient = trained()
    held_in_float32(model, optimizer)
    parameters = optimizer_parameters(model, optimizer)
    step = plan_step(parameters, optimizer, gradient, ProbeConfig(), no_frozen_scale)
    assert step.stepped
    change, parts = moved(parameters, step.stepped), add(*step.components.values())
    assert all((parts[n] - change[n]).abs().max() <= 1e-7 for n in SHAPES)
