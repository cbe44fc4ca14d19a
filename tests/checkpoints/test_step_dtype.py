"""Checkpoints that were trained in bfloat16: the step that training wrote, bit for bit, from its own gradient."""

import pytest
import torch

from entropy_probe import EntropyProbe, ProbeConfig, Rollouts, load_checkpoint
from entropy_probe.steps.adamw import optimizer_parameters
from entropy_probe.steps.plan import plan_step, stepped_parameters
from tests.notes import texts


def no_frozen_scale():
    raise AssertionError("not the frozen geometry")


def rollouts(n: int, seed: int = 0, group: int = 1) -> Rollouts:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 30, (n, 12), generator=generator)
    mask = torch.ones_like(ids)
    response = mask.clone()
    response[:, :4] = 0
    prompts = torch.arange(n) // group
    ids[:, :4] = ids[prompts * group, :4]
    return Rollouts(ids, mask, response, prompts, advantages=torch.randn(n, generator=generator))


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("name", ["bfloat16", "bfloat16, fused", "bfloat16, foreach"])
def test_the_trainers_gradient_gives_the_weights_that_it_wrote(runs, name, dtype):
    run = runs(name)
    now, after = run.load(2, dtype=dtype), run.load(3, dtype=dtype)
    parameters, written = (optimizer_parameters(s.model, s.optimizer) for s in (now, after))
    config = ProbeConfig(max_grad_norm=None)  # the captured gradient is clipped
    step = plan_step(parameters, now.optimizer, run.gradients[3], config, no_frozen_scale)
    assert step.kept == dict.fromkeys(parameters, torch.bfloat16)
    stepped, _ = stepped_parameters(parameters, now.optimizer, step, config, None)
    assert [n for n in stepped if not torch.equal(stepped[n], written[n])] == []
    assert not all(torch.equal(parameters[n], written[n]) for n in stepped)
    # not rounded, the same gradient gives other weights
    wide = plan_step(
        parameters,
        now.optimizer,
        run.gradients[3],
        config.model_copy(update={"step_dtype": "float32"}),
        no_frozen_scale,
    )
    moved, others = ({n: s.delta[n].norm() for n in stepped} for s in (step, wide))
    assert any(abs(moved[n] - others[n]) > 0.01 * others[n] for n in stepped)


def test_an_optimizer_without_state_does_not_tell(runs):
    run = runs("bfloat16, sgd")
    now, after = run.load(2), run.load(3)
    parameters, written = (optimizer_parameters(s.model, s.optimizer) for s in (now, after))
    config = ProbeConfig(max_grad_norm=None, step_dtype="bfloat16")
    step = plan_step(parameters, now.optimizer, run.gradients[3], config, no_frozen_scale)
    assert step.stepped
    assert [n for n in written if not torch.equal(step.stepped[n], written[n])] == []
    assert step.kept == dict.fromkeys(parameters, torch.bfloat16)
    result = EntropyProbe(now.model, now.optimizer).predict(gradient=run.gradients[3], evaluation=rollouts(20))
    assert any("no state that tells whether training keeps them in it" in n for n in texts(result.diagnostics.notes))


def test_state_of_an_optimizer_that_keeps_it_in_float32_does_not_tell(runs):
    """Adafactor of transformers, whose own code rounds to the weights' type when asked to step in it."""
    run = runs("bfloat16, adafactor")
    now, after = run.load(2), run.load(3)
    parameters, written = (optimizer_parameters(s.model, s.optimizer) for s in (now, after))
    given = (parameters, now.optimizer, run.gradients[3])
    config = ProbeConfig(max_grad_norm=None)
    assert plan_step(*given, config, no_frozen_scale).kept == {}
    step = plan_step(*given, config.model_copy(update={"step_dtype": "bfloat16"}), no_frozen_scale)
    assert step.stepped
    assert [n for n in written if not torch.equal(step.stepped[n], written[n])] == []
    result = EntropyProbe(now.model, now.optimizer, config).predict(gradient=run.gradients[3], evaluation=rollouts(20))
    assert any("a trainer adds its steps to a float32 copy" in text for text in texts(result.diagnostics.notes))


