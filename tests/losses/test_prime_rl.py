"""prime-rl's losses against autograd on a plain transcription of its formulas."""

import pytest

from entropy_probe.losses import build_loss
from tests.losses import prime_rl_formulas as prime_rl
from tests.losses.off_policy import agree, batch, far_batch

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


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_prime_rl_far_off_policy(level):
    bounds = {"token_mask_low": 0.0, "token_mask_high": 1e30, "geo_mask_low": 0.0, "geo_mask_high": 1e30}
    bounds |= {"sequence_mask_high": 1e30, "sequence_clip_high": 1e6, "ratio_type": level, "kl_tau": 0.1}
    agree(prime_rl, *far_batch(), {"trainer": "prime_rl", "version": "0.4"} | bounds, rtol=1e-12)


def test_prime_rl_with_advantages_of_tokens():
    agree(prime_rl, *batch(token_advantages=True), {"trainer": "prime_rl", "dppo_mask_high": 0.04})


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"type": "sft"}, "loss.type: input should be 'default' or 'ipo', got 'sft'"),
        (
            {"token_mask_low": 0.1},
            "loss.token_mask_low: not a setting of prime-rl 0.8's loss; set version to the trainer's",
        ),
        ({"version": "0.4", "dppo_mask_low": 0.1}, "loss.dppo_mask_low: not a setting of prime-rl 0.4's loss"),
        ({"version": "0.5", "type": "ipo"}, "loss.type: not a setting of prime-rl 0.5's loss"),
        ({"version": "0.2", "teacher_tau": 0.5}, "loss.teacher_tau: not a setting of prime-rl 0.2's loss"),
        ({"version": "0.6", "teacher_tau": 0.5}, "loss.teacher_tau: not a setting of prime-rl 0.6's loss"),
        ({"version": "1.0"}, "loss.version: input should be '0.2', .*, got '1.0'"),
    ],
)
def test_what_prime_rl_does_not_take_is_refused(settings, expected):
    with pytest.raises(ValueError, match=expected):
        build_loss({"trainer": "prime_rl"} | settings)


@pytest.mark.parametrize(
    ("settings", "column"),
    [({}, "sampled_logprobs"), ({"version": "0.4", "teacher_tau": 0.1}, "reference_logprobs")],
)
def test_columns_that_are_missing_are_named(settings, column):
    rollouts, scores = batch(**{column: None})
    with pytest.raises(ValueError, match=rf"{column}: expected \[N, L\] on an update batch of .*, got None; record"):
        build_loss({"trainer": "prime_rl"} | settings).coefficients(rollouts, scores)


@pytest.mark.parametrize(
    ("settings", "codes"),
    [
        ({}, set()),
        ({"version": "0.4"}, set()),
        ({"version": "0.4", "ratio_type": "sequence"}, {"global_mean"}),
        ({"version": "0.5", "num_processes": 2}, {"global_mean"}),
    ],
)
def test_what_is_said(settings, codes):
    rollouts, scores = batch(microbatch_ids=None)
    notes = build_loss({"trainer": "prime_rl"} | settings).notes(rollouts, scores)
    assert {note.code for note in notes} == codes
