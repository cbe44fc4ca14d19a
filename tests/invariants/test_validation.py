"""Steps on halves of the update prompts: the steps are the optimizer's, and contributions rank them."""

import re
from functools import partial
from itertools import combinations

import pytest
import torch
from scipy.stats import spearmanr

from entropy_probe import EntropyProbe, ProbeConfig, Validation
from entropy_probe.analyses import validate
from entropy_probe.analyses.evaluation_part import EvaluationPart
from entropy_probe.analyses.own_batch import admit_own
from entropy_probe.analyses.plan import plan
from entropy_probe.analyses.reduced import step_on
from entropy_probe.analyses.validate import distinct_halves
from entropy_probe.estimators.baselines import PositionSums
from entropy_probe.estimators.published import PUBLISHED
from entropy_probe.gradients.rows import flat
from entropy_probe.parallel.batch import LocalRows
from entropy_probe.types import Clusters
from tests.invariants.hf_problems import policy, rollouts
from tests.invariants.problems import batches, with_advantages, with_reference
from tests.invariants.problems import probe as any_probe
from tests.invariants.traces import WithState, assert_same, state
from tests.notes import texts
from tests.reference.enumeration import LONGEST, Table, TinyPolicy, trained_optimizer
from tests.reference.samplers import full_scores

probe = partial(any_probe, horizon=None)  # contributions to the whole response


@pytest.mark.parametrize("settings", [{}, {"max_stored_gradient_gib": 0}, {"geometry": "frozen"},
                                      {"entropy": "surprisal", "realized": "snis"}],
                         ids=["stored", "passes", "frozen", "surprisal"])  # fmt: skip
