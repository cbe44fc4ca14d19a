"""Rollouts that are not the policy's are noticed by every kind of run, and what is said names the cause."""

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from entropy_probe import ProbeConfig, Rollouts
from entropy_probe.analyses.policy_check import PolicyCheck
from entropy_probe.checkpoints import load_checkpoint
from entropy_probe.estimators.policy_fit import excess_sums, policy_fit
from entropy_probe.gradients.hooks import hookable
from entropy_probe.gradients.per_sample import Side, sample_gradients
from entropy_probe.losses.trl import TRLLoss
from entropy_probe.parallel.batch import LocalRows
from entropy_probe.parallel.ranks import ALONE
from entropy_probe.scoring.adapters import without_adapter
from entropy_probe.scoring.forward import Scorer
from entropy_probe.scoring.sheet import ScoreSheet
from entropy_probe.types import Clusters
from tests.invariants.problems import TABLE, batches, probe
from tests.notes import texts as all_texts
from tests.reference.enumeration import TinyPolicy, trained_optimizer
from tests.reference.samplers import at_temperature, cut, draw, full_scores
from tests.tiny import tiny_policy

MODEL = TinyPolicy()
SCORES = full_scores(TABLE, MODEL)
UPDATE, EVALUATION = batches(groups=9, size=4, n=60)


def sampled(logprobs: Tensor, count: int = 600, seed: int = 0, given: Tensor | None = None) -> Rollouts:
    """Evaluation rollouts drawn with these log-probabilities, with others recorded if given."""
    rows = draw(TABLE, logprobs, count, torch.Generator().manual_seed(seed))
    batch = TABLE.rollouts.select(rows)
    return batch if given is None else replace(batch, sampled_logprobs=given[rows])


