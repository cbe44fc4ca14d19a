"""Steps on halves of the update prompts: the steps are the optimizer's, and contributions rank them."""

from itertools import combinations

import pytest
import torch
from scipy.stats import spearmanr

from entropy_probe import Validation
from entropy_probe.estimators.attribution import rank_correlation_interval
from entropy_probe.validation import HalfSteps, distinct_halves
from tests.invariants.problems import batches, probe, with_advantages
from tests.invariants.traces import WithState, assert_same, state
from tests.reference.enumeration import TinyPolicy, trained_optimizer


@pytest.mark.parametrize("settings", [{}, {"max_stored_gradient_gib": 0}, {"geometry": "frozen"}],
                         ids=["stored", "passes", "frozen"])  # fmt: skip
def test_each_half_is_a_real_step_with_the_other_advantages_at_0(settings):
    model = TinyPolicy()
    subject = probe(model, trained_optimizer(model), max_grad_norm=1e-2, frozen_max_scale=1e12, **settings)
    update, evaluation = batches()
    found = subject.validate(
        subject.attribute(update=update, evaluation=evaluation), evaluation=evaluation, subsets=4, seed=3
    )
    whole = subject.attribute(update=update, evaluation=evaluation)
    for step in found.steps:
        assert len(step.kept) == update.num_prompts // 2
        kept = torch.isin(update.prompt_ids, torch.tensor(step.kept))
        reduced = with_advantages(update, torch.where(kept, update.advantages, 0.0))
        expected = subject.measure(update=reduced, evaluation=evaluation).realized.value
        assert step.realized == pytest.approx(expected, rel=1e-9, abs=1e-15)
        assert step.contribution == pytest.approx(whole.tokens[kept].sum().item(), rel=1e-9, abs=1e-18)
        assert step.covariance == pytest.approx(whole.covariances[kept].sum().item(), rel=1e-9)
    assert len({step.kept for step in found.steps}) == 4


