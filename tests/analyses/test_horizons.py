"""The profile over horizons of a result, against predictions and measurements made otherwise."""

import pytest
import torch

from entropy_probe import EntropyProbe, ProbeConfig
from entropy_probe.analyses.attribution_horizon import at_own_horizon
from entropy_probe.analyses.batches import admit_batches
from entropy_probe.analyses.plan import plan
from entropy_probe.analyses.predict import predict
from entropy_probe.report.sections.run import step_section
from tests.invariants.hf_problems import policy, rollouts

RATE = 1e-4
THIRD_ORDER = 5e-3
"""What the profile's slopes, from two opposite steps, leave."""


def double_policy():
    model, optimizer = policy("lora")
    for state in optimizer.state.values():
        state |= {name: state[name].double() for name in ("exp_avg", "exp_avg_sq")}
    return model.double(), optimizer


def result(n: int = 24, **settings):
    probe = EntropyProbe(*double_policy(), ProbeConfig(learning_rate=RATE, dtype="float64", **settings))
    return probe.run(update=rollouts(), evaluation=rollouts(n=n, seed=1))


@pytest.mark.parametrize("normalization", ["token", "sequence"])
def test_the_profile_ends_at_the_result_itself(normalization):
    found = result(normalization=normalization)
    horizons = found.horizons
    assert [point.horizon for point in horizons.points] == [0, 1, 2, 4, None]
    whole = horizons.points[-1]
    assert whole.predicted.value == pytest.approx(found.predicted.value, rel=1e-12)
    assert whole.predicted.standard_error == pytest.approx(found.predicted.se_evaluation, rel=1e-9)
    assert whole.realized.value == pytest.approx(found.realized.value, rel=1e-12)
    assert whole.realized.standard_error == pytest.approx(found.realized.standard_error, rel=1e-12)
    for before, point in zip(horizons.points, horizons.points[1:], strict=False):
        assert point.increment.value == pytest.approx(point.predicted.value - before.predicted.value, abs=1e-15)
        assert before.beyond.value == pytest.approx(whole.predicted.value - before.predicted.value, abs=1e-15)
        assert point.realized.value == pytest.approx(point.predicted.value, rel=0.1)


def test_the_shortest_horizon_is_the_mean_change_at_the_visited_prefixes():
    model, optimizer = double_policy()
    probe = EntropyProbe(model, optimizer, ProbeConfig(learning_rate=RATE, dtype="float64"))
    evaluation = rollouts(n=16, seed=1)
    visited = probe.run(update=rollouts(), evaluation=evaluation).horizons.points[0]

    def mean_entropy() -> float:
        log_p = torch.log_softmax(model(evaluation.input_ids, evaluation.attention_mask.long()).logits[:, :-1], -1)
        return -(log_p.exp() * log_p).sum(-1)[evaluation.response_mask[:, 1:]].mean().item()

    with torch.no_grad():
        before = mean_entropy()
        loss = probe._config.loss.coefficients(rollouts(), None).logprobs
    batch = rollouts()
    log_p = torch.log_softmax(model(batch.input_ids, batch.attention_mask.long()).logits[:, :-1], -1)
    (loss[:, 1:] * log_p.gather(-1, batch.input_ids[:, 1:, None])[..., 0]).sum().backward()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.param_groups[0]["lr"] = RATE
    optimizer.step()
    with torch.no_grad():
        assert visited.realized.value == pytest.approx(mean_entropy() - before, rel=1e-4)


def test_which_horizon_states_the_change():
    found = result(horizon=3)
    assert found.horizons.headline == 3
    assert [point.horizon for point in found.horizons.points] == [0, 1, 2, 3, 4, None]
    labels = [row.label for block in step_section(found).blocks if hasattr(block, "rows") for row in block.rows
              if hasattr(row, "label")]  # fmt: skip
    assert "within 3 tokens" in labels
    assert "beyond" in labels
    unresolved = result(n=8)  # of which nothing is told from 0
    assert not unresolved.predicted.distinguishable
    assert unresolved.horizons.headline is not None
    assert unresolved.horizons.stated.beyond is not None


