"""SkyRL's losses against autograd on a plain transcription of its formulas."""

from dataclasses import replace

import pytest

from entropy_probe.losses import build_loss
from tests.losses import skyrl_formulas as skyrl
from tests.losses.off_policy import agree, batch, far_batch

REDUCTIONS = ("token_mean", "token_mean_legacy", "sequence_mean", "seq_mean_token_sum_norm", "prompt_mean")


@pytest.mark.parametrize("kind", ["regular", "dual_clip", "gspo", "sapo"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_skyrl(kind, reduction):
    settings = {"policy_loss_type": kind, "loss_reduction": reduction, "use_kl_loss": False, "max_seq_len": 7}
    settings |= {"eps_clip_low": 0.05, "eps_clip_high": 0.3, "clip_ratio_c": 1.2, "tau_neg": 2.0}
    agree(skyrl, *batch(token_advantages=True), {"trainer": "skyrl"} | settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"policy_loss_type": "cispo", "cispo_eps_clip_low": 0.1, "cispo_eps_clip_high": 0.2},
        {"policy_loss_type": "cispo", "cispo_anchor": "rollout", "cispo_eps_clip_high": 0.2},
        {"policy_loss_type": "rollout_is", "eps_clip_low": 0.3, "eps_clip_high": 0.2},
        *({"policy_loss_type": "dppo", "dppo_type": "binary_tv", "delta_low": x, "delta_high": 0.1} for x in (0, 0.1)),
        {"policy_loss_type": "dppo", "dppo_type": "binary_kl", "delta_low": 0.02, "delta_high": 0.01},
        {"policy_loss_type": "importance_sampling"},
    ],
    ids=str,
)
def test_more_policy_losses(settings):
    agree(skyrl, *batch(token_advantages=True), {"trainer": "skyrl"} | settings)


def test_ratios_to_the_sampler_need_its_logprobs_and_no_old_ones():
    settings = {"trainer": "skyrl", "policy_loss_type": "dppo", "update_epochs_per_batch": 2, "use_kl_loss": False}
    loss = build_loss(settings)
    rollouts, scores = batch(old_logprobs=None)
    assert loss.needs_scores(rollouts)
    assert "ratio_one" not in [note.code for note in loss.notes(rollouts, scores)]
    loss.check(rollouts)
    with pytest.raises(ValueError, match=r"sampled_logprobs: expected \[N, L\].*; record SkyRL's rollout_logprobs"):
        loss.check(batch(sampled_logprobs=None)[0])
    assert build_loss(settings | {"policy_loss_type": "cispo"}).needs_old
    assert not build_loss(settings | {"policy_loss_type": "cispo", "cispo_anchor": "rollout"}).needs_old


@pytest.mark.parametrize("away", [12.0, -12.0])
def test_a_sequence_beyond_its_bounds(away):
    """Its ratio is held at ``exp(10)`` above, where nothing has a slope, and not held below."""
    rollouts, scores = batch(token_advantages=True)
    far = replace(rollouts, old_logprobs=rollouts.old_logprobs - away)
    for reduction in ("token_mean", "sequence_mean"):
        settings = {"trainer": "skyrl", "policy_loss_type": "gspo", "loss_reduction": reduction, "use_kl_loss": False}
        agree(skyrl, far, scores, settings | {"eps_clip_low": 2.0, "eps_clip_high": 1e6})
    slopes = build_loss(settings | {"eps_clip_low": 2.0, "eps_clip_high": 1e6}).coefficients(far, scores).logprobs
    assert bool(slopes.any()) == (away < 0)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_and_entropy(estimator):
    settings = {"kl_loss_coef": 0.3, "kl_estimator_type": estimator, "use_entropy_loss": True}
    agree(skyrl, *batch(), {"trainer": "skyrl"} | settings)


@pytest.mark.parametrize("kind", ["regular", "gspo", "sapo"])
def test_far_off_policy(kind):
    for estimator in ("k1", "k2", "k3"):
        settings = {"policy_loss_type": kind, "kl_loss_coef": 0.3, "kl_estimator_type": estimator}
        agree(skyrl, *far_batch(), {"trainer": "skyrl"} | settings, rtol=1e-12)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"policy_loss_type": "clip_cov"}, r"loss\.policy_loss_type: input should be 'regular', .*, got 'clip_cov'"),
        ({"kl_estimator_type": "abs"}, r"loss\.kl_estimator_type: input should be 'k1', 'k2' or 'k3', got 'abs'"),
        ({"loss_reduction": "seq_mean_token_sum_norm"}, r"loss\.max_seq_len: expected it with .*; set the trainer's"),
        ({"off_policy_correction": "tis_ratio_type"}, r"loss\.off_policy_correction: input should be None, got 'tis"),
    ],
)
def test_what_is_not_modelled_is_refused(settings, expected):
    with pytest.raises(ValueError, match=expected):
        build_loss({"trainer": "skyrl"} | settings)


def test_a_later_step_needs_the_old_policy():
    rollouts, _ = batch(old_logprobs=None)
    loss = build_loss({"trainer": "skyrl", "train_batch_size": 8, "policy_mini_batch_size": 4})
    with pytest.raises(ValueError, match=r"old_logprobs: expected \[N, L\].*; record SkyRL's action_log_probs"):
        loss.check(rollouts)
    assert not build_loss({"trainer": "skyrl", "train_batch_size": 4, "policy_mini_batch_size": 4}).needs_old
    assert build_loss({"trainer": "skyrl", "update_epochs_per_batch": 2}).needs_old
    assert build_loss({"trainer": "skyrl"}).needs_scores(rollouts)  # for its KL term
    assert not build_loss({"trainer": "skyrl", "use_kl_loss": False}).needs_scores(rollouts)
