"""AReaL's losses against autograd on a plain transcription of its formulas."""

from itertools import product

import pytest

from entropy_probe.losses import build_loss
from tests.losses import areal_formulas as areal
from tests.losses.off_policy import agree, batch

DECOUPLED = {"use_decoupled_loss": True}
RULES = (
    *({"metric": m, "upper": 0.06} for m in ("kl_k1", "kl_k2", "kl_k3")),
    {"metric": "ratio", "upper": 1.2, "lower": 0.9},
    {"metric": "ratio", "upper": 1.2},
)
SETTINGS = (
    {},
    {"recompute_logprob": True},
    {"eps_clip": 0.05, "eps_clip_higher": 0.4},
    {"eps_clip": 0.05, "c_clip": 1.1},
    DECOUPLED,
    {"use_sapo_loss": True, "sapo_tau_pos": 0.7, "sapo_tau_neg": 2.0},
    *(
        DECOUPLED | {"rejection_sampling": rule | {"action": action}}
        for rule, action in product(RULES, ("mask", "clamp"))
    ),
    *(
        DECOUPLED | {"rejection_sampling": rule | {"level": "sequence", "agg": agg, "action": action}}
        for rule, agg, action in product(RULES[2:4], ("sum", "mean", "max"), ("mask", "clamp"))
    ),
)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_areal(settings, level):
    agree(areal, *batch(token_advantages=True), {"trainer": "areal", "importance_sampling_level": level} | settings)


def test_before_the_first_step_the_policy_is_the_old_one():
    rollouts, scores = batch(old_logprobs=None)
    loss = build_loss({"trainer": "areal", "rejection_sampling": {"upper": 1.1}} | DECOUPLED)
    same, _ = batch(old_logprobs=scores.logprobs)
    got, expected = (loss.coefficients(given, scores).logprobs for given in (rollouts, same))
    assert (got - expected).abs().max() < 1e-12
    assert [note.code for note in loss.notes(rollouts, scores)] == ["ratio_one"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"behave_imp_weight_cap": 5.0}, r"loss\.behave_imp_weight_cap: input should be None, got 5\.0"),
        ({"m2_threshold": 0.04}, r"loss\.m2_threshold: input should be None, got 0\.04"),
        (DECOUPLED | {"use_sapo_loss": True}, r"loss\.use_sapo_loss: expected it without use_decoupled_loss.*got both"),
        ({"prox_logp_method": "loglinear"}, r"loss\.prox_logp_method: input should be 'recompute' or 'metrics'"),
        ({"rejection_sampling": {"level": "batch"}}, r"loss\.rejection_sampling\.level: input should be 'token'"),
    ],
)
def test_what_is_not_modelled_is_refused(settings, expected):
    with pytest.raises(ValueError, match=expected):
        build_loss({"trainer": "areal"} | settings)


@pytest.mark.parametrize(
    ("settings", "column"),
    [
        ({}, "sampled_logprobs"),
        ({"recompute_logprob": True, "ppo_n_minibatches": 4}, "old_logprobs"),
        (DECOUPLED | {"rejection_sampling": {}}, "sampled_logprobs"),
    ],
)
def test_columns_that_are_missing_are_named(settings, column):
    rollouts, _ = batch(**{column: None})
    with pytest.raises(ValueError, match=rf"{column}: expected \[N, L\] on an update batch of .*, got None; record"):
        build_loss({"trainer": "areal"} | settings).check(rollouts)


def test_a_ratio_to_the_sampler_takes_the_policys_own_scores():
    assert build_loss({"trainer": "areal"}).needs_scores(batch(old_logprobs=None)[0])