def grouped(batch: Rollouts, size: int = 4) -> Rollouts:
    """As an update batch, whose advantages stand for any."""
    advantages = torch.linspace(-1, 1, size, dtype=torch.float64).repeat(len(batch) // size)
    return replace(batch, prompt_ids=torch.arange(len(batch)) // size, advantages=advantages)


def run(evaluation: Rollouts = EVALUATION, update: Rollouts = UPDATE, **settings: object):
    model = TinyPolicy()
    return probe(model, trained_optimizer(model), **settings).predict(update=update, evaluation=evaluation).diagnostics


def texts(notes) -> list[str]:
    """What notes say, but for the groups of these batches, which stand for any and not for prompts."""
    return all_texts(note for note in notes if note.code != "other_prompts_ids")


def about(messages: list[str], role: str) -> str:
    # another policy's responses repeat more often than the policy's own would
    found = [m for m in messages if m.startswith(f"{role}: ") and "occur more than once" not in m]
    assert len(found) == 1, messages
    return found[0]


@pytest.mark.parametrize(
    "settings",
    [{}, {"max_stored_gradient_gib": 0.0}, {"max_tokens_per_microbatch": 1}, {"loss_type": "grpo"}, {"switch": "off"}],
    ids=str,
)
def test_both_batches_are_judged_by_their_own_scores(settings, monkeypatch):
    if settings.pop("switch", None):
        monkeypatch.setattr("entropy_probe.analyses.policy.hookable", lambda *_: "switched off")
    left = (torch.arange(4) + UPDATE.attention_mask.sum(1)[:, None]) % 4  # the padding first
    masks = {name: getattr(UPDATE, name).gather(1, left) for name in ("attention_mask", "response_mask")}
    padded = replace(UPDATE, input_ids=UPDATE.input_ids.gather(1, left), **masks)
    assert bool(padded.attention_mask[:, -1].all())
    for update in (UPDATE, padded):
        found = run(update=update, **settings).policy_fit
        for batch, fit in ((EVALUATION, found.evaluation), (UPDATE, found.update)):
            rows = [int((TABLE.rollouts.input_ids == ids).all(1).nonzero()[0, 0]) for ids in batch.input_ids]
            expected = policy_fit(excess_sums(SCORES.select(torch.tensor(rows))))
            assert fit.z == pytest.approx(expected.z, rel=1e-9)
            assert fit.excess == pytest.approx(expected.excess, rel=1e-9)
            assert (fit.num_sequences, fit.status) == (len(batch), "ok")


@pytest.mark.parametrize("chunked", [True, False])
def test_the_update_gradient_leaves_the_scores_that_scoring_gives(chunked):
    """On every path: one pass for the total, taps with shared prompts, a pass per unit."""
    model, _ = tiny_policy()
    model.eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 90, (9, 12), generator=generator)
    ids[:, :4] = ids[::3, :4].repeat_interleave(3, 0)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    answers = mask.clone()
    answers[:, :4] = 0
    batch = Rollouts(ids, mask, answers, torch.arange(9) // 3, advantages=torch.linspace(-1, 1, 9))
    parameters = dict(model.named_parameters())
    scorer = Scorer(model, 0.7, 64)
    scorer.prepare(batch)
    assert scorer.prefix_sharing == "on"
    if not chunked:
        scorer.lay_out(None)
    expected, loss = scorer.score(batch), TRLLoss(loss_type="dapo").coefficients(batch, None)
    for hooks, store in ((None, False), (hookable(scorer, parameters, batch), True), (None, True)):
        assert not isinstance(hooks, str)
        sheet = ScoreSheet(batch, model)
        with_sheet, without = (
            sample_gradients(
                scorer, parameters, batch, batch.prompt_ids, [Side(loss, store=store)], hooks=hooks, sheet=s
            )[0]
            for s in (sheet, None)
        )
        found = sheet.read()
        for name in ("logprobs", "entropies", "variances"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-5)
        assert all(torch.equal(with_sheet.total[n], g) for n, g in without.total.items() if g is not None)


@pytest.mark.parametrize(
    ("logprobs", "said"),
    [
        (
            at_temperature(TABLE, MODEL, 0.5),
            r"is -.*sampled at a lower temperature, .* likeliest at temperature 0\.[34]",
        ),
        (
            at_temperature(TABLE, MODEL, 1.8),
            r"is \+.*sampled at a higher temperature, .* likeliest at temperature 1\.[3-7]",
        ),
        (cut(TABLE, MODEL, top_p=0.8), "is -.*with top_p, top_k or greedily"),
        (cut(TABLE, MODEL, top_k=1), "is -.*with top_p, top_k or greedily"),
    ],
    ids=["cold", "hot", "top-p", "greedy"],
)
def test_tokens_that_do_not_fit_are_told_by_their_sign(logprobs, said):
    evaluation = sampled(logprobs)
    found = run(evaluation)
    assert found.policy_fit.evaluation.status == "off_policy"
    message = about(texts(found.notes), "evaluation")
    assert message.startswith("evaluation: the responses do not fit the policy: surprisal minus entropy is ")
    assert message.endswith("so results are biased")
    torch.testing.assert_close(torch.tensor(found.policy_fit.update.z), torch.tensor(run().policy_fit.update.z))
    assert re.search(said, message), message
    with pytest.raises(
        ValueError, match=r"evaluation: the responses do not fit the policy.*on_mismatch refuse: expected"
    ):
        run(evaluation, on_mismatch="refuse")
    with pytest.raises(ValueError, match=r"update: the responses do not fit the policy.*on_mismatch refuse: expected"):
        run(update=grouped(evaluation), on_mismatch="refuse")


def test_log_probabilities_that_agree_with_tokens_that_do_not():
    found = run(sampled(cut(TABLE, MODEL, top_p=0.8), given=SCORES.logprobs))
    assert "took a part of the distribution" in about(texts(found.notes), "evaluation")
    found = run(sampled(at_temperature(TABLE, MODEL, 1.8), given=SCORES.logprobs))
    assert "not computed by the sampler, or it changed the logits" in about(texts(found.notes), "evaluation")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (at_temperature(TABLE, MODEL, 1.25), "the policy's at temperature 1, not 0.8"),
        (SCORES.logprobs.sum(1, keepdim=True).expand(-1, 4), "the same number at every token of a response"),
        (SCORES.logprobs.roll(1, 1), "shifted by one token: each is that of the token before"),
        (full_scores(TABLE, TinyPolicy(seed=3)).logprobs, "the tokens are likelier under the policy"),
    ],
    ids=["raw", "sums", "shifted", "other weights'"],
)
def test_log_probabilities_amiss_are_not_a_batch_amiss(given, said):
    """The tokens are the policy's: the results stand, and nothing is weighted by what is wrong."""
    evaluation = sampled(SCORES.logprobs, 1500, given=given)
    found = run(evaluation)
    message = about(texts(found.notes), "evaluation")
    assert "the tokens fit the policy" in message
    assert f"the log-probabilities themselves are amiss: {said}" in message
    assert message.endswith("results stand")
    assert found.policy_fit.evaluation.status == "ok"
    with pytest.raises(ValueError, match=r"themselves are amiss.*weights from them would bias the results"):
        run(evaluation, on_mismatch="reweight")
    update = grouped(evaluation)
    message = about(texts(run(update=update).notes), "update")
    assert said in message
    assert "importance ratios" not in message
    with pytest.raises(ValueError, match=r"update: sampled_logprobs differ .*themselves are amiss"):
        run(update=update, on_mismatch="refuse")


