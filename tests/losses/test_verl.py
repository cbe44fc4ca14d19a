"""verl's losses against autograd on a plain transcription of its formulas."""

import itertools

import pytest
import torch

from entropy_probe.losses import build_loss
from tests.losses import verl_formulas as verl
from tests.losses.off_policy import agree, batch, far_batch

MODES = ("vanilla", "dppo_tv", "dppo_kl", "gspo", "sapo", "gpg", "clip_cov", "kl_cov", "geo_mean", "dro", "cispo")
AGGREGATIONS = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
KINDS = ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3")
SINCE = {"dppo_tv": "0.7.1", "dppo_kl": "0.7.1", "dro": "0.9.0"}
SETTINGS = {
    "dro_beta": 0.3, "loss_scale_factor": 7.0, "num_processes": 1, "clip_ratio_high": 0.28, "clip_ratio_c": 1.4,
    "clip_cov_lb": 0.1, "clip_cov_ratio": 0.15, "kl_cov_ratio": 0.2, "entropy_coeff": 0.02,
}  # fmt: skip


def test_the_batch_is_off_policy_enough_for_every_clip():
    """Both signs of advantages have ratios inside the clip range and beyond either end of it."""
    rollouts, scores = batch()
    ratio = (scores.logprobs - rollouts.old_logprobs).exp()
    for sign in (1, -1):
        ratios = ratio[rollouts.token_advantages * sign > 0]
        assert (ratios < 0.8).any()
        assert (ratios > SETTINGS["clip_ratio_c"]).any()
        assert ((ratios > 0.9) & (ratios < 1.1)).any()


@pytest.mark.parametrize("microbatches", [True, False])
@pytest.mark.parametrize(
    ("mode", "version"),
    [(mode, v) for mode in MODES for v in ("0.7.0", "0.7.1", "0.9.0") if v >= SINCE.get(mode, "")],
)
def test_verl(mode, version, microbatches):
    rollouts, scores = batch(**{} if microbatches else {"microbatch_ids": None})
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
@pytest.mark.parametrize("mode", ["vanilla", "gspo", "clip_cov", "geo_mean"])
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


