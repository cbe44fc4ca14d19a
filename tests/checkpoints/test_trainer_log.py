"""What a trainer's log shows of its loss, of its settings and of its numbers."""

import json

import pytest

from entropy_probe.checkpoints.errors import DamagedFileError
from entropy_probe.checkpoints.trainer_log import TrainerLog, read_log

PLAIN = {
    "loss": 0.02,
    "grad_norm": 0.5,
    "reward": 0.6,
    "entropy": 0.2,
    "clip_ratio/high_max": 0.0,
    "frac_reward_zero_std": 0.2,
    "step": 1,
}
REUSED = {key: value for key, value in PLAIN.items() if key != "reward"}


def looked_at(tmp_path, *records) -> TrainerLog:
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 3, "log_history": list(records)}))
    return read_log(tmp_path)


def test_a_plain_log_shows_nothing(tmp_path):
    assert read_log(tmp_path).not_modelled() == ()
    quiet = PLAIN | {"step": 2, "entropy_coef": 0.0, "aux_loss": 0.0}
    for log in (looked_at(tmp_path), looked_at(tmp_path, PLAIN, quiet, "noise")):
        assert log.not_modelled() == ()
        assert log.other_loss() is None
        assert list(log.settings()) == []
        assert not log.reuses_rollouts
    (tmp_path / "trainer_state.json").write_text("{")
    with pytest.raises(DamagedFileError):
        read_log(tmp_path)


@pytest.mark.parametrize(
    ("logged", "said"),
    [
        ({"kl": 0.0}, "the KL term to a reference policy (the log has kl, 0 last)"),
        ({"objective/kl": 3.25}, "(the log has objective/kl, 3.25 last)"),
        ({"entropy_coef": 0.01}, "the entropy bonus (the log has entropy_coef, 0.01 last)"),
        ({"aux_loss": 2.1}, "the auxiliary loss that balances the experts (the log has aux_loss, 2.1 last)"),
        (
            {"clip_ratio/low_mean": 0.03},
            "the log has clip_ratio/low_mean up to 0.03, so the trainer takes several steps",
        ),
        ({"sampling/importance_sampling_ratio/mean": 0.9}, "the weights that correct for the sampler"),
    ],
)
def test_each_term_has_its_line(tmp_path, logged, said):
    lines = looked_at(tmp_path, PLAIN | logged, PLAIN | logged).not_modelled()
    assert len(lines) == 1
    assert said in lines[0]


@pytest.mark.parametrize(
    ("record", "name"),
    [
        ({"loss": 0.6, "rewards/chosen": -1.0, "rewards/rejected": -2.0, "entropy": 1.0}, "DPO, KTO"),
        ({"loss": 0.6, "rewards/rejected": -2.0}, "DPO, KTO"),
        ({"loss": 0.6, "rewards/chosen": -1.0, "logps/chosen": -9.0, "log_odds_ratio": 0.1}, "ORPO"),
        ({"loss": 0.6, "rewards/chosen": -1.0, "objective/rlhf_reward": 0.1, "objective/kl": 0.2}, "online DPO"),
        ({"loss/value_avg": 0.6, "objective/kl": 0.2, "policy/clipfrac_avg": 0.0}, "PPO"),
        ({"loss": 1.2, "mean_token_accuracy": 0.7, "entropy": 1.0}, "SFT"),
        ({"loss": 0.6, "margin": 1.0, "mean_reward": 0.2}, "reward models"),
        ({"loss": 0.6, "grad_norm": 1.0, "learning_rate": 1e-5}, "neither reward nor clip_ratio"),
    ],
)
def test_trainers_of_other_losses_are_named(tmp_path, record, name):
    said = looked_at(tmp_path, record, record).other_loss()
    assert said is not None
    assert name in said
    assert "trainer_state.json logs" in said


@pytest.mark.parametrize(
    "record",
    [
        PLAIN | {"mean_token_accuracy": 0.7},
        PLAIN | {"rewards/chosen/mean": 0.7},  # a reward function of that name
        {"loss": 0.6, "reward": 0.5},
        REUSED,
        {"loss": 0.6, "cispo_clip_ratio": 0.0},
    ],
)
def test_policy_gradients_are_not_taken_for_others(tmp_path, record):
    assert looked_at(tmp_path, record, record).other_loss() is None


def test_what_was_logged_long_ago_does_not_count(tmp_path):
    log = looked_at(tmp_path, PLAIN | {"kl": 0.1, "rewards/chosen": 1.0}, *[PLAIN] * 20)
    assert log.not_modelled() == ()
    assert log.other_loss() is None


def test_settings_that_only_the_log_tells(tmp_path):
    log = looked_at(tmp_path, PLAIN | {"kl": 0.1, "entropy_coef": 0.02}, PLAIN | {"kl": 0.2, "entropy_coef": 0.01})
    assert list(log.settings()) == [("beta", None, "kl"), ("entropy_coef", 0.01, "entropy_coef")]
    assert list(looked_at(tmp_path, {"reward": 1.0, "cispo_clip_ratio": 0.0}).settings()) == [
        ("loss_type", "cispo", "cispo_clip_ratio")
    ]


def test_steps_without_reward_are_reused_rollouts(tmp_path):
    assert looked_at(tmp_path, PLAIN, REUSED, PLAIN, REUSED).reuses_rollouts
    assert not looked_at(tmp_path, PLAIN, PLAIN, {"eval_loss": 1.0}, {"train_runtime": 3.0}).reuses_rollouts


def test_numbers_are_those_of_the_last_steps(tmp_path):
    records = [PLAIN | {"grad_norm": float(i), "reward": 0.1 * i, "entropy": None} for i in range(9)]
    log = looked_at(tmp_path, *records, PLAIN | {"grad_norm": float("nan")}, {"eval_reward": 9.0})
    assert log.numbers["grad_norm"] == (4.0, 5.0, 6.0, 7.0, 8.0)
    assert log.numbers["reward"] == pytest.approx((0.5, 0.6, 0.7, 0.8, 0.6))
    assert log.numbers["entropy"] == (0.2,)
    assert "completions/mean_length" not in log.numbers