def test_a_batch_amiss_with_right_log_probabilities_says_how():
    hot, part, greedy = at_temperature(TABLE, MODEL, 1.25), cut(TABLE, MODEL, top_k=2), cut(TABLE, MODEL, top_k=1)
    message = about(texts(run(sampled(hot, given=hot)).notes), "evaluation")
    assert "the policy's at temperature 1, not 0.8: the batch was sampled at that temperature" in message
    for logprobs in (part, greedy):
        message = about(texts(run(sampled(logprobs, given=logprobs), max_mismatch=0.01).notes), "evaluation")
        assert "sampled from a part of the distribution (top_p, top_k or greedy)" in message
    other = full_scores(TABLE, TinyPolicy(seed=3)).logprobs
    message = about(texts(run(update=grouped(sampled(other, given=other))).notes), "update")
    assert "sampled from another policy" in message
    assert "importance ratios of the trainer's loss are 1 here" in message


def test_weights_that_do_not_explain_the_batch_are_refused():
    """Tokens of a hot sampler with log-probabilities of a less hot one: consistent enough, but not theirs."""
    evaluation = sampled(at_temperature(TABLE, MODEL, 1.6), 2000, given=at_temperature(TABLE, MODEL, 1.2))
    with pytest.raises(ValueError, match=r"reweighted by pi / pi_sampler it still does not fit the policy \(z = \+"):
        run(evaluation, on_mismatch="reweight")


def test_another_tokenizers_ids_are_called_that():
    ids = TABLE.rollouts.input_ids
    least = SCORES.sequence_logprobs.argsort()[:30].repeat(4)
    assert ids.shape[1] == 4
    message = about(texts(run(TABLE.rollouts.select(least)).notes), "evaluation")
    assert "ids of another tokenizer" in message


def test_a_selected_update_batch_is_not_held_against_the_policy():
    update = grouped(sampled(at_temperature(TABLE, MODEL, 0.5)))
    assert "update_selected" in about(texts(run(update=update).notes), "update")
    found = run(update=update, update_selected=True)
    assert found.policy_fit.update.status == "selected"
    assert not any("policy" in m for m in texts(found.notes))
    assert run(update=update, update_selected=True, on_mismatch="refuse").policy_fit.update.status == "selected"
    # the evaluation batch is judged all the same
    about(texts(run(sampled(at_temperature(TABLE, MODEL, 0.5)), update_selected=True).notes), "evaluation")


def test_every_kind_of_run_says_so():
    cold = sampled(at_temperature(TABLE, MODEL, 0.5))
    update = grouped(cold.select(torch.arange(120)))
    model = TinyPolicy()
    subject = probe(model, trained_optimizer(model))
    one = subject.one_batch(update).diagnostics
    assert one.policy_fit.evaluation == one.policy_fit.update
    assert about(texts(one.notes), "batch")
    same = subject.measure(update=update, evaluation=update).diagnostics
    assert same.policy_fit.evaluation == same.policy_fit.update
    assert same.policy_fit.update == one.policy_fit.update
    assert about(texts(same.notes), "batch")
    sweep = subject.sweep(update=update, evaluation=cold, learning_rates=(1e-5, 1e-4))
    assert about(texts(sweep.prediction.diagnostics.notes), "update")
    attribution = subject.attribute(update=update, evaluation=cold)
    assert about(texts(attribution.result.diagnostics.notes), "evaluation")
    halves = subject.validate(attribution, evaluation=cold, subsets=4)
    assert about(texts(halves.notes), "update")
    assert about(texts(halves.notes), "evaluation")


OLD = full_scores(TABLE, TinyPolicy(seed=3)).logprobs


def later(given=OLD, drawn=OLD, old=OLD):
    """An update batch in a later step on its rollouts: drawn from an older policy, whose log-probabilities it has."""
    update = grouped(sampled(drawn, 400, given=given))
    rows = (update.input_ids[:, None] == TABLE.rollouts.input_ids).all(-1).int().argmax(1)
    return replace(update, old_logprobs=old[rows])


