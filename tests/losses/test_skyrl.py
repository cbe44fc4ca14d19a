"""SkyRL's losses against autograd on a plain transcription of its formulas."""

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
        ({"policy_loss_type": "cispo"}, r"loss\.policy_loss_type: input should be 'regular', .*, got 'cispo'"),
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