@pytest.mark.parametrize("prompts", [4, 7])
@pytest.mark.parametrize("still", [(), (1,), (0, 2, 3), (0, 1, 2, 3)])
def test_halves_differ_in_prompts_with_an_advantage_and_none_is_missing(prompts, still):
    moving = torch.ones(prompts, dtype=torch.bool)
    moving[list(still)] = False
    every = {tuple(k for k in kept if moving[k]) for kept in combinations(range(prompts), prompts // 2)}
    halves = distinct_halves(moving, 1000, seed=0)
    assert len(halves) == len(every)
    assert {tuple(k for k in kept.tolist() if moving[k]) for kept in halves} == every
    assert all(len(kept) == prompts // 2 and kept.tolist() == sorted(kept.tolist()) for kept in halves)
    few = distinct_halves(moving, 3, seed=1)
    assert len({tuple(kept[moving[kept]].tolist()) for kept in few}) == len(few) == min(3, len(every))


def test_fewer_halves_than_asked_for_are_counted_and_said():
    model = TinyPolicy()
    subject = probe(model, trained_optimizer(model), learning_rate=1e-5)
    update, evaluation = batches(groups=4, n=20)
    update = with_advantages(update, torch.tensor([1.0, -1.0] * (len(update) // 2)))
    found = subject.validate(subject.attribute(update=update, evaluation=evaluation), evaluation=evaluation, subsets=40)
    assert len({step.kept for step in found.steps}) == len(found.steps) == found.num_measured == 6
    assert "4 update prompts with an advantage have 6 different halves, fewer than the 40 asked for" in found.messages
    assert found.contributions.low < found.contributions.value

    still = with_advantages(update, torch.where(update.prompt_ids > update.prompt_ids.min(), 0.0, update.advantages))
    found = subject.validate(subject.attribute(update=still, evaluation=evaluation), evaluation=evaluation)
    assert [len(step.kept) for step in found.steps] == [2, 2]  # with the one prompt, and without
    assert found.contributions is found.covariance is None
    assert "no rank correlation: expected at least 4 measured steps on different halves, got 2" in found.messages
    assert found.undefined == "fewer than 4 measured steps"


def test_contributions_rank_small_steps_and_noise_does_not():
    model = TinyPolicy()
    subject = probe(model, trained_optimizer(model), learning_rate=1e-5)
    update, evaluation = batches(groups=12, n=200)
    attribution = subject.attribute(update=update, evaluation=evaluation)
    found = subject.validate(attribution, evaluation=evaluation, subsets=30)
    assert found.contributions.value > 0.95
    assert found.contributions.low < found.contributions.value < found.contributions.high
    columns = [[getattr(step, name) for step in found.steps] for name in ("contribution", "covariance", "realized")]
    assert found.contributions.value == pytest.approx(spearmanr(columns[0], columns[2]).statistic, rel=1e-12)
    assert found.covariance.value == pytest.approx(-spearmanr(columns[1], columns[2]).statistic, rel=1e-12)
    again = subject.validate(attribution, evaluation=evaluation, subsets=30, seed=1)
    assert {step.kept for step in again.steps} != {step.kept for step in found.steps}


def test_saved_and_loaded(tmp_path):
    model = TinyPolicy()
    subject = probe(model, trained_optimizer(model))
    update, evaluation = batches(n=20)
    still = with_advantages(update, torch.zeros(len(update)))
    found = subject.validate(subject.attribute(update=still, evaluation=evaluation), evaluation=evaluation, subsets=4)
    assert found.contributions is None
    found.save(tmp_path)
    assert Validation.load(tmp_path) == found


def test_too_few_prompts_or_subsets_are_refused():
    model = TinyPolicy()
    subject = probe(model, trained_optimizer(model))
    update, evaluation = batches(groups=3, n=20)
    few = subject.attribute(update=update, evaluation=evaluation)
    with pytest.raises(ValueError, match="validate: expected at least 4 update prompts to take halves of, got 3"):
        subject.validate(few, evaluation=evaluation)
    update, evaluation = batches(n=20)
    with pytest.raises(ValueError, match="subsets: expected at least 4, got 3"):
        subject.validate(subject.attribute(update=update, evaluation=evaluation), evaluation=evaluation, subsets=3)


def test_another_optimizer_than_that_of_the_attribution_is_refused():
    model = TinyPolicy()
    update, evaluation = batches(groups=20, n=20)
    attribution = probe(model, trained_optimizer(model)).attribute(update=update, evaluation=evaluation)
    other = probe(model, trained_optimizer(model, cls=torch.optim.RMSprop))
    with pytest.raises(ValueError, match=r"optimizer of the attribution, .* got torch.optim.RMSprop"):
        other.validate(attribution, evaluation=evaluation, subsets=4)


def test_steps_that_cannot_be_measured_are_left_out_and_said(monkeypatch):
    model = TinyPolicy()
    update, evaluation = batches(n=20)
    subject = probe(model, trained_optimizer(model), learning_rate=1.0, min_ess_fraction=0.99)
    attribution = subject.attribute(update=update, evaluation=evaluation)
    found = subject.validate(attribution, evaluation=evaluation, subsets=5)
    assert found.num_measured == 0
    assert all(step.realized is None and step.failure for step in found.steps)
    assert "5 of 5 steps on halves could not be measured" in " ".join(found.messages)
    assert found.contributions is None

    measure, calls = HalfSteps._measure, []

    def sometimes(self, start, learning_rate, phase):
        calls.append(phase)
        if len(calls) == 5:
            raise ValueError("scores after the step: not finite")
        return measure(self, start, learning_rate if len(calls) == 3 else 1e-6, phase)

    monkeypatch.setattr(HalfSteps, "_measure", sometimes)
    found = subject.validate(attribution, evaluation=evaluation, subsets=8)
    assert [k for k, step in enumerate(found.steps) if step.realized is None] == [2, 4]
    assert "effective sample size" in found.steps[2].failure
    assert found.steps[2].failure in next(m for m in found.messages if m.startswith("2 of 8 steps on halves"))
    assert found.steps[4].failure == "scores after the step: not finite"
    assert found.num_measured == 6
    kept = [step for step in found.steps if step.realized is not None]
    expected = spearmanr([step.contribution for step in kept], [step.realized for step in kept]).statistic
    assert found.contributions.value == pytest.approx(expected, rel=1e-12)
    assert found.contributions.low == pytest.approx(rank_correlation_interval(expected, 6)[0])


def test_leaves_no_trace():
    torch.manual_seed(4)
    model = WithState()
    optimizer = trained_optimizer(model)
    subject = probe(model, optimizer)
    update, evaluation = batches(n=20)
    before = state(model, optimizer)
    subject.validate(subject.attribute(update=update, evaluation=evaluation), evaluation=evaluation, subsets=4)
    assert_same(before, state(model, optimizer))
