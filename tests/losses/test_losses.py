from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from entropy_probe import ProbeConfig, Rollouts
from entropy_probe.losses import trainers
from entropy_probe.losses.trl import TRLLoss
from entropy_probe.steps.adamw import clip_gradient
from tests.invariants.problems import batches, probe, with_reference
from tests.losses.trl_formulas import trl_loss
from tests.reference.enumeration import TEMPERATURE, TinyPolicy, trained_optimizer

MASK = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 1], [0, 1, 0, 1], [0, 1, 0, 0]]).bool()
LENGTHS = [3, 2, 2, 1]
POLICY_GRADIENTS = ("grpo", "bnpo", "dapo", "cispo", "dr_grpo", "per_prompt_max")


def rollouts(**more):
    ids = torch.arange(16).view(4, 4)
    return Rollouts(ids, torch.ones_like(ids), MASK, torch.tensor([3, 3, 8, 8]), torch.ones(4), **more)


def test_every_family_of_the_room_is_a_member():
    assert trainers()["trl"] is TRLLoss


@pytest.mark.parametrize("loss_type", POLICY_GRADIENTS)
def test_weights(loss_type):
    expected = {
        "grpo": [1 / (4 * t) for t in LENGTHS],
        "dr_grpo": [1 / (4 * 10)] * 4,
        "per_prompt_max": [1 / (4 * t) for t in [3, 3, 2, 2]],
    }.get(loss_type, [1 / 8] * 4)
    weights = TRLLoss(loss_type=loss_type, max_completion_length=10).weights(rollouts())
    assert (weights[~MASK] == 0).all()
    for row, weight in enumerate(expected):
        assert weights[row][MASK[row]].tolist() == pytest.approx([weight] * LENGTHS[row])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"loss_type": "ppo"}, "loss.loss_type: input should be 'grpo', .*, got 'ppo'"),
        ({"loss": {"trainer": "trl", "epsilon_hihg": 0.3}}, "loss.epsilon_hihg: .*; did you mean epsilon_high?"),
        ({"loss": {"trainer": "trl", "nonsense": 0.3}}, "loss.nonsense: not a setting of trl's losses; known are"),
        ({"loss": {"trainer": "none"}}, "loss.trainer: expected one of .*trl.*, got 'none'"),
        ({"loss": {"loss_type": "dapo"}}, "loss.trainer: expected one of .*trl.*, got none; set"),
        ({"loss": {"trainer": "trl"}, "loss_type": "grpo"}, "loss_type: expected loss or loss_type, got both"),
        ({"loss": "dapo"}, "loss: expected settings with a trainer, got 'dapo'; write"),
        ({"loss": {"trainer": "trl", "beta": -1.0}}, "loss.beta: input should be greater .* 0, got -1.0"),
        ({"loss": {"trainer": "trl", "beta": "small"}}, "loss.beta: input should be a valid number.*, got 'small'"),
        ({"loss": {"trainer": "trl", "use_adaptive_entropy": True}}, "last_world_entropy: expected a number beside"),
        (
            {"loss": {"trainer": "trl", "max_completion_length": 8}, "max_completion_length": 9},
            "loss.max_completion_length: expected 9, .*, got 8",
        ),
    ],
)
def test_what_a_loss_does_not_take_is_refused(settings, expected):
    with pytest.raises(ValueError, match=expected):
        ProbeConfig(**settings)


def test_what_a_loss_needs_of_a_batch():
    with pytest.raises(ValueError, match="dr_grpo: expected max_completion_length, got None"):
        TRLLoss(loss_type="dr_grpo").weights(rollouts())
    update, evaluation = batches()
    model = TinyPolicy()
    for subject, batch, expected in (
        (with_kl(model, "dapo", 0.1), update, r"reference_logprobs: expected \[N, L\] .*, got None"),
        (probe(model, trained_optimizer(model)), evaluation, r"advantages: expected \[N\] or \[N, L\] .*, got None"),
    ):
        phases = []
        subject._shared["progress"] = lambda phase, *_, phases=phases: phases.append(phase)
        with pytest.raises(ValueError, match=expected):
            subject.predict(update=batch, evaluation=evaluation)
        assert "score evaluation" not in phases


