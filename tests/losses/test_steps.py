"""The step on a trainer's loss against autograd on its formula and torch's own AdamW."""

from dataclasses import replace

import pytest
import torch

from entropy_probe import ProbeConfig
from entropy_probe.analyses.batches import admit_batches
from entropy_probe.analyses.plan import plan
from entropy_probe.losses import build_loss
from entropy_probe.steps.adamw import clip_gradient
from tests.invariants.problems import batches, probe
from tests.losses import openrlhf_formulas as openrlhf
from tests.losses import prime_rl_formulas as prime_rl
from tests.losses import verl_formulas as verl
from tests.reference.enumeration import TEMPERATURE, TinyPolicy, trained_optimizer

SUPPORTED = {
    "verl": (verl, {"clip_ratio_high": 0.28, "use_kl_loss": True, "kl_loss_coef": 0.1, "entropy_coeff": 0.02}),
    "openrlhf": (openrlhf, {"use_kl_loss": True, "init_kl_coef": 0.1, "kl_estimator": "k3", "entropy_loss_coef": 0.02}),
    "prime_rl": (prime_rl, {"dppo_mask_high": 0.05, "kl_tau": 0.1}),
}


@pytest.mark.parametrize("trainer", SUPPORTED)
def test_the_step_is_that_of_autograd_and_adamw(trainer):
    """From the rollouts' columns to the change of every parameter, off policy, in two microbatches."""
    plain, settings = SUPPORTED[trainer]
    model = TinyPolicy()
    optimizer = trained_optimizer(model, cls=torch.optim.AdamW, weight_decay=0.01)
    update, evaluation = batches()
    generator = torch.Generator().manual_seed(1)
    s, h = token_scores(model, update)

    def moved(scale):
        return (s.detach() + scale * torch.randn(s.shape, generator=generator, dtype=s.dtype)).clamp(max=-1e-3)

    columns = {name: moved(0.4) for name in ("old_logprobs", "sampled_logprobs", "reference_logprobs")}
    empty = update.response_mask & (torch.arange(len(update)) != 5)[:, None]
    halves = torch.arange(len(update)) // (len(update) // 2)
    update = replace(update, response_mask=empty, microbatch_ids=halves, **columns)
    loss = {"trainer": trainer} | settings
    subject = probe(model, optimizer, loss=loss, max_grad_norm=0.05)
    result = subject.predict(update=update, evaluation=evaluation)

    plain.loss(s, h, update, build_loss(loss)).backward()
    parameters = dict(model.named_parameters())
    gradient = {name: p.grad for name, p in parameters.items()}
    norm = clip_gradient(gradient, None).norm
    assert result.diagnostics.gradient_norm == pytest.approx(norm, rel=1e-10)
    assert norm > 0.05
    with subject._opened() as policy:
        delta = plan(policy, *admit_batches(policy, update, evaluation)).step.delta
    before = {name: p.detach().clone() for name, p in parameters.items()}
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    optimizer.step()
    for name, p in parameters.items():
        torch.testing.assert_close(delta[name], p.detach() - before[name], rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize(
    "loss",
    [
        {"trainer": "verl", "rollout_is_threshold": "0.5_2.0", "clip_ratio_low": None},
        {"trainer": "openrlhf", "eps_clip_low_high": [0.2, 0.3]},
        {"trainer": "openrlhf", "version": "0.9.0", "vllm_is_truncated_threshold": 2.0},
        *({"trainer": "prime_rl", "version": version} for version in ("0.2", "0.5", "0.8")),
    ],
)
def test_a_loss_in_a_record_is_read_again(loss):
    config = ProbeConfig(loss=loss)
    assert ProbeConfig.model_validate_json(config.model_dump_json()) == config


def token_scores(model, rollouts):
    """Differentiable scores of the response tokens, at the positions of the tokens."""
    logits = model(rollouts.input_ids, rollouts.attention_mask.long()).logits / TEMPERATURE
    log_p = torch.log_softmax(logits, -1)[:, :-1]
    s = log_p.gather(-1, rollouts.input_ids[:, 1:, None])[..., 0]
    return (torch.nn.functional.pad(x, (1, 0)) for x in (s, -(log_p.exp() * log_p).sum(-1)))
