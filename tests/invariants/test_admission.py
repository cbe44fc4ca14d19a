"""Prompts with several ids, responses that the trainer masks out, rows of one trajectory: through the whole probe."""

import math
from dataclasses import replace

import pytest
import torch

from entropy_probe import EntropyProbe, ProbeConfig, Rollouts
from entropy_probe.losses.trl import TRLLoss
from entropy_probe.report import page, run_sections
from entropy_probe.report.tables import check_tables, read_tables
from tests.invariants.hf_problems import policy
from tests.invariants.hf_problems import rollouts as tiny_rollouts
from tests.invariants.problems import batches, numbers, same
from tests.notes import texts
from tests.reference.enumeration import LONGEST, TEMPERATURE, TinyPolicy, trained_optimizer

LOSSES = ("grpo", "dr_grpo", "dapo", "per_prompt_max")


def probe(model, optimizer, **settings) -> EntropyProbe:
    return EntropyProbe(
        model, optimizer, ProbeConfig(**{"temperature": TEMPERATURE, "max_completion_length": LONGEST} | settings)
    )


def by_prompt(batch: Rollouts) -> Rollouts:
    """One id per prompt; prompts have one token here."""
    return replace(batch, prompt_ids=batch.input_ids[:, 0])


def masked_out(batch: Rollouts, rows: list[int]) -> Rollouts:
    mask = batch.response_mask.clone()
    mask[rows] = False
    return replace(batch, response_mask=mask)


def test_copies_of_a_prompt_are_one_prompt():
    model = TinyPolicy()
    optimizer = trained_optimizer(model)
    update, evaluation = batches()
    by_hand = by_prompt(update)
    assert by_hand.num_prompts < update.num_prompts
    merging, apart = probe(model, optimizer), probe(model, optimizer, merge_equal_prompts=False)
    found = merging.attribute(update=update, evaluation=evaluation, measure=True)
    expected = apart.attribute(update=by_hand, evaluation=evaluation, measure=True)
    same(numbers(found.result), numbers(expected.result))
    assert torch.equal(found.update.prompt_ids, update.prompt_ids)
    first = {int(p): int(update.prompt_ids[by_hand.prompt_ids == p].min()) for p in by_hand.prompt_ids.unique()}
    contributions = {first[int(p)]: x for p, x in zip(expected.prompt_ids, expected.prompts.tolist(), strict=True)}
    assert dict(zip(found.prompt_ids.tolist(), found.prompts.tolist(), strict=True)) == pytest.approx(contributions)
    assert found.result.diagnostics.num_update_prompts == by_hand.num_prompts
    one, two = merging.cross_prompt(update), apart.cross_prompt(by_hand)
    assert one.delta_h1 == pytest.approx(two.delta_h1, rel=1e-10)
    assert one.se_jackknife == pytest.approx(two.se_jackknife, rel=1e-10)
    assert apart.cross_prompt(update).num_clusters == update.num_prompts > one.num_clusters
    # the evaluation batch: groups of a prompt under several ids are one unit
    grouped = probe(model, optimizer, evaluation_unit="prompt").predict(update=update, evaluation=update)
    assert grouped.entropy.num_clusters == by_hand.num_prompts
    validated = merging.validate(found, evaluation=evaluation, subsets=4) if by_hand.num_prompts >= 4 else None
    assert validated is None or validated.num_prompts == by_hand.num_prompts


def test_a_batch_in_groups_stays_one_when_groups_merge_or_responses_are_masked_out():
    """Its prompts are the units: a sequence is not independent of the others of its prompt."""
    model = TinyPolicy()
    update, _ = batches(groups=13)
    merging, apart = (probe(model, trained_optimizer(model), merge_equal_prompts=merge) for merge in (True, False))
    assert by_prompt(update).prompt_ids.unique(return_counts=True)[1].unique().numel() > 1
    given = {"merged": (merging, update), "masked out": (apart, masked_out(update, [5]))}
    for name, (subject, batch) in given.items():
        found = subject.predict(update=batch, evaluation=batch)
        assert found.diagnostics.evaluation_unit == "prompt", name
        assert found.entropy.num_clusters == (3 if name == "merged" else 13)
        assert not any("independent" in message for message in texts(found.diagnostics.notes))