@pytest.mark.parametrize("settings", [{"horizon": None}, {"realized": "snis"}, {"entropy": "surprisal"}])
def test_where_there_is_none(settings):
    assert result(**settings).horizons is None


def test_attribution_is_at_the_shortest_horizon_that_ranks_as_the_whole():
    probe = EntropyProbe(*double_policy(), ProbeConfig(learning_rate=RATE, dtype="float64", measure_noise_floor=False))
    batches = {"update": rollouts(n=32), "evaluation": rollouts(n=24, seed=1)}
    with probe._opened() as opened:
        planned = plan(opened, *admit_batches(opened, *batches.values()))
        whole = predict(planned)
        by_prompt = {k: predict(planned, k).by_prompt for k in (0, 1, 2, 4)}
        alike = {k: torch.corrcoef(torch.stack([x, whole.by_prompt]))[0, 1].item() for k, x in by_prompt.items()}
        shortest = min((k for k in alike if alike[k] >= 0.99), default=None)
        chosen, correlation = at_own_horizon(whole)
    assert alike[0] < alike[1] < alike[4]
    assert chosen.horizon == shortest
    assert correlation == pytest.approx(alike[shortest], rel=1e-9)
    assert chosen.by_prompt.tolist() == by_prompt[shortest].tolist()

    probe = EntropyProbe(probe._model, probe._optimizer, probe._config.model_copy(update={"horizon": 1}))
    near = probe.attribute(**batches, folds=4, measure=True)
    assert near.summary.horizon == 1
    assert near.summary.correlation_with_whole == pytest.approx(alike[1], rel=1e-6)
    point = next(point for point in near.result.horizons.points if point.horizon == 1)
    parts = (near.summary.gradient, near.summary.momentum, near.summary.weight_decay)
    assert sum(parts) == pytest.approx(point.predicted.value, rel=THIRD_ORDER)
    assert sum(layer.total for layer in near.layers) == pytest.approx(sum(parts), rel=1e-6)
    assert near.tokens.sum().item() == pytest.approx(near.summary.gradient, rel=1e-9)
    torch.testing.assert_close(near.prompts, by_prompt[1], rtol=1e-6, atol=1e-15)
    assert near.result.predicted.value == pytest.approx(whole.change.value, rel=1e-9)


def test_a_sweep_has_one_horizon_for_all_rates():
    batches = {"update": rollouts(), "evaluation": rollouts(n=24, seed=1)}
    rates = (1e-5, 3e-5, RATE)

    def swept(**settings):
        probe = EntropyProbe(*double_policy(), ProbeConfig(dtype="float64", **settings))
        return probe.sweep(**batches, learning_rates=rates)

    points, sweep = result(horizon=1).horizons.points, swept(horizon=1)
    point = next(point for point in points if point.horizon == 1)
    assert sweep.horizon == 1
    last = sweep.points[-1]
    assert last.predicted.value == pytest.approx(point.predicted.value, rel=THIRD_ORDER)
    assert last.predicted.se_evaluation == pytest.approx(point.predicted.standard_error, rel=0.15)  # lengths from some
    assert last.realized.value == pytest.approx(point.realized.value, rel=1e-9)
    for each in sweep.points:
        assert each.realized.value == pytest.approx(each.predicted.value, rel=0.1)
        assert each.difference.standard_error < 0.2 * each.predicted.se_evaluation
    assert swept(horizon=None).horizon is None


def test_a_sweep_that_is_lost_in_noise_is_within_the_horizon_of_the_headline():
    probe = EntropyProbe(*double_policy(), ProbeConfig(dtype="float64"))
    sweep = probe.sweep(update=rollouts(), evaluation=rollouts(n=8, seed=1), learning_rates=(1e-5, RATE))
    assert sweep.horizon == result(n=8).horizons.headline is not None