def test_a_batch_of_an_older_policy_is_not_held_against_the_policy():
    found = run(update=later(), on_mismatch="refuse")
    assert found.policy_fit.update.status == "selected"
    assert not [text for text in texts(found.notes) if text.startswith("update")]
    assert found.not_modelled == ()
    both = run(update=(batch := later()), evaluation=replace(batch, prompt_ids=torch.arange(len(batch))))
    assert both.policy_fit.evaluation.status == "off_policy"  # entropy is that of the policy's own responses
    corrected = {"trainer": "trl", "use_vllm": True}
    drawn = grouped(sampled(SCORES.logprobs, 400, given=SCORES.logprobs - 0.2))
    found = run(update=drawn, loss=corrected)
    assert about(texts(found.notes), "update").endswith("the loss weights its tokens by ratios to sampled_logprobs")
    assert found.not_modelled == ()
    without = replace(later(), old_logprobs=None)
    assert "sampled from another policy" in about(texts(run(update=without).notes), "update")


@pytest.mark.parametrize(
    ("amiss", "said"),
    [
        ({"given": SCORES.logprobs}, "update: sampled_logprobs differ from old_logprobs by "),
        ({"drawn": SCORES.logprobs, "given": OLD}, "update: old_logprobs are not those that the responses were drawn"),
    ],
)
def test_old_logprobs_that_do_not_hold_are_said_or_refused(amiss, said):
    assert said in about(texts(run(update=later(**amiss)).notes), "update")
    with pytest.raises(ValueError, match=f"{said}.*on_mismatch refuse"):
        run(update=later(**amiss), on_mismatch="refuse")
    ours = later(given=SCORES.logprobs, drawn=SCORES.logprobs, old=SCORES.logprobs)
    assert run(update=ours, on_mismatch="refuse").policy_fit.update.status == "ok"


@pytest.mark.parametrize(
    ("mean", "other", "alarm"),
    [
        (0.0, None, False),
        ("bfloat16", None, False),
        (0.01, None, False),
        (0.03, None, False),
        (0.0, 1.08, True),
        (0.0, 0.92, True),
        ("few", None, True),
    ],
)
def test_the_alarm_follows_what_rounding_explains(mean, other, alarm):
    """Below ``max_mismatch`` on average: rounding is a little on all tokens, another policy much on few."""
    logprobs = SCORES.logprobs if other is None else at_temperature(TABLE, MODEL, other)
    given, noise = logprobs.clone(), torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(1))
    if mean == "bfloat16":
        given = given.bfloat16().to(given.dtype)
    elif mean == "few":
        given[::20] -= 0.3
    else:
        given += mean * noise
    found = run(sampled(logprobs, 200, given=given))
    assert found.mismatch.mean < 0.05
    assert any(note.numbers.get("mean") == found.mismatch.mean for note in found.notes) == alarm


@pytest.mark.parametrize(
    ("had", "noise", "said"),
    [
        (1.0, 0.03, None),
        (0.0, 0.0, "the base model's: the sampler had no adapter"),
        (0.0, 0.03, "the base model's: the sampler had no adapter"),
        (2.0, 0.03, r"those of the base model with (1\.[89]|2\.[01]) times what the adapter adds"),
        (0.8, 0.03, None),
    ],
)
def test_a_sampler_with_another_adapter_is_told_from_one_that_rounds(trained, had, noise, said):
    """After two steps of training, where the adapter adds less than an engine rounds."""
    model = load_checkpoint(trained.checkpoint).model.eval()
    generator = torch.Generator().manual_seed(0)
    prompts, mask = torch.randint(3, 90, (48, 4), generator=generator), torch.ones(48, 16, dtype=torch.bool)
    batch = Rollouts(
        torch.cat([prompts, prompts.repeat(1, 3)], 1), mask, mask & (torch.arange(16) > 3), torch.arange(48)
    )
    scorer = Scorer(model, 1.0, None)
    scorer.prepare(batch)
    scores = scorer.score(batch)
    with without_adapter(model):
        base = scorer.score(batch).logprobs
    given = base + had * (scores.logprobs - base) + noise * torch.randn(base.shape, generator=generator)
    check = PolicyCheck(scorer, ProbeConfig(update_selected=True), ALONE)
    rows = LocalRows.whole(Clusters.sequences(48))
    note = check("update", scores, rows, replace(batch, sampled_logprobs=given)).note
    assert (note is None) == (said is None)
    assert said is None or re.search(said, note.text), note.text
