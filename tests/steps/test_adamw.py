"""The closed form against torch's own kernels."""

import inspect

import pytest
import torch
from torch import nn

from entropy_probe.named import add
from entropy_probe.steps.adamw import (
    adamw_step,
    check_adam,
    clip_gradient,
    learning_rates,
    optimizer_parameters,
    shadow_step,
)
from entropy_probe.steps.preconditioner import frozen_preconditioner

KERNELS = [{"fused": True}, {"foreach": True}, {"foreach": False}]


class Two(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a = nn.Parameter(torch.randn(7, 5, generator=generator, dtype=dtype))
        self.b = nn.Parameter(torch.randn(5, generator=generator, dtype=dtype))
        self.c = nn.Parameter(torch.randn(3, generator=generator, dtype=dtype))


def setup(cls, dtype, kernel, steps=3, **options):
    model = Two(dtype)
    groups = [
        {"params": [model.a], "lr": 3e-3, "betas": (0.8, 0.95), "weight_decay": 0.3, "eps": 1e-6},
        {"params": [model.b, model.c], "lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.0},
    ]
    optimizer = cls(groups, **kernel, **options)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator, dtype=dtype)
        optimizer.step()
    gradient = {n: torch.randn(p.shape, generator=generator, dtype=dtype) for n, p in model.named_parameters()}
    return model, optimizer, gradient


@pytest.mark.parametrize("kernel", KERNELS, ids=["fused", "foreach", "plain"])
@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.Adam])
@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"decoupled": True}], ids=["", "amsgrad", "decoupled"])
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("max_norm", [None, 0.5], ids=["unclipped", "clipped"])
def test_closed_form_and_shadow_equal_the_real_step(cls, dtype, kernel, options, steps, max_norm):
    if options.get("decoupled"):
        # Adam can be told to decay like AdamW
        if "decoupled_weight_decay" not in inspect.signature(torch.optim.Adam).parameters:
            pytest.skip("this torch has no such flag")
        cls, options = torch.optim.Adam, {"decoupled_weight_decay": True}
    model, optimizer, raw = setup(cls, dtype, kernel, steps, **options)
    parameters = optimizer_parameters(model, optimizer)
    gradient = clip_gradient(raw, max_norm).values
    step = adamw_step(parameters, optimizer, gradient)
    shadow = shadow_step(parameters, optimizer, gradient)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for n, p in model.named_parameters():
        p.grad = raw[n].clone()
    if max_norm is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for n, p in model.named_parameters():
        assert (shadow[n] - p).abs().max() <= tolerance * 1e-2 if max_norm else torch.equal(shadow[n], p)
        change = (p.detach() - before[n]).double()
        # what float32 parameters can show of the change
        rounding = torch.finfo(dtype).eps * before[n].double().abs()
        assert ((change - step.delta[n]).abs() <= tolerance * change.abs() + rounding).all()
        torch.testing.assert_close(step.components["gradient"][n], -step.gradient_scale[n] * gradient[n])


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.Adam])
def test_the_flag_for_graph_capture_changes_no_step(cls):
    """Its kernel runs on accelerators only, while a checkpoint of such a run may be probed on any machine."""
    model, optimizer, gradient = setup(cls, torch.float32, {"foreach": False})
    parameters = optimizer_parameters(model, optimizer)
    plain = shadow_step(parameters, optimizer, gradient)
    for group in optimizer.param_groups:
        group["capturable"] = True
    captured = shadow_step(parameters, optimizer, gradient)
    assert all(torch.equal(plain[n], captured[n]) for n in plain)


def test_components_vanish_where_they_should():
    model, optimizer, gradient = setup(torch.optim.AdamW, torch.float64, {}, steps=0)
    parameters = optimizer_parameters(model, optimizer)
    step = adamw_step(parameters, optimizer, gradient)
    assert all(not x.any() for x in step.components["momentum"].values())
    assert step.components["weight_decay"]["a"].any()
    assert not step.components["weight_decay"]["b"].any()
    step = adamw_step(parameters, optimizer, {n: torch.zeros_like(g) for n, g in gradient.items()})
    assert all(not x.any() for x in step.components["gradient"].values())


def test_unreached_parameter_is_skipped_as_torch_does():
    model, optimizer, gradient = setup(torch.optim.AdamW, torch.float64, {})
    parameters = optimizer_parameters(model, optimizer)
    step = adamw_step(parameters, optimizer, gradient | {"a": None})
    assert not step.delta["a"].any()
    assert torch.equal(shadow_step(parameters, optimizer, gradient | {"a": None})["a"], model.a)