def with_kl(model, policy_loss, beta, **settings):
    loss = {"trainer": "trl", "loss_type": policy_loss, "beta": beta, "use_bias_correction_kl": False}
    given = {"max_completion_length": 5, "max_grad_norm": None, "loss": loss} | settings
    return probe(model, trained_optimizer(model), **given)


def autograd(model, update, policy_loss, beta):
    """The norm of the gradient of the loss as a trainer writes it."""
    mask, lengths = update.response_mask[:, 1:], update.response_mask.sum(1).double()
    log_p = torch.log_softmax(model(update.input_ids, update.attention_mask.long()).logits / TEMPERATURE, -1)
    s = log_p[:, :-1].gather(-1, update.input_ids[:, 1:, None])[..., 0]
    beyond = update.reference_logprobs[:, 1:] - s
    per_token = -(s - s.detach()).exp() * update.advantages[:, None] + beta * (beyond.exp() - beyond - 1)
    divided = {"dapo": lengths.sum(), "grpo": len(update) * lengths[:, None], "dr_grpo": len(update) * 5.0}[policy_loss]
    gradient = torch.autograd.grad((per_token * mask / divided).sum(), list(model.parameters()))
    return dict(zip(dict(model.named_parameters()), gradient, strict=True))


@pytest.mark.parametrize("policy_loss", ["dapo", "grpo", "dr_grpo"])
@pytest.mark.parametrize("beta", [0.04, 2.0])
def test_the_kl_term_is_that_of_autograd(policy_loss, beta):
    model = TinyPolicy()
    update, evaluation = batches()
    update = with_reference(update)
    gradient = autograd(model, update, policy_loss, beta)
    norm = clip_gradient(gradient, None).norm
    result = with_kl(model, policy_loss, beta).predict(update=update, evaluation=evaluation)
    assert result.diagnostics.gradient_norm == pytest.approx(norm, rel=1e-10)
    assert result.diagnostics.policy_fit.update is not None  # its scores are checked as those of any batch
    plain = probe(model, trained_optimizer(model), max_grad_norm=None).predict(update=update, evaluation=evaluation)
    assert result.predicted.value != pytest.approx(plain.predicted.value, rel=1e-3)
    one = with_kl(model, policy_loss, beta, identity_if_coverage_below=0.0).one_batch(update)
    assert one.diagnostics.gradient_norm == pytest.approx(norm, rel=1e-6)


def test_a_reference_that_is_the_policy_pulls_nowhere_and_beta_0_is_no_term():
    model = TinyPolicy()
    update, evaluation = batches()
    log_p = torch.log_softmax(model(update.input_ids, update.attention_mask.long()).logits / TEMPERATURE, -1).detach()
    own = torch.zeros(update.input_ids.shape, dtype=torch.float64)
    own[:, 1:] = log_p[:, :-1].gather(-1, update.input_ids[:, 1:, None])[..., 0]
    plain = probe(model, trained_optimizer(model), max_grad_norm=None).predict(update=update, evaluation=evaluation)
    for beta, reference in ((5.0, own), (0.0, own - 1)):
        given = {"update": replace(update, reference_logprobs=reference), "evaluation": evaluation}
        result = with_kl(model, "dapo", beta).predict(**given)
        assert result.predicted.value == pytest.approx(plain.predicted.value, rel=1e-12)


FULL = {"trainer": "trl", "loss_type": "grpo", "beta": 0.5, "entropy_coef": 0.3, "top_entropy_quantile": 0.6}


