"""A step that the caller takes: predicted from the gradient in hand, measured after the optimizer's own step."""

from dataclasses import replace

import pytest
import torch

from entropy_probe import EntropyProbe, ProbeConfig, ProbeResult, Rollouts
from entropy_probe.analyses.policy_check import StaleRolloutsError
from entropy_probe.integrations.live import logged_keys, probe_actor, prompt_shares
from entropy_probe.results.live import StepRecord
from tests.invariants.problems import batches
from tests.notes import texts
from tests.reference.enumeration import TEMPERATURE, TinyPolicy, trained_optimizer

CONFIG = ProbeConfig(temperature=TEMPERATURE, measure_noise_floor=False, horizon=None, min_ess_fraction=0.0)


def with_gradient(update: Rollouts, max_grad_norm: float | None, **optimizer):
    """A policy with the clipped gradient of the dapo loss in ``.grad``."""
    model = TinyPolicy()
    trained = trained_optimizer(model, weight_decay=0.1, **optimizer)
    log_p = torch.log_softmax(model(update.input_ids, update.attention_mask.long()).logits / TEMPERATURE, -1)
    s = log_p[:, :-1].gather(-1, update.input_ids[:, 1:, None])[..., 0] * update.response_mask[:, 1:]
    (-(s * update.token_advantages[:, 1:]).sum() / update.response_mask.sum()).backward()
    if max_grad_norm is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    return model, trained


def close(got: ProbeResult, expected: ProbeResult) -> None:
    assert got.predicted
    assert expected.predicted
    assert got.predicted.value == pytest.approx(expected.predicted.value, rel=1e-6)
    assert got.predicted.se_evaluation == pytest.approx(expected.predicted.se_evaluation, rel=1e-6)
    for name, part in expected.components.items():
        assert got.components[name].value == pytest.approx(part.value, rel=1e-6)
    assert got.realized
    assert expected.realized
    assert got.realized.value == pytest.approx(expected.realized.value, rel=1e-6)
    assert got.realized.batch == expected.realized.batch
    assert got.difference
    assert expected.difference
    assert got.difference.value == pytest.approx(expected.difference.value, rel=1e-4)
    assert got.difference.standard_error == pytest.approx(expected.difference.standard_error, rel=1e-4)
    assert got.lifetime
    assert expected.lifetime
    assert got.lifetime.value == pytest.approx(expected.lifetime.value, rel=1e-6)


@pytest.mark.parametrize("max_grad_norm", [None, 1e-3])
@pytest.mark.parametrize("clipped", [True, False])
def test_the_own_batch_gives_the_numbers_of_one_batch(max_grad_norm, clipped):
    update, config = batches()[0], CONFIG.model_copy(update={"max_grad_norm": max_grad_norm})
    model, optimizer = with_gradient(update, max_grad_norm if clipped else None)
    expected = EntropyProbe(model, optimizer, config).one_batch(update)
    divided = EntropyProbe(model, optimizer, config).attribute(update=update)
    ahead = probe_actor(model, optimizer, update, config, clipped=clipped)
    if not clipped and max_grad_norm is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    result = ahead.taken()
    close(result, expected)
    assert ahead.result.realized is None
    agreement = result.diagnostics.gradient_agreement
    assert agreement
    assert agreement.relative_distance == pytest.approx(0.0, abs=1e-6)
    assert result.diagnostics.clip_factor == pytest.approx(expected.diagnostics.clip_factor)
    shares = prompt_shares(ahead)
    assert [share.value for share in shares] == pytest.approx(divided.prompts.tolist(), rel=1e-5)
    assert len({share.id for share in shares}) == 3  # different prompts among them


@pytest.mark.parametrize("with_batch", [False, True])
def test_held_out_rollouts_give_the_numbers_of_two_batches(with_batch):
    update, evaluation = batches()
    config = CONFIG.model_copy(update={"max_grad_norm": 1e-3})
    model, optimizer = with_gradient(update, 1e-3)
    expected = EntropyProbe(model, optimizer, config).run(update=update, evaluation=evaluation)
    ahead = probe_actor(model, optimizer, update if with_batch else None, config, evaluation=evaluation)
    optimizer.step()
    result = ahead.taken()
    close(result, expected)
    assert result.committed
    assert expected.committed
    assert result.committed.value == pytest.approx(expected.committed.value, rel=1e-6)
    assert bool(prompt_shares(ahead) if with_batch else ahead.prediction.by_prompt is not None) == with_batch


