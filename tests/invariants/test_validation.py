"""Steps on halves of the update prompts: the steps are the optimizer's, and contributions rank them."""

import pytest
import torch
from scipy.stats import spearmanr

from entropy_probe import Validation
from tests.invariants.test_attribution import with_advantages
from tests.invariants.test_probe import batches, probe
from tests.invariants.test_untouched import WithState, assert_same, state
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
    assert len({step.kept for step in found.steps}) > 1


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


def test_a_step_that_cannot_be_measured_is_named():
    model = TinyPolicy()
    update, evaluation = batches(n=20)
    subject = probe(model, trained_optimizer(model), learning_rate=1.0, min_ess_fraction=0.99)
    attribution = subject.attribute(update=update, evaluation=evaluation)
    with pytest.raises(ValueError, match=r"validate: the step moves the policy too far .* lower the learning rate"):
        subject.validate(attribution, evaluation=evaluation, subsets=4)


def test_leaves_no_trace():
    torch.manual_seed(4)
    model = WithState()
    optimizer = trained_optimizer(model)
    subject = probe(model, optimizer)
    update, evaluation = batches(n=20)
    before = state(model, optimizer)
    subject.validate(subject.attribute(update=update, evaluation=evaluation), evaluation=evaluation, subsets=4)
    assert_same(before, state(model, optimizer))
