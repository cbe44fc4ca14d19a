"""The profile over horizons of a result, against predictions and measurements made otherwise."""

import pytest
import torch

from entropy_probe import EntropyProbe, ProbeConfig
from entropy_probe.report.sections.run import step_section
from tests.invariants.hf_problems import policy, rollouts

RATE = 1e-4


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