def test_learning_rate_override_scales_every_group():
    model, optimizer, gradient = setup(torch.optim.AdamW, torch.float64, {})
    parameters = optimizer_parameters(model, optimizer)
    a, b = (adamw_step(parameters, optimizer, gradient, rate).delta for rate in (1e-4, 2e-4))
    for n in a:
        torch.testing.assert_close(2 * a[n], b[n])
    assert learning_rates(optimizer) == (3e-3, 1e-2)
    assert learning_rates(optimizer, 0.5) == (0.5, 0.5)


def test_finished_schedule_is_explained():
    _, optimizer, _ = setup(torch.optim.AdamW, torch.float64, {})
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    with pytest.raises(ValueError, match="finished linear schedule stores 0"):
        learning_rates(optimizer)
    assert learning_rates(optimizer, 1e-5) == (1e-5, 1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"maximize": True}, "maximize=False"),
        ({"betas": (0.9, 1.0)}, r"betas in \[0, 1\)"),
        ({"lr": float("nan")}, "finite"),
    ],
)
def test_unusable_settings_are_refused(change, message):
    _, optimizer, _ = setup(torch.optim.AdamW, torch.float64, {})
    optimizer.param_groups[1].update(change)
    with pytest.raises(ValueError, match=message):
        check_adam(optimizer)


def test_other_optimizers_and_strangers_are_refused():
    model = Two(torch.float64)
    with pytest.raises(ValueError, match=r"expected torch\.optim\.AdamW or Adam, got torch\.optim\.sgd\.SGD"):
        check_adam(torch.optim.SGD(model.parameters(), lr=0.1))

    class Mine(torch.optim.AdamW):
        pass

    with pytest.raises(ValueError, match="Mine"):
        check_adam(Mine(model.parameters()))
    with pytest.raises(ValueError, match="3 of its 3 tensors are not parameters"):
        optimizer_parameters(Two(torch.float64), torch.optim.AdamW(model.parameters()))
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="at least one trainable"):
        optimizer_parameters(model, torch.optim.AdamW(model.parameters()))


def test_non_finite_gradient_is_refused():
    with pytest.raises(ValueError, match="finite norm"):
        clip_gradient({"a": torch.tensor([1.0, float("nan")])}, 1.0)


def test_named_vectors_need_the_same_names():
    with pytest.raises(ValueError, match="only on one side"):
        add({"a": torch.ones(1)}, {"b": torch.ones(1)})


def test_frozen_preconditioner():
    model, optimizer, _ = setup(torch.optim.AdamW, torch.float64, {})
    parameters = optimizer_parameters(model, optimizer)
    optimizer.state[model.b]["exp_avg_sq"].zero_()
    optimizer.state[model.c]["exp_avg_sq"][0] = 0.0
    with pytest.raises(ValueError, match="at least 90%"):
        frozen_preconditioner(parameters, optimizer)
    p = frozen_preconditioner(parameters, optimizer, identity_if_coverage_below=0.5)
    v = optimizer.state[model.a]["exp_avg_sq"]
    torch.testing.assert_close(p.scale["a"], 1 / ((v / (1 - 0.95**3)).sqrt() + 1e-6))
    assert torch.equal(p.scale["b"], torch.ones_like(model.b))
    assert p.scale["c"][0] == 1e3
    assert p.report.num_identity == 5
    assert p.report.identity_parameters == ("b",)
    assert p.report.num_clamped == 1
    assert p.report.coverage == pytest.approx(38 / 43)
    assert p.report.bias_correction == "own step"
    all_identity = frozen_preconditioner(parameters, optimizer, identity_if_coverage_below=0.95)
    assert all(torch.equal(s, torch.ones_like(s)) for s in all_identity.scale.values())
    assert all_identity.report.num_identity == 43
    optimizer.state[model.a].pop("step")
    given = frozen_preconditioner(parameters, optimizer, checkpoint_step=3, identity_if_coverage_below=0.5)
    torch.testing.assert_close(given.scale["a"], p.scale["a"])
    assert given.report.bias_correction == "checkpoint_step and own step"
    without = frozen_preconditioner(parameters, optimizer, identity_if_coverage_below=0.5)
    torch.testing.assert_close(without.scale["a"], 1 / (v.sqrt() + 1e-6))
    assert without.report.bias_correction == "none and own step"


def test_frozen_preconditioner_uses_the_running_maximum_of_amsgrad():
    model, optimizer, _ = setup(torch.optim.AdamW, torch.float64, {}, amsgrad=True)
    parameters = optimizer_parameters(model, optimizer)
    for p in model.parameters():
        optimizer.state[p]["max_exp_avg_sq"] = 100 * optimizer.state[p]["exp_avg_sq"]
    v = optimizer.state[model.a]["max_exp_avg_sq"]
    got = frozen_preconditioner(parameters, optimizer)
    torch.testing.assert_close(got.scale["a"], 1 / ((v / (1 - 0.95**3)).sqrt() + 1e-6))