def test_the_trainers_groups_stay_as_given():
    """The longest response of a group, which per_prompt_max divides by, is that of the trainer's group."""
    model = TinyPolicy()
    update, evaluation = batches(groups=36, size=1)
    update = replace(update, advantages=torch.randn(36, generator=torch.Generator().manual_seed(0)))
    norms = [
        probe(model, trained_optimizer(model), loss_type="per_prompt_max", merge_equal_prompts=merge)
        .predict(update=given, evaluation=evaluation)
        .diagnostics.gradient_norm
        for given, merge in ((update, True), (update, False), (by_prompt(update), False))
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-12)
    assert abs(norms[2] / norms[0] - 1) > 1e-3


@pytest.mark.parametrize("loss", LOSSES)
def test_a_masked_out_response_counts_in_the_denominator_and_nowhere_else(loss):
    """The trainer's gradient by hand, with its own denominators; a whole group is masked out too."""
    model, optimizer = policy("full")
    update, evaluation = tiny_rollouts(), tiny_rollouts(40, seed=2, group=1)
    update = masked_out(update, [0, 1, 2, 3, 6])
    config = ProbeConfig(
        loss_type=loss,
        max_completion_length=9,
        max_grad_norm=None,
        merge_equal_prompts=False,
        measure_noise_floor=False,
    )
    result = EntropyProbe(model, optimizer, config).run(update=update, evaluation=evaluation)
    logits = model(input_ids=update.input_ids, attention_mask=update.attention_mask.long()).logits[:, :-1]
    s = logits.log_softmax(-1).gather(-1, update.input_ids[:, 1:, None])[..., 0]
    mask = update.response_mask[:, 1:].float()
    per, tokens = -s * update.advantages[:, None] * mask, mask.sum(1).clamp(min=1)
    group = tokens.view(-1, 4).amax(1).repeat_interleave(4)
    value = {
        "grpo": (per.sum(1) / tokens).mean(),
        "dr_grpo": per.sum() / (len(update) * 9),
        "dapo": per.sum() / mask.sum(),
        "per_prompt_max": (per.sum(1) / group).mean(),
    }[loss]
    gradients = torch.autograd.grad(value, [p for p in model.parameters() if p.requires_grad])
    by_hand = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
    assert result.diagnostics.gradient_norm == pytest.approx(by_hand, rel=1e-5)
    assert result.diagnostics.num_update_sequences == len(update)
    assert result.diagnostics.num_update_prompts == update.num_prompts
    assert bool(torch.isfinite(TRLLoss(loss_type=loss, max_completion_length=9).weights(update)).all())


@pytest.mark.parametrize("shared", [True, False])
def test_everything_downstream_takes_masked_out_responses(shared):
    """With a loss that ignores them (dapo) every number is that of the batch without them."""
    if shared:
        model, optimizer = policy("full")
        update, evaluation = tiny_rollouts(24, group=6), tiny_rollouts(40, seed=2, group=1)
    else:  # no taps and no shared rows
        model = TinyPolicy()
        optimizer, (update, evaluation) = trained_optimizer(model), batches(groups=4, size=6)
    rows = [0, 7, 8, 23]
    kept = torch.ones(len(update), dtype=torch.bool)
    kept[rows] = False
    subject = EntropyProbe(model, optimizer, ProbeConfig(max_tokens_per_microbatch=40, merge_equal_prompts=False))
    found = subject.attribute(update=masked_out(update, rows), evaluation=evaluation, folds=3, measure=True)
    expected = subject.attribute(update=update.select(kept), evaluation=evaluation, folds=3, measure=True)
    same(numbers(found.result), numbers(expected.result), rel=1e-5)
    assert torch.allclose(found.tokens[kept], expected.tokens, rtol=1e-4, atol=1e-9)
    assert (found.tokens[rows] == 0).all()
    validated = subject.validate(found, evaluation=evaluation, subsets=4)
    assert validated.num_prompts == 4
    a, b = (subject.cross_prompt(x) for x in (masked_out(update, rows), update.select(kept)))
    assert a.delta_h1 == pytest.approx(b.delta_h1, rel=1e-4)
    result = subject.one_batch(masked_out(update, rows))
    assert any("4 of 24 responses are masked out" in m for m in texts(result.diagnostics.notes))
    # the first shows that it was sampled in groups, the second no longer does
    config = ProbeConfig(max_tokens_per_microbatch=40, merge_equal_prompts=False, evaluation_unit="prompt")
    of_prompts = EntropyProbe(model, optimizer, config)
    both = (masked_out(update, rows), update.select(kept))
    measured = [of_prompts.measure(update=x, evaluation=x).realized for x in both]
    assert measured[0].value == pytest.approx(measured[1].value, rel=1e-4)