def test_each_half_is_a_real_step_with_the_other_advantages_at_0(settings):
    model = TinyPolicy()
    subject = probe(model, trained_optimizer(model), max_grad_norm=1e-2, frozen_max_scale=1e12,
                    evaluation_unit="sequence", **settings)  # fmt: skip
    update, evaluation = batches()
    whole = subject.attribute(update=update, evaluation=evaluation)
    found = subject.validate(whole, evaluation=evaluation, subsets=4, seed=3)
    # halves of the evaluation batch are batches of their own: neither baselines nor H are shared
    half_of = torch.randperm(len(evaluation), generator=torch.Generator().manual_seed(3)) % 2
    halves = [evaluation.select(half_of == half) for half in (0, 1)]
    by_half = [subject.attribute(update=update, evaluation=half) for half in halves]
    for step in found.steps:
        assert len(step.kept) == update.num_prompts // 2
        kept = torch.isin(update.prompt_ids, torch.tensor(step.kept))
        reduced = with_advantages(update, torch.where(kept, update.advantages, 0.0))
        realized = [subject.measure(update=reduced, evaluation=e).realized.value for e in (evaluation, *halves)]
        assert (step.realized, *step.realized_by_half) == pytest.approx(realized, rel=1e-9, abs=1e-15)
        scores = full_scores(Table(update), model)
        by_token = {name: forecast(update.token_advantages, scores) for name, forecast in PUBLISHED.items()}
        by_token |= {"contributions": whole.tokens, "advantages": update.token_advantages}
        sums = {name: tokens[kept].sum().item() for name, tokens in by_token.items()}
        drawn = torch.randn(update.num_prompts, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        sums["random"] = drawn[torch.isin(update.prompt_ids.unique(), torch.tensor(step.kept))].sum().item()
        assert step.forecasts == pytest.approx(sums, rel=1e-9, abs=1e-15)
        sums = [half.tokens[kept].sum().item() for half in by_half]
        assert step.contributions_by_half == pytest.approx(sums, rel=1e-8, abs=1e-15)
    assert len({step.kept for step in found.steps}) == 4


def test_one_batch_leaves_out_a_prompts_own_responses():
    """Both from contributions and from changes, by each half of the batch."""
    model = TinyPolicy()
    optimizer = trained_optimizer(model)
    for moments in optimizer.state.values():  # as large as this policy's gradients
        moments.update(exp_avg=1e-3 * moments["exp_avg"], exp_avg_sq=1e-4 * moments["exp_avg_sq"])
    subject = probe(model, optimizer, max_grad_norm=1e-2, evaluation_unit="prompt", measure_noise_floor=False,
                    loss_type="dr_grpo", max_completion_length=LONGEST)  # fmt: skip
    update, _ = batches(groups=7)
    found = subject.validate(subject.attribute(update=update), subsets=4, seed=3)
    assert found.measured_on == "halves"
    half_of = torch.randperm(7, generator=torch.Generator().manual_seed(3)) % 2
    parts = [torch.arange(7), *((half_of == half).nonzero()[:, 0] for half in (0, 1))]
    with subject._opened() as policy:
        planned = plan(policy, *admit_own(policy, update))
        shares = planned.batch.gradient.stored.double()
        entropies = []
        for part in parts:
            rows = torch.isin(update.prompt_ids, part).nonzero()[:, 0]
            own = Clusters.prompts(update.prompt_ids[rows])
            some = planned.before.scores.select(rows)
            piece = EvaluationPart(rows, LocalRows.whole(own), some, PositionSums.of(some), part)
            entropies.append(validate._slope(planned, piece, None, store=True).stored.double())
        steps = [step_on(planned, torch.tensor(step.kept)) for step in found.steps]

    def terms(step, part, entropy):
        """``<mean of others' x, y>`` of every prompt and, of those in the part, ``<x, y> - <mean of others' x, y>``."""
        scale = flat(step.gradient_scale, step.gradient_scale).double()
        by_others, beyond = {}, {}
        for unit in range(7):
            others = entropy[part != unit]
            by_others[unit] = -step.gradient.factor * (others.mean(0) * scale * shares[unit]).sum().item()
            for x in entropy[part == unit]:
                beyond[unit] = -step.gradient.factor * (x * scale * shares[unit]).sum().item() - by_others[unit]
        return by_others, beyond

    seen = []
    for step, taken in zip(found.steps, steps, strict=True):
        kept = torch.isin(update.prompt_ids, torch.tensor(step.kept))
        reduced = with_advantages(update, torch.where(kept, update.advantages, 0.0))
        for k, (part, entropy) in enumerate(zip(parts, entropies, strict=True)):
            judged = update.select(torch.isin(update.prompt_ids, part))
            size = judged.response_mask.sum().item()
            plain = subject.measure(update=reduced, evaluation=judged).realized.value
            own = sum(x for unit, x in terms(taken, part, entropy)[1].items() if unit in step.kept) / size
            seen.append(abs(own / plain))
            got = (step.realized, *step.realized_by_half)[k]
            assert got == pytest.approx(plain - own, rel=1e-6)
            if k:
                by_others, _ = terms(planned.step, part, entropy)
                expected = len(part) * sum(by_others[unit] for unit in step.kept) / size
                assert step.contributions_by_half[k - 1] == pytest.approx(expected, rel=1e-6)
    assert max(seen) > 0.01
    few = probe(model, trained_optimizer(model), max_stored_gradient_gib=0)
    with pytest.raises(ValueError, match="validate: expected the prompts' gradients to fit into max_stored_gradient"):
        few.validate(few.attribute(update=update), subsets=4)


def test_forecasts_are_held_against_rollouts_that_they_do_not_come_from():
    model = TinyPolicy()
    subject = probe(model, trained_optimizer(model), learning_rate=1e-5)
    update, evaluation = batches(groups=12, n=120)
    _, other = batches(seed=7, groups=12, n=160)
    attribution = subject.attribute(update=update, evaluation=evaluation)
    shuffled = evaluation.select(torch.randperm(120, generator=torch.Generator().manual_seed(1)))
    for batch, crossed in ((evaluation, True), (shuffled, True), (other, False)):
        found = subject.validate(attribution, evaluation=batch, subsets=8)
        assert found.measured_on == ("halves" if crossed else "others")
        assert found.num_sequences == len(batch)
        columns = {
            name: torch.tensor([getattr(step, name) for step in found.steps])
            for name in ("contributions_by_half", "realized_by_half", "realized")
        }
        by_half, changes = columns["contributions_by_half"].T, columns["realized_by_half"].T
        agreement, of_forecast = spearmanr(*changes).statistic, spearmanr(*by_half).statistic
        for name in found.correlations:
            forecast = torch.tensor([step.forecasts[name] for step in found.steps])
            noisy, ratio = name == "contributions", 2 * 120 / len(batch)
            if crossed:
                pairs = by_half if noisy else (forecast, forecast)
                expected = (spearmanr(pairs[0], changes[1]).statistic + spearmanr(pairs[1], changes[0]).statistic) / 2
                ceiling = (agreement * (of_forecast if noisy else 1)) ** 0.5
            else:
                expected = spearmanr(forecast, columns["realized"]).statistic
                known = ratio * of_forecast / (1 + (ratio - 1) * of_forecast) if noisy else 1
                ceiling = (2 * agreement / (1 + agreement) * known) ** 0.5
            assert found.correlations[name].value == pytest.approx(expected, rel=1e-9)
            assert found.correlations[name].ceiling == pytest.approx(ceiling, rel=1e-9)
            assert found.correlations[name].corrected == pytest.approx(expected / ceiling, rel=1e-9)
        expected = agreement if crossed else 2 * agreement / (1 + agreement)
        assert found.reliability == pytest.approx(expected, rel=1e-9)


def test_more_rollouts_are_proposed_where_the_changes_are_mostly_noise():
    model = TinyPolicy()
    subject = probe(model, trained_optimizer(model), learning_rate=1e-5)
    update, evaluation = batches(seed=3, groups=12, n=12)
    found = subject.validate(subject.attribute(update=update, evaluation=evaluation), evaluation=evaluation, subsets=20)
    assert found.reliability < 0.8
    (message,) = [m for m in texts(found.notes) if "reliability" in m]
    needed = 12 * 0.9 * (1 - found.reliability) / (found.reliability * 0.1)
    (said,) = re.findall(r"about ([\d,]+) evaluation sequences would bring it to 0.9", message)
    assert int(said.replace(",", "")) == pytest.approx(needed, rel=0.05)
    few = batches(n=3)[1]
    with pytest.raises(
        ValueError, match="expected at least 4 independent clusters of evaluation rollouts to halve, got 3"
    ):
        subject.validate(subject.attribute(update=update, evaluation=evaluation), evaluation=few, subsets=4)


def test_rollouts_that_overlap_those_of_the_contributions_are_halved():
    model, optimizer = policy("lora")
    subject = EntropyProbe(model, optimizer, ProbeConfig(learning_rate=1e-5, horizon=None))
    update, evaluation = rollouts(), rollouts(n=48, seed=1)
    attribution = subject.attribute(update=update, evaluation=evaluation.select(torch.arange(24)))
    for rows, measured_on in ((torch.arange(12, 36), "halves"), (torch.arange(24, 48), "others")):
        found = subject.validate(attribution, evaluation=evaluation.select(rows), subsets=4)
        assert found.measured_on == measured_on


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


def test_a_kl_term_moves_prompts_without_an_advantage_too():
    model = TinyPolicy()
    loss = {"loss": {"trainer": "trl", "beta": 0.5}}
    subject = probe(model, trained_optimizer(model), learning_rate=1e-5, **loss)
    update, evaluation = batches(groups=4, n=20)
    update = with_reference(with_advantages(update, torch.zeros(len(update))))
    attribution = subject.attribute(update=update, evaluation=evaluation)
    found = subject.validate(attribution, evaluation=evaluation, subsets=40)
    assert len({step.kept for step in found.steps}) == len({step.realized for step in found.steps}) == 6


def test_fewer_halves_than_asked_for_are_counted_and_said():
    model = TinyPolicy()
    subject = probe(model, trained_optimizer(model), learning_rate=1e-5)
    update, evaluation = batches(groups=4, n=20)
    update = with_advantages(update, torch.tensor([1.0, -1.0] * (len(update) // 2)))
    found = subject.validate(subject.attribute(update=update, evaluation=evaluation), evaluation=evaluation, subsets=40)
    assert len({step.kept for step in found.steps}) == len(found.steps) == found.num_measured == 6
    assert "4 update prompts with a gradient have 6 different halves, fewer than the 40 asked for" in texts(found.notes)
    contributions = found.correlations["contributions"]
    assert contributions.low < contributions.value

    still = with_advantages(update, torch.where(update.prompt_ids > update.prompt_ids.min(), 0.0, update.advantages))
    found = subject.validate(subject.attribute(update=still, evaluation=evaluation), evaluation=evaluation)
    assert [len(step.kept) for step in found.steps] == [2, 2]  # with the one prompt, and without
    assert set(found.correlations.values()) == {None}
    assert found.reliability is None
    assert "no rank correlation: expected at least 4 measured steps on different halves, got 2" in texts(found.notes)
    assert found.undefined == "fewer than 4 steps were measured"


def test_contributions_rank_small_steps_and_simpler_forecasts_do_not():
    model = TinyPolicy()
    subject = probe(model, trained_optimizer(model), learning_rate=1e-5)
    update, evaluation = batches(groups=12, n=600)
    attribution = subject.attribute(update=update, evaluation=evaluation)
    found = subject.validate(attribution, evaluation=evaluation, subsets=20)
    ours = found.correlations["contributions"]
    assert ours.corrected > 0.95
    assert ours.low < ours.value < ours.high
    assert all(abs(found.correlations[name].value) < ours.value for name in ("covariance", "advantages"))
    again = subject.validate(attribution, evaluation=evaluation, subsets=20, seed=1)
    assert {step.kept for step in again.steps} != {step.kept for step in found.steps}


def test_saved_and_loaded(tmp_path):
    model = TinyPolicy()
    subject = probe(model, trained_optimizer(model))
    update, evaluation = batches(n=20)
    still = with_advantages(update, torch.zeros(len(update)))
    found = subject.validate(subject.attribute(update=still, evaluation=evaluation), evaluation=evaluation, subsets=4)
    assert found.correlations["contributions"] is None
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
    assert "5 of 5 steps on halves could not be measured" in " ".join(texts(found.notes))
    assert found.correlations["contributions"] is None

    after, calls = validate.after_step, []

    def sometimes(plan, step, learning_rate, phase):
        calls.append(phase)
        if len(calls) == 5:
            raise ValueError("scores after the step: not finite")
        return after(plan, step, learning_rate if len(calls) == 3 else 1e-6, phase)

    monkeypatch.setattr(validate, "after_step", sometimes)
    found = subject.validate(attribution, evaluation=evaluation, subsets=8)
    assert [k for k, step in enumerate(found.steps) if step.realized is None] == [2, 4]
    assert "effective sample size" in found.steps[2].failure
    assert found.steps[2].failure in next(m for m in texts(found.notes) if m.startswith("2 of 8 steps on halves"))
    assert found.steps[4].failure == "scores after the step: not finite"
    assert found.num_measured == 6
    kept = [step for step in found.steps if step.realized is not None]
    columns = [[x[k] for x in (step.contributions_by_half for step in kept)] for k in (0, 1)]
    changes = [[step.realized_by_half[k] for step in kept] for k in (0, 1)]
    expected = (spearmanr(columns[0], changes[1]).statistic + spearmanr(columns[1], changes[0]).statistic) / 2
    assert found.correlations["contributions"].value == pytest.approx(expected, rel=1e-12)


def test_leaves_no_trace():
    torch.manual_seed(4)
    model = WithState()
    optimizer = trained_optimizer(model)
    subject = probe(model, optimizer)
    update, evaluation = batches(n=20)
    before = state(model, optimizer)
    subject.validate(subject.attribute(update=update, evaluation=evaluation), evaluation=evaluation, subsets=4)
    assert_same(before, state(model, optimizer))
