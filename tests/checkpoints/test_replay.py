"""From checkpoint k and the captured gradients of step k + 1, the reconstructed step gives checkpoint k + 1."""

from __future__ import annotations

import pytest
import torch

from entropy_probe.checkpoints import load_checkpoint
from entropy_probe.steps.adamw import adamw_step, optimizer_parameters, shadow_step
from tests.trained import RUNS

KINDS = list(RUNS)


@pytest.mark.parametrize("name", KINDS)
def test_the_same_kernel_gives_the_next_checkpoint_bitwise(runs, name):
    run = runs(name)
    now, after = run.load(2), run.load(3)
    parameters = optimizer_parameters(now.model, now.optimizer)
    expected = optimizer_parameters(after.model, after.optimizer)
    stepped = shadow_step(parameters, now.optimizer, run.gradients[3])
    assert stepped.keys() == expected.keys() == run.gradients[3].keys()
    assert [n for n in stepped if not torch.equal(stepped[n], expected[n])] == []
    assert not any(torch.equal(parameters[n], expected[n]) for n in stepped)


@pytest.mark.parametrize("name", KINDS)
def test_the_closed_form_gives_the_next_checkpoint(runs, name):
    run = runs(name)
    now, after = run.load(2), run.load(3)
    parameters = optimizer_parameters(now.model, now.optimizer)
    step = adamw_step(parameters, now.optimizer, run.gradients[3])
    ulp = torch.finfo(torch.float32).eps
    for parameter_name, expected in optimizer_parameters(after.model, after.optimizer).items():
        theta, delta = parameters[parameter_name].detach().double(), step.delta[parameter_name].double()
        error = (theta + delta - expected.detach().double()).abs()
        # the kernel rounds the parameter after its decay and after its step
        assert (error <= 1e-6 * delta.abs().max() + 1.1 * ulp * theta.abs()).all(), parameter_name


def test_the_replay_notices_two_swapped_parameters_of_equal_shape(runs):
    run = runs("full")
    now, after = run.load(2), run.load(3)
    parameters = optimizer_parameters(now.model, now.optimizer)
    a, b = (f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1))
    state = now.optimizer.state
    state[parameters[a]], state[parameters[b]] = state[parameters[b]], state[parameters[a]]
    stepped = shadow_step(parameters, now.optimizer, run.gradients[3])
    expected = dict(after.model.named_parameters())
    assert {n for n in stepped if not torch.equal(stepped[n], expected[n])} == {a, b}


def test_the_stored_learning_rate_is_that_of_the_next_step(runs):
    run = runs("full")
    rates = [load_checkpoint(run.checkpoint(k)).optimizer.param_groups[0]["lr"] for k in (1, 2, 3, 4)]
    assert rates == pytest.approx([0.75e-3, 0.5e-3, 0.25e-3, 0.0])