def test_the_step_is_that_of_the_gradient_whatever_the_loss_says():
    """A loss with a term that is not known: the prediction is of ``.grad``, and how far the batch's is from it told."""
    update = batches()[0]
    model, optimizer = with_gradient(update, None)
    for p in model.parameters():
        if p.grad is not None:
            p.grad *= 2
    ahead = probe_actor(model, optimizer, update, CONFIG.model_copy(update={"max_grad_norm": None}))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.step()
    assert ahead.result.step
    for name, p in model.named_parameters():
        torch.testing.assert_close(ahead.result.step.delta[name], p.detach() - before[name], rtol=1e-9, atol=1e-15)
    agreement = ahead.result.diagnostics.gradient_agreement
    assert agreement
    assert agreement.relative_distance == pytest.approx(0.5)
    assert any("50.0% of its length away" in text for text in texts(ahead.result.diagnostics.notes))


def test_rollouts_of_an_earlier_policy_are_reweighted_or_refused():
    update, evaluation = batches()
    model, optimizer = with_gradient(update, None)
    scored = EntropyProbe(model, optimizer, CONFIG)
    with scored._opened() as policy:
        policy.prepare(evaluation)
        sampled = policy.scorer.score(evaluation, lambda *_: None).logprobs
    evaluation = replace(evaluation, sampled_logprobs=sampled.double())
    settings = {"on_mismatch": "reweight", "max_mismatch": 0.0}
    fresh = probe_actor(model, optimizer, None, CONFIG, evaluation=evaluation).result
    weighted = probe_actor(model, optimizer, None, CONFIG.model_copy(update=settings), evaluation=evaluation).result
    assert fresh.predicted
    assert weighted.predicted
    assert weighted.predicted.value == pytest.approx(fresh.predicted.value, rel=1e-6)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=p.dtype)
    strict = CONFIG.model_copy(update=settings | {"min_ess_fraction": 0.999})
    with pytest.raises(StaleRolloutsError, match="effective sample size"):
        probe_actor(model, optimizer, None, strict, evaluation=evaluation)


def test_without_any_rollouts_there_is_nothing_to_predict():
    model, optimizer = with_gradient(batches()[0], None)
    with pytest.raises(ValueError, match="batch: expected the rollouts of the step, or evaluation rollouts"):
        probe_actor(model, optimizer, None, CONFIG)


def test_a_record_has_the_errors_of_this_very_step():
    update = batches()[0]
    model, optimizer = with_gradient(update, None)
    ahead = probe_actor(model, optimizer, update, CONFIG)
    optimizer.step()
    result = ahead.taken()
    record = StepRecord.of(result, 7, seconds=0.5, log={"reward": 1.0})
    assert result.predicted
    assert record.predicted
    assert record.predicted.standard_error == result.predicted.se_evaluation
    keys = logged_keys(record)
    assert keys["entropy_probe/predicted_se"] == result.predicted.se_evaluation
    assert keys["entropy_probe/seconds"] == 0.5
    assert keys["entropy_probe/ess"] == record.ess
    assert "entropy_probe/committed" not in keys  # its moments have seen the batch
    assert logged_keys(StepRecord(step=8)) == {}


def test_a_live_step_of_float32_weights_is_not_rounded_whatever_they_hold():
    """As of a base that was released in bfloat16, before its first step; of a checkpoint they would tell nothing."""
    update = batches()[0]
    model, optimizer = with_gradient(update, None)
    for p in model.parameters():
        p.data = p.data.bfloat16().to(p.dtype)
        optimizer.state[p] = {}
    ahead = probe_actor(model, optimizer, update, CONFIG)
    codes = {note.code for note in ahead.result.diagnostics.notes}
    assert not codes & {"precision_unknown", "master_weights"}
    stored = EntropyProbe(model, optimizer, CONFIG).one_batch(update)
    assert "precision_unknown" in {note.code for note in stored.diagnostics.notes}
