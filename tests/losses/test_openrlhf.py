"""OpenRLHF's losses against autograd on a plain transcription of its formulas."""

import itertools

import pytest

from entropy_probe.losses import build_loss
from tests.losses import openrlhf_formulas as openrlhf
from tests.losses.off_policy import agree, batch, far_batch


@pytest.mark.parametrize("version", ["0.9.10", "0.10.3", "0.11.0"])
@pytest.mark.parametrize("correction", ["tis", "icepop", "seq-mask-tis", None])
@pytest.mark.parametrize("policy", ["ppo", "gspo"])
def test_openrlhf(policy, correction, version):
    fixed = {"trainer": "openrlhf", "version": version, "policy_loss_type": policy}
    if correction is not None:
        fixed |= {"enable_vllm_is_correction": True, "vllm_is_correction_type": correction}
        fixed |= {"vllm_is_truncated_threshold": [0.9, 1.2]}
    clips = [(None, None), (1.3, [0.1, 0.3])]
    options = itertools.product([True, False], ["k1", "k2", "k3"], clips, [0.0, 0.02])
    for by_token, kind, (dual, clip), bonus in options:
        kl = {"use_kl_loss": True, "init_kl_coef": 0.2, "kl_estimator": kind}
        more = {"token_level_loss": by_token, "dual_clip": dual, "eps_clip_low_high": clip, "entropy_loss_coef": bonus}
        rollouts, scores = batch(**{"old_logprobs": None} if bonus else {})
        agree(openrlhf, rollouts, scores, fixed | kl | more | {"num_processes": 2})


def test_openrlhf_0_10_3_with_dynamic_batches():
    settings = {"version": "0.10.3", "use_dynamic_batch": True, "num_processes": 2}
    agree(openrlhf, *batch(), {"trainer": "openrlhf"} | settings)


def test_openrlhf_0_9_0_bounds_the_correction_from_above():
    rollouts, scores = batch()
    chosen = {"version": "0.9.0", "enable_vllm_is_correction": True, "vllm_is_truncated_threshold": 1.1}
    agree(openrlhf, rollouts, scores, {"trainer": "openrlhf"} | chosen)


@pytest.mark.parametrize("version", ["0.9.10", "0.10.2", "0.10.3", "0.11.0"])
@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_openrlhf_far_off_policy(kind, version):
    """Ratios are bounded since 0.10.3, estimates of the KL divergence always."""
    settings = {"version": version, "use_kl_loss": True, "init_kl_coef": 1e-4, "kl_estimator": kind}
    agree(openrlhf, *far_batch(), {"trainer": "openrlhf"} | settings, rtol=1e-12)


@pytest.mark.parametrize("policy", ["ppo", "gspo"])
def test_openrlhf_with_advantages_of_tokens(policy):
    settings = {"trainer": "openrlhf", "policy_loss_type": policy, "dual_clip": 1.3}
    agree(openrlhf, *batch(token_advantages=True), settings)


@pytest.mark.parametrize(
    ("settings", "columns", "codes"),
    [
        ({}, {}, set()),
        ({}, {"old_logprobs": None}, {"ratio_one"}),
        ({"eps_clip": 0.3}, {"old_logprobs": None}, {"ratio_one", "inert"}),
        (
            {"rollout_batch_size": 4, "n_samples_per_prompt": 2, "train_batch_size": 8},
            {"old_logprobs": None},
            set(),
        ),
        ({"version": "0.10.3"}, {"microbatch_ids": None}, {"global_mean"}),
        ({"version": "0.10.1.post1", "policy_loss_type": "gspo"}, {}, {"loss_not_a_number"}),
    ],
)
def test_what_is_said(settings, columns, codes):
    rollouts, scores = batch(**columns)
    loss = build_loss({"trainer": "openrlhf"} | settings)
    notes = loss.notes(rollouts, scores if loss.needs_scores(rollouts) else None)
    assert {note.code for note in notes} == codes


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"version": "0.8.11"}, "loss.version: expected one from 0.9.0 to 0.11.0, got '0.8.11'"),
        ({"version": "0.12.0"}, "loss.version: expected one from 0.9.0 to 0.11.0, got '0.12.0'"),
        ({"version": "main"}, "loss.version: expected one from 0.9.0 to 0.11.0, got 'main'"),
        ({"dual_clip": 0.9}, "loss.dual_clip: input should be greater than 1, got 0.9"),
        ({"aux_loss_coef": 0.1}, "loss.aux_loss_coef: not a setting of openrlhf's losses"),
        ({"policy_loss_type": "reinforce"}, "loss.policy_loss_type: input should be 'ppo' or 'gspo', got 'reinforce'"),
        (
            {"enable_vllm_is_correction": True, "vllm_is_truncated_threshold": 2.0},
            "expected two numbers with .* 0.11.0",
        ),
        ({"enable_vllm_is_correction": True, "version": "0.9.0"}, "expected one number with version 0.9.0"),
    ],
)
def test_what_openrlhf_does_not_take_is_refused(settings, expected):
    with pytest.raises(ValueError, match=expected):
        build_loss({"trainer": "openrlhf"} | settings)


@pytest.mark.parametrize(
    ("settings", "column"),
    [
        ({"use_kl_loss": True}, "reference_logprobs"),
        ({"enable_vllm_is_correction": True}, "sampled_logprobs"),
        ({"enable_vllm_is_correction": True, "policy_loss_type": "gspo"}, "sampled_logprobs"),
        ({"max_epochs": 2}, "old_logprobs"),
        ({"rollout_batch_size": 16, "n_samples_per_prompt": 8, "train_batch_size": 64}, "old_logprobs"),
    ],
)
def test_columns_that_are_missing_are_named(settings, column):
    rollouts, scores = batch(**{column: None})
    with pytest.raises(ValueError, match=rf"{column}: expected \[N, L\] on an update batch of .*, got None; record"):
        build_loss({"trainer": "openrlhf"} | settings).coefficients(rollouts, scores)
