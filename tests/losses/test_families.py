"""The losses of verl, OpenRLHF and prime-rl against autograd on a plain transcription of each trainer's formula."""

import itertools

import pytest
import torch

from entropy_probe import Rollouts
from entropy_probe.losses import build_loss
from entropy_probe.types import TokenScores
from tests.losses.plain import openrlhf, prime_rl, verl

LENGTHS = (5, 0, 3, 6, 1, 4, 2, 6)


def batch(spread=0.3, seed=0, *, microbatches=True, empty=True, **without):
    """Responses of unequal lengths with a gap, one empty, off policy, and the scores of the policy as it is."""
    generator = torch.Generator().manual_seed(seed)
    n, length = len(LENGTHS), 9
    mask = torch.zeros(n, length, dtype=torch.bool)
    for row, tokens in enumerate(LENGTHS):
        mask[row, 2 : 2 + (tokens if empty else max(tokens, 1))] = True
    mask[3, 4] = False

    def noise(scale):
        return scale * torch.randn(n, length, dtype=torch.float64, generator=generator)

    s = -noise(1.0).abs() - 0.05
    advantages = noise(1.0)[:, 0].sign() * (0.5 + noise(1.0)[:, 1].abs())
    given = {
        "old_logprobs": (s + noise(spread)).clamp(max=-1e-3),
        "sampled_logprobs": (s + noise(spread)).clamp(max=-1e-3),
        "reference_logprobs": (s + noise(1.0)).clamp(max=-1e-3),
        "microbatch_ids": torch.tensor([4, 4, 4, 7, 7, 5, 5, 5]) if microbatches else None,
    } | without
    ids = torch.zeros(n, length, dtype=torch.long)
    rollouts = Rollouts(ids, torch.ones_like(ids), mask, torch.arange(n) // 2, advantages, **given)
    return rollouts, TokenScores(s * mask, -s * mask, mask)


def agree(plain, rollouts, scores, settings):
    """The coefficients are the gradient of the transcription, in both log-probabilities and entropies."""
    loss = build_loss(settings)
    s, h = (x.clone().requires_grad_() for x in (scores.logprobs, scores.entropies))
    expected = torch.autograd.grad(plain.loss(s, h, rollouts, loss), (s, h), allow_unused=True, materialize_grads=True)
    given = scores if loss.needs_scores(rollouts) else None
    got = loss.coefficients(rollouts, given)
    torch.testing.assert_close(got.logprobs, expected[0], rtol=0, atol=1e-12)
    entropies = torch.zeros_like(h) if got.entropies is None else got.entropies
    torch.testing.assert_close(entropies, expected[1], rtol=0, atol=1e-12)
    return got


MODES = ("vanilla", "dppo_tv", "dppo_kl", "gspo", "sapo", "gpg", "clip_cov", "kl_cov", "geo_mean", "dro", "cispo")
AGGREGATIONS = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
KINDS = ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3")
SETTINGS = {
    "dro_beta": 0.3, "loss_scale_factor": 7.0, "num_processes": 1, "clip_ratio_high": 0.28, "clip_ratio_c": 1.4,
    "clip_cov_lb": 0.1, "clip_cov_ratio": 0.15, "kl_cov_ratio": 0.2, "entropy_coeff": 0.02,
}  # fmt: skip


@pytest.mark.parametrize("microbatches", [True, False])
@pytest.mark.parametrize("version", ["0.7.0", "0.7.1", "0.9.0"])
@pytest.mark.parametrize("mode", MODES)
def test_verl(mode, version, microbatches):
    rollouts, scores = batch(microbatches=microbatches)
    since = {"dppo_tv": "0.7.1", "dppo_kl": "0.7.1", "dro": "0.9.0"}.get(mode, "")
    if version < since:
        pytest.skip("came later")
    for aggregation, kind in itertools.product(AGGREGATIONS, KINDS if microbatches else KINDS[-1:]):
        if aggregation == "token-sum" and version < "0.9.0":
            continue
        kinds = (kind, f"{kind}+") if version >= "0.8.0" else (kind,)
        for each in kinds:
            kl = {"use_kl_loss": True, "kl_loss_coef": 0.3, "kl_loss_type": each}
            chosen = {"version": version, "loss_mode": mode, "loss_agg_mode": aggregation}
            agree(verl, rollouts, scores, {"trainer": "verl"} | SETTINGS | kl | chosen)


CORRECTIONS = (
    {"rollout_is": "token"},
    {"rollout_is": "token", "rollout_is_threshold": 1.1, "rollout_is_batch_normalize": True},
    {"rollout_is": "sequence", "rollout_is_threshold": 1.5},
    {"rollout_is": "sequence", "rollout_is_threshold": 1.2, "rollout_is_batch_normalize": True},
    {"rollout_is": "token", "rollout_is_threshold": "0.8_1.3"},
    {"rollout_rs": "token_k1", "rollout_rs_threshold": "0.8_1.3"},
    {"rollout_rs": "token_k1", "rollout_rs_threshold": 1.3},
    {"rollout_rs": "token_k2,seq_max_k3", "rollout_rs_threshold": "0.05,0.3"},
    {"rollout_rs": "token_k3", "rollout_rs_threshold": 0.05},
    *({"rollout_rs": f"seq_sum_{k}", "rollout_rs_threshold": 3 if k == "k1" else 0.1} for k in ("k1", "k2", "k3")),
    *({"rollout_rs": f"seq_mean_{k}", "rollout_rs_threshold": 1.1 if k == "k1" else 0.03} for k in ("k1", "k2", "k3")),
    {"rollout_rs": "seq_max_k2", "rollout_rs_threshold": 0.1, "rollout_is": "sequence"},
)


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("mode", ["vanilla", "gspo", "sapo", "clip_cov", "kl_cov", "geo_mean"])
def test_verl_with_rollout_correction(mode, correction):
    for i, (version, aggregation) in enumerate(itertools.product(["0.7.1", "0.9.0"], AGGREGATIONS)):
        if version < "0.9.0" and (aggregation == "token-sum" or "_" in str(correction.get("rollout_is_threshold"))):
            continue
        halves = {"microbatch_ids": torch.tensor([1, 1, 1, 1, 0, 0, 0, 0])}
        rollouts, scores = batch(spread=0.15, **halves | ({"old_logprobs": None} if i % 2 else {}))
        kl = {"use_kl_loss": True, "kl_loss_coef": 0.3}
        chosen = {"trainer": "verl", "version": version, "loss_mode": mode, "loss_agg_mode": aggregation}
        agree(verl, rollouts, scores, SETTINGS | kl | chosen | correction)


@pytest.mark.parametrize("correction", [{}, *(c for c in CORRECTIONS if "rollout_is_batch_normalize" not in c)])
@pytest.mark.parametrize("loss_type", ["ppo_clip", "reinforce"])
def test_verl_in_bypass_mode(loss_type, correction):
    rollouts, scores = batch()
    for aggregation in AGGREGATIONS:
        chosen = {"trainer": "verl", "bypass_mode": True, "loss_type": loss_type, "loss_agg_mode": aggregation}
        agree(verl, rollouts, scores, SETTINGS | {"use_kl_loss": True} | chosen | correction)


def test_verl_far_off_policy():
    """Bounds of logarithms and of the k3 estimate have no gradient beyond them."""
    for mode, kind in itertools.product(MODES, KINDS):
        near = batch(spread=14.0)[0].old_logprobs
        far = near - 20 * torch.rand(near.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        rollouts, scores = batch(old_logprobs=far, reference_logprobs=far)
        chosen = {"trainer": "verl", "loss_mode": mode, "use_kl_loss": True, "kl_loss_coef": 1e-4, "kl_loss_type": kind}
        loss = build_loss(SETTINGS | chosen)
        s = scores.logprobs.clone().requires_grad_()
        expected = torch.autograd.grad(verl.loss(s, scores.entropies, rollouts, loss), s)[0]
        torch.testing.assert_close(loss.coefficients(rollouts, scores).logprobs, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("version", ["0.9.10", "0.10.3", "0.11.0"])
@pytest.mark.parametrize("correction", ["tis", "icepop", "seq-mask-tis", None])
@pytest.mark.parametrize("policy", ["ppo", "gspo"])
def test_openrlhf(policy, correction, version):
    fixed = {"trainer": "openrlhf", "version": version, "policy_loss_type": policy}
    if correction is not None:
        fixed |= {"enable_vllm_is_correction": True, "vllm_is_correction_type": correction}
        fixed |= {"vllm_is_truncated_threshold": [0.9, 1.2]}
    options = itertools.product([True, False], ["k1", "k2", "k3"], [None, 1.3], [None, [0.1, 0.3]], [0.0, 0.02])
    for by_token, kind, dual, clip, bonus in options:
        kl = {"use_kl_loss": True, "init_kl_coef": 0.2, "kl_estimator": kind}
        more = {"token_level_loss": by_token, "dual_clip": dual, "eps_clip_low_high": clip, "entropy_loss_coef": bonus}
        rollouts, scores = batch(**{"old_logprobs": None} if bonus else {})
        agree(openrlhf, rollouts, scores, fixed | kl | more)


def test_openrlhf_0_9_0_bounds_the_correction_from_above():
    rollouts, scores = batch()
    chosen = {"version": "0.9.0", "enable_vllm_is_correction": True, "vllm_is_truncated_threshold": 1.1}
    agree(openrlhf, rollouts, scores, {"trainer": "openrlhf"} | chosen)


PRIME_RL = (
    *({"version": v, "num_processes": 2} for v in ("0.2", "0.3", "0.4", "0.5", "0.6", "0.8")),
    {"dppo_mask_low": 0.02, "dppo_mask_high": 0.04, "kl_tau": 0.1, "adv_tau": 0.7},
    {"type": "ipo", "ipo_threshold": 0.03, "kl_tau": 0.1},
    {"version": "0.5", "ipo_mask_low": 0.02, "ipo_mask_high": 0.04, "teacher_tau": 0.3},
    *(
        {"version": "0.4", "ratio_type": level, "teacher_tau": 0.3, "adv_tau": 0.7, "kl_tau": 0.1} | bounds
        for level in ("token", "sequence")
        for bounds in (
            {"token_mask_low": 0.8, "token_mask_high": 1.3},
            {"geo_mask_low": 0.9, "geo_mask_high": 1.1},
            {"sequence_mask_low": 0.6, "sequence_mask_high": 1.5},
            {"sequence_clip_high": 1.1},
        )
    ),
)


@pytest.mark.parametrize("settings", PRIME_RL)
def test_prime_rl(settings):
    agree(prime_rl, *batch(), {"trainer": "prime_rl"} | settings)