def test_masked_out_responses_are_no_effective_samples():
    """The share of them in the weights between sampler and policy is that of the batch without them."""
    model = TinyPolicy()
    update, evaluation = batches(groups=4, size=6)
    noise = torch.randn(update.input_ids.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    update = replace(update, sampled_logprobs=-1.5 + 0.5 * noise)
    rows = list(range(12))
    subject = probe(model, trained_optimizer(model), merge_equal_prompts=False)
    given = (masked_out(update, rows), update.select(torch.arange(12, 24)))
    a, b = (subject.predict(update=u, evaluation=evaluation).diagnostics.update_mismatch for u in given)
    assert a.ess_fraction == pytest.approx(b.ess_fraction, rel=1e-9)
    assert b.ess_fraction < 0.9


def test_a_prompt_whose_responses_are_all_masked_out_is_in_the_tables(tmp_path):
    model = TinyPolicy()
    update, evaluation = batches(groups=4, size=6)
    found = probe(model, trained_optimizer(model), merge_equal_prompts=False).attribute(
        update=masked_out(update, list(range(6, 12))), evaluation=evaluation
    )
    found.save(tmp_path)
    tables = read_tables(tmp_path)
    check_tables(tables, found.result)
    assert tables.prompts["prompt_id"].tolist() == [0, 1, 2, 3]
    assert tables.prompts["num_responses"].tolist() == [6] * 4
    assert (tables.prompts["num_tokens"][1], tables.prompts["contribution"][1]) == (0, 0.0)
    assert "<!doctype html>" in page(run_sections(found.result, tables))


def test_the_jackknife_takes_masked_out_responses():
    """Leaving out all blocks but one that is masked out leaves nothing, and no NaN."""
    model = TinyPolicy()
    update, evaluation = batches(groups=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    update = masked_out(update, list(range(4)))
    result = probe(model, optimizer, loss_type="grpo", merge_equal_prompts=False).predict(
        update=update, evaluation=evaluation
    )
    assert math.isfinite(result.predicted.se_update)
    two = masked_out(update, list(range(8)))
    alone = probe(model, optimizer, loss_type="grpo", merge_equal_prompts=False).predict(
        update=two, evaluation=evaluation
    )
    assert math.isfinite(alone.predicted.se_update)


@pytest.mark.parametrize("kind", ["rao_blackwell", "surprisal"])
@pytest.mark.parametrize("normalization", ["token", "sequence"])
def test_rows_of_a_trajectory_are_one_sample(monkeypatch, kind, normalization):
    """A batch in which every response stands twice: errors and baselines are those of the single rows."""
    # the change of length is taken from all sequences
    monkeypatch.setattr("entropy_probe.analyses.before.SHARE", 1.0)
    model = TinyPolicy()
    optimizer = trained_optimizer(model)
    update, evaluation = batches(n=50)
    evaluation = replace(evaluation, prompt_ids=torch.arange(50))
    twice = evaluation.select(torch.arange(50).repeat(2))
    twice = replace(twice, trajectory_ids=torch.arange(50).repeat(2) + 7)
    subject = probe(model, optimizer, entropy=kind, normalization=normalization, evaluation_unit="sequence",
                    merge_equal_prompts=False, measure_noise_floor=False)  # fmt: skip
    found, expected = (subject.run(update=update, evaluation=batch) for batch in (twice, evaluation))
    assert found.diagnostics.evaluation_unit == "trajectory"
    assert found.entropy.num_clusters == 50
    assert "prompts of a trajectory's later sequences" in found.diagnostics.not_modelled[0]
    assert expected.diagnostics.not_modelled == ()
    for name in ("entropy", "predicted", "realized"):
        a, b = getattr(found, name), getattr(expected, name)
        assert a.value == pytest.approx(b.value, rel=1e-10), name
        assert a.standard_error == pytest.approx(b.standard_error, rel=1e-10), name
    # as an update batch: prompts that a trajectory goes through are one
    spread = replace(update, trajectory_ids=update.prompt_ids // 3, prompt_ids=torch.arange(len(update)))
    by_hand = replace(update, prompt_ids=update.prompt_ids // 3)
    a, b = (subject.predict(update=u, evaluation=evaluation).predicted for u in (spread, by_hand))
    assert a.se_update == pytest.approx(b.se_update, rel=1e-10)