@pytest.mark.parametrize("mode", MODES)
def test_verl_far_off_policy(mode):
    """Bounds of logarithms and of the k3 estimate have no gradient beyond them."""
    for kind in KINDS:
        chosen = {"trainer": "verl", "loss_mode": mode, "use_kl_loss": True, "kl_loss_coef": 1e-4, "kl_loss_type": kind}
        agree(verl, *far_batch(), SETTINGS | chosen, rtol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_verl_with_advantages_of_tokens(mode):
    for aggregation in AGGREGATIONS:
        chosen = {"trainer": "verl", "loss_mode": mode, "loss_agg_mode": aggregation}
        agree(verl, *batch(token_advantages=True), SETTINGS | chosen)


def test_the_draw_of_clip_cov_is_its_own_and_repeatable():
    rollouts, scores = batch()

    def dropped(seed):
        loss = build_loss({"trainer": "verl", "loss_mode": "clip_cov", "clip_cov_lb": 0.05, "seed": seed})
        return tuple(map(tuple, (loss.coefficients(rollouts, scores).logprobs == 0).nonzero().tolist()))

    assert dropped(0) == dropped(0)
    assert len({dropped(seed) for seed in range(10)}) > 1
    (note,) = (n for n in build_loss({"trainer": "verl", "loss_mode": "clip_cov"}).notes(rollouts, scores))
    assert note.code == "own_draw"
    assert "another draw than the trainer's" in note.text


@pytest.mark.parametrize(
    ("settings", "columns", "codes"),
    [
        ({}, {}, set()),
        ({}, {"old_logprobs": None}, {"ratio_one"}),
        ({"train_batch_size": 8, "ppo_mini_batch_size": 8}, {"old_logprobs": None}, set()),
        ({"clip_ratio_high": 0.3, "train_batch_size": 8, "ppo_mini_batch_size": 8}, {"old_logprobs": None}, {"inert"}),
        ({"clip_ratio": 0.3}, {}, {"inert"}),
        ({"clip_ratio": 0.3, "clip_ratio_low": None}, {}, set()),
        ({"bypass_mode": True, "loss_mode": "gspo"}, {}, {"inert"}),
        ({"version": "0.7.1"}, {"microbatch_ids": None}, {"global_mean"}),
        ({"version": "0.7.1", "use_legacy_worker_impl": "disable"}, {"microbatch_ids": None}, set()),
        ({"version": "0.7.1"}, {"microbatch_ids": torch.tensor([0, 1, 0, 0, 0, 0, 0, 0])}, {"loss_not_a_number"}),
        ({"loss_mode": "kl_cov"}, {"microbatch_ids": None}, {"global_mean"}),
        ({"loss_mode": "geo_mean", "num_processes": 1}, {"microbatch_ids": None}, {"global_mean"}),
    ],
)
def test_what_is_said(settings, columns, codes):
    rollouts, scores = batch(**columns)
    loss = build_loss({"trainer": "verl"} | settings)
    notes = loss.notes(rollouts, scores if loss.needs_scores(rollouts) else None)
    assert {note.code for note in notes} == codes


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"version": "0.6.1"}, "loss.version: input should be '0.7.0', .*, got '0.6.1'"),
        ({"loss_mode": "dro"}, "loss.dro_beta: expected a number above 0 beside loss_mode dro, got none"),
        ({"loss_mode": "dppo_tv", "version": "0.7.0"}, "dppo_tv came with verl 0.7.1, got version 0.7.0"),
        ({"loss_agg_mode": "token-sum", "version": "0.8.0"}, "token-sum came with verl 0.9.0, got version 0.8.0"),
        ({"loss_agg_mode": "seq-mean-token-sum-norm"}, "loss.loss_scale_factor: .* set data.max_response_length"),
        ({"loss_mode": "geo_mean"}, "loss.num_processes: expected the number of data-parallel ranks beside geo_mean"),
        (
            {"use_legacy_worker_impl": "enable"},
            "use_legacy_worker_impl: enable is known up to verl 0.7.1, got .* 0.9.0",
        ),
        ({"kl_loss_type": "full"}, "loss.kl_loss_type: full, over the whole vocabulary, is not implemented in verl"),
        ({"kl_loss_type": "k4"}, "loss.kl_loss_type: expected one of kl, .*, got 'k4'"),
        (
            {"kl_loss_type": "k3+", "version": "0.7.1"},
            "kl_loss_type: k3\\+ is known from verl 0.8.0 on, got version 0.7.1",
        ),
        ({"clip_ratio_c": 1.0}, "loss.clip_ratio_c: input should be greater than 1, got 1.0"),
        ({"clip_rato": 0.1}, "loss.clip_rato: not a setting of verl's losses; did you mean clip_ratio?"),
        ({"rollout_is": "token", "rollout_is_threshold": "2_1"}, "rollout_is_threshold: expected a number .*'2_1'"),
        ({"rollout_is": "token", "rollout_is_threshold": -1}, "rollout_is_threshold: expected a number above 0"),
        (
            {"rollout_is_threshold": "0.5_2", "version": "0.7.1"},
            "rollout_is_threshold: 0.5_2 is known from verl 0.8.0 on",
        ),
        ({"rollout_rs": "token_k9", "rollout_rs_threshold": 1.0}, "rollout_rs: expected one or more of .*'token_k9'"),
        ({"rollout_rs": "token_k2"}, "rollout_rs_threshold: expected one number, or 1 with commas between, got None"),
        ({"rollout_rs": "token_k2", "rollout_rs_threshold": "1_2"}, "expected one number for token_k2, got '1_2'"),
        (
            {"rollout_rs": "token_k1", "rollout_rs_threshold": 2.0, "version": "0.7.0"},
            "rollout_rs: .* from verl 0.7.1 on",
        ),
        ({"bypass_mode": True, "version": "0.7.1"}, "loss.bypass_mode: with the old workers"),
        (
            {"bypass_mode": True, "rollout_is_batch_normalize": True},
            "loss.rollout_is_batch_normalize: with bypass_mode",
        ),
    ],
)
def test_what_verl_does_not_take_is_refused(settings, expected):
    with pytest.raises(ValueError, match=expected) as caught:
        build_loss({"trainer": "verl"} | settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "column"),
    [
        ({"use_kl_loss": True}, "reference_logprobs"),
        ({"rollout_is": "token"}, "sampled_logprobs"),
        ({"bypass_mode": True}, "sampled_logprobs"),
        ({"ppo_epochs": 2}, "old_logprobs"),
        ({"train_batch_size": 64, "ppo_mini_batch_size": 16}, "old_logprobs"),
    ],
)
def test_columns_that_are_missing_are_named(settings, column):
    rollouts, scores = batch(**{column: None})
    with pytest.raises(ValueError, match=rf"{column}: expected \[N, L\] on an update batch of .*, got None; record"):
        build_loss({"trainer": "verl"} | settings).coefficients(rollouts, scores)
