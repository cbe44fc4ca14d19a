"""What a trainer's log shows of a loss that is more than a policy gradient."""

import json

import pytest

from entropy_probe.checkpoints.errors import DamagedFileError
from entropy_probe.checkpoints.trainer_log import not_modelled_by_log

PLAIN = {
    "loss": 0.02,
    "reward": 0.6,
    "entropy": 0.2,
    "clip_ratio/high_max": 0.0,
    "frac_reward_zero_std": 0.2,
    "step": 1,
}


def looked_at(tmp_path, *records) -> tuple[str, ...]:
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 3, "log_history": list(records)}))
    return not_modelled_by_log(tmp_path)


def test_a_plain_log_shows_nothing(tmp_path):
    assert not_modelled_by_log(tmp_path) == ()
    assert looked_at(tmp_path) == ()
    assert looked_at(tmp_path, PLAIN, PLAIN | {"step": 2, "entropy_coef": 0.0, "aux_loss": 0.0}, "noise") == ()
    (tmp_path / "trainer_state.json").write_text("{")
    with pytest.raises(DamagedFileError):
        not_modelled_by_log(tmp_path)


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
        ({"rewards/chosen": -1.0, "rewards/rejected": -2.0}, "learns from preferences (DPO, KTO and alike)"),
    ],
)
def test_each_term_has_its_line(tmp_path, logged, said):
    found = looked_at(tmp_path, PLAIN | logged, PLAIN | logged)
    assert len(found) == 1
    assert said in found[0]


def test_supervised_training(tmp_path):
    (said,) = looked_at(tmp_path, {"loss": 1.2, "mean_token_accuracy": 0.7, "entropy": 1.0})
    assert "imitates given text (SFT)" in said
    assert looked_at(tmp_path, PLAIN | {"mean_token_accuracy": 0.7}) == ()


def test_what_was_logged_long_ago_does_not_count(tmp_path):
    assert looked_at(tmp_path, PLAIN | {"kl": 0.1}, *[PLAIN] * 20) == ()