def off_policy(update):
    noise = torch.randn(update.input_ids.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return replace(with_reference(update), old_logprobs=scores_of(TinyPolicy(), update) + 0.2 * noise)


def scores_of(model, batch):
    log_p = torch.log_softmax(model(batch.input_ids, batch.attention_mask.long()).logits / TEMPERATURE, -1).detach()
    own = torch.zeros(batch.input_ids.shape, dtype=torch.float64)
    own[:, 1:] = log_p[:, :-1].gather(-1, batch.input_ids[:, 1:, None])[..., 0]
    return own


def test_contributions_of_tokens_add_up_with_all_terms():
    update, evaluation = batches()
    update, model = off_policy(update), TinyPolicy()
    subject = probe(model, trained_optimizer(model), loss=FULL, horizon=None)
    attribution = subject.attribute(update=update, evaluation=evaluation)
    assert attribution.tokens.sum().item() == pytest.approx(attribution.result.components["gradient"].value, rel=1e-6)
    found = subject.validate(attribution, evaluation=evaluation, subsets=4)
    assert all(step.failure is None for step in found.steps)


def test_only_a_term_with_a_coefficient_is_modelled():
    beginnings = [TRLLoss(beta=beta).models for beta in (0.0, 0.1)]
    assert beginnings == [(), ("the KL term",)]
    assert TRLLoss(entropy_coef=0.1, num_iterations=2, use_vllm=True).models == (
        "the entropy bonus",
        "importance ratios other than 1",
        "the weights that correct for the sampler",
    )
    assert TRLLoss(loss_type="gmpo", entropy_coef=0.1, use_vllm=True).models == ()


def test_a_bonus_and_a_later_step_are_autograds():
    model = TinyPolicy()
    update, evaluation = batches()
    update = off_policy(update)
    result = probe(model, trained_optimizer(model), max_grad_norm=None, loss=FULL).predict(
        update=update, evaluation=evaluation
    )
    mask = update.response_mask
    log_p = torch.log_softmax(model(update.input_ids, update.attention_mask.long()).logits / TEMPERATURE, -1)
    s, h = (torch.zeros(mask.shape, dtype=torch.float64) for _ in range(2))
    s[:, 1:] = log_p[:, :-1].gather(-1, update.input_ids[:, 1:, None])[..., 0]
    h[:, 1:] = -(log_p.exp() * log_p).sum(-1)[:, :-1]
    batch = SimpleNamespace(mask=mask, advantages=update.advantages, old=update.old_logprobs, sampled=None,
                            reference=update.reference_logprobs, microbatch=torch.zeros(len(mask)).long())  # fmt: skip
    settings = {k: v for k, v in FULL.items() if k != "trainer"}
    gradient = torch.autograd.grad(trl_loss(s, h, batch, **settings), list(model.parameters()))
    norm = torch.cat([g.flatten() for g in gradient]).norm().item()
    assert result.diagnostics.gradient_norm == pytest.approx(norm, rel=1e-9)


def test_one_batch_is_of_a_first_step():
    """Earlier steps on the same rollouts were fitted to the responses that entropy would be taken on."""
    model = TinyPolicy()
    update, _ = batches()
    subject = probe(
        model, trained_optimizer(model), loss={"trainer": "trl"}, geometry="frozen", identity_if_coverage_below=0.0
    )
    with pytest.raises(ValueError, match="one batch: expected the first step on fresh rollouts, got old_logprobs"):
        subject.one_batch(off_policy(update))
    ours = replace(update, old_logprobs=scores_of(model, update))
    plain = subject.one_batch(update).cross_prompt
    assert subject.one_batch(ours).cross_prompt.delta_h1 == pytest.approx(plain.delta_h1, rel=1e-9)
    bonus = FULL | {"beta": 0.0}
    subject = probe(model, trained_optimizer(model), loss=bonus, geometry="frozen", identity_if_coverage_below=0.0)
    assert subject.one_batch(update).cross_prompt.delta_h1 != pytest.approx(plain.delta_h1, rel=1e-2)