def test_a_probe_of_it_adds_up_and_measures_the_rounded_step(runs):
    run = runs("bfloat16")
    now, after = run.load(2), run.load(3)
    probe = EntropyProbe(now.model, now.optimizer, ProbeConfig(max_grad_norm=None))
    result = probe.run(gradient=run.gradients[3], evaluation=rollouts(40))
    assert result.predicted
    assert result.realized
    parts = {name: part.value for name, part in result.components.items()}
    assert parts.keys() == {"gradient", "momentum", "weight_decay", "rounding"}
    assert sum(parts.values()) == pytest.approx(result.predicted.value, rel=1e-5)
    assert abs(parts["rounding"]) > 0.01 * abs(result.predicted.value)
    assert result.realized.step_rounding == 0.0
    assert result.step
    before, written = (dict(s.model.named_parameters()) for s in (now, after))
    for n, move in result.step.delta.items():
        torch.testing.assert_close(move, written[n].detach() - before[n].detach(), rtol=0, atol=1e-7)
        assert torch.equal(result.step.gradient[n], run.gradients[3][n])
    assert not any("rounding" in line for line in result.diagnostics.not_modelled)
    wide = EntropyProbe(now.model, now.optimizer, ProbeConfig(max_grad_norm=None, step_dtype="float32"))
    other = wide.run(gradient=run.gradients[3], evaluation=rollouts(40))
    assert other.components.keys() == {"gradient", "momentum", "weight_decay"}
    for name, part in other.components.items():
        assert part.value == pytest.approx(parts[name], rel=1e-5)
    assert any("the rounding of the step to bfloat16" in line for line in other.diagnostics.not_modelled)


def test_a_live_model_is_stepped_in_its_own_precision(runs):
    run = runs("bfloat16, foreach")
    now, after = run.load(2, dtype="bfloat16"), run.load(3, dtype="bfloat16")
    config = ProbeConfig(max_grad_norm=None, dtype="bfloat16")
    result = EntropyProbe(now.model, now.optimizer, config).run(gradient=run.gradients[3], evaluation=rollouts(20))
    assert "rounding" in result.components
    assert result.step
    before, written = (dict(s.model.named_parameters()) for s in (now, after))
    for n, move in result.step.delta.items():
        change = written[n].detach().float() - before[n].detach().float()
        torch.testing.assert_close(move, change, rtol=0, atol=1e-7)
    assert result.realized
    assert result.realized.step_rounding == 0.0


def test_everything_else_that_a_probe_does_works_on_it(runs):
    state = load_checkpoint(runs("bfloat16").checkpoint(2))
    probe = EntropyProbe(state.model, state.optimizer)
    update, evaluation = rollouts(16, 1, group=4), rollouts(40)
    attribution = probe.attribute(update=update, evaluation=evaluation)
    step = attribution.result.step
    assert step
    wide = EntropyProbe(state.model, state.optimizer, ProbeConfig(step_dtype="float32"))
    unrounded = wide.predict(update=update, evaluation=evaluation).step
    assert unrounded
    moving = {n: move != 0 for n, move in unrounded.delta.items()}
    still = sum(int((moving[n] & (move == 0)).sum()) for n, move in step.delta.items())
    share = still / sum(int(moves.sum()) for moves in moving.values())
    (said,) = [text for text in texts(attribution.result.diagnostics.notes) if text.startswith("training rounds")]
    assert f"rounds the step to bfloat16, and so it is here: {share:.1%} of the elements" in said
    assert 0.01 < share < 1
    assert attribution.result.predicted
    assert sum(layer.total for layer in attribution.layers) == pytest.approx(attribution.result.predicted.value)
    assert attribution.summary.rounding == pytest.approx(attribution.result.components["rounding"].value)
    assert attribution.summary.rounding != 0.0
    swept = probe.sweep(update=update, evaluation=evaluation, learning_rates=[1e-4, 1e-3])
    assert swept.prediction.components.keys() == {"gradient", "momentum", "weight_decay"}
    assert any("rounding of the step" in line for line in swept.prediction.diagnostics.not_modelled)
    asked = {"without_prompts": {"prompts": [[0], [1, 2]]}}
    answered = probe.run(update=update, evaluation=evaluation, questions=asked)
    assert answered.predicted == attribution.result.predicted
    validation = probe.validate(attribution, evaluation=evaluation, subsets=4)
    assert len(validation.steps) == 4
    frozen = EntropyProbe(state.model, state.optimizer, ProbeConfig(geometry="frozen")).predict(
        update=update, evaluation=evaluation
    )
    assert frozen.components.keys() == {"gradient"}
    assert any("rounding of the step" in line for line in frozen.diagnostics.not_modelled)


def test_float32_checkpoints_are_not_rounded(runs):
    state = load_checkpoint(runs("full").checkpoint(2))
    result = EntropyProbe(state.model, state.optimizer).predict(
        gradient=runs("full").gradients[3], evaluation=rollouts(20)
    )
    assert result.components.keys() == {"gradient", "momentum", "weight_decay"}
    assert not any("float32 copy" in text for text in texts(result.diagnostics.notes))
    with pytest.raises(ValueError, match=r"step_dtype: expected weights that are numbers of bfloat16"):
        EntropyProbe(state.model, state.optimizer, ProbeConfig(step_dtype="bfloat16")).predict(
            gradient=runs("full").gradients[3], evaluation=rollouts(20)
        )
