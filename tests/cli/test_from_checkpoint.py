"""Settings that the checkpoint tells: taken where the config is silent, an error where it says otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from entropy_probe.checkpoints import CheckpointError
from entropy_probe.cli.config import RunConfig, load_config
from entropy_probe.cli.from_checkpoint import with_trainer_settings
from entropy_probe.cli.sweep_config import SweepConfig
from tests.checkpoints.settings_files import GRPO, pickled_settings, saved_settings

TRAINED = GRPO | {
    "temperature": 0.7,
    "max_grad_norm": 0.2,
    "max_completion_length": 64,
    "loss_type": "dr_grpo",
    "beta": 0.04,
    "scale_rewards": "none",
    "gradient_accumulation_steps": 1,
    "steps_per_generation": 1,
    "num_iterations": 1,
}
SAMPLED = {
    "prompts": {"dataset": "gsm8k"},
    "reward": "gsm8k",
    "update": {"num_prompts": 4, "group_size": 4},
    "evaluation": {"total_sequences": 8},
}
GIVEN = {"rollouts": {"update": "u.parquet", "evaluation": "e.parquet"}}
CLASS = "trl.trainer.grpo_config GRPOConfig"


def directory(path: Path, named: str | None = CLASS, step: int = 0, log: list[Any] | None = None, **state: Any) -> Path:
    """A checkpoint of which only these files are looked at."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text("{}")
    (path / "optimizer.pt").touch()
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": log or []}))
    return path if named is None else saved_settings(path, pickled_settings(named, **state))


def config(checkpoint: Path, *, batches: dict[str, Any] = SAMPLED, **settings: Any) -> RunConfig:
    places = {"checkpoint": checkpoint, "output_dir": checkpoint / "out", "device": "cpu"}
    return RunConfig.model_validate(places | batches | settings)


def test_what_the_config_leaves_open_is_the_trainers(tmp_path):
    place = directory(tmp_path / "c", **TRAINED)
    filled, notes = with_trainer_settings(config(place))
    assert notes == ()
    probe, loss = filled.probe, filled.probe.loss
    assert (probe.temperature, probe.max_grad_norm, probe.max_completion_length) == (0.7, 0.2, 64)
    assert (loss.loss_type, loss.beta, loss.max_completion_length) == ("dr_grpo", 0.04, 64)
    assert filled.update is not None
    assert filled.update.scale_rewards == "none"
    assert filled.probe.learning_rate is None


def test_what_agrees_may_be_said_again_and_the_written_config_gives_the_same(tmp_path):
    place = directory(tmp_path / "c", **TRAINED)
    said = {"temperature": 0.7, "max_grad_norm": 0.2, "loss": {"trainer": "trl", "loss_type": "dr_grpo"}}
    filled, notes = with_trainer_settings(config(place, probe=said))
    assert notes == ()
    assert filled.probe.loss.beta == 0.04
    (tmp_path / "again.yaml").write_text(filled.to_yaml())
    assert with_trainer_settings(load_config(tmp_path / "again.yaml")) == (filled, ())


WRONG = [
    ({"probe": {"loss_type": "dapo"}}, "probe.loss.loss_type", "dr_grpo", "dapo"),
    ({"probe": {"max_grad_norm": 1.0}}, "probe.max_grad_norm", "0.2", "1.0"),
    ({"probe": {"max_grad_norm": None}}, "probe.max_grad_norm", "0.2", "null"),
    ({"probe": {"temperature": 1.0}}, "probe.temperature", "0.7", "1.0"),
    ({"probe": {"max_completion_length": 32}}, "probe.max_completion_length", "64", "32"),
    ({"probe": {"loss": {"trainer": "trl", "beta": 0.1}}}, "probe.loss.beta", "0.04", "0.1"),
    ({"update": SAMPLED["update"] | {"scale_rewards": "group"}}, "update.scale_rewards", "none", "group"),
]


@pytest.mark.parametrize(("settings", "key", "told", "own"), WRONG)
def test_a_contradiction_names_both_values_and_the_file(tmp_path, settings, key, told, own):
    place = directory(tmp_path / "c", **TRAINED)
    with pytest.raises(ValueError, match="or insist on the config with trust_config: true") as caught:
        with_trainer_settings(config(place, **settings))
    expected = f"{key}: expected {told}, which {place}/training_args.bin says of training, got {own}; leave it out"
    assert str(caught.value).startswith(expected)
    filled, notes = with_trainer_settings(config(place, trust_config=True, **settings))
    (note,) = notes
    assert note.code == "config_trusted"
    assert note.text == f"{key} is {own}, {place}/training_args.bin says {told}; the config is trusted"
    assert yaml.safe_load(filled.to_yaml())["trust_config"] is True


def test_a_default_clip_range_need_not_be_mentioned(tmp_path):
    """So that no note speaks of a setting that nobody made."""
    place = directory(tmp_path / "c", **TRAINED)
    for said in (None, 0.2):
        filled, notes = with_trainer_settings(config(place, probe={"loss": {"trainer": "trl", "epsilon": said}}))
        assert (filled.probe.loss.epsilon, notes) == (said, ())
    with pytest.raises(ValueError, match=r"probe.loss.epsilon: expected 0.2, .* got 0.3"):
        with_trainer_settings(config(place, probe={"loss": {"trainer": "trl", "epsilon": 0.3}}))
    filled, _ = with_trainer_settings(config(directory(tmp_path / "d", **TRAINED | {"epsilon": 0.3})))
    assert filled.probe.loss.epsilon == 0.3


def test_no_clipping_is_none(tmp_path):
    for value in (0.0, None):
        filled, _ = with_trainer_settings(config(directory(tmp_path / "c", **TRAINED | {"max_grad_norm": value})))
        assert filled.probe.max_grad_norm is None


def test_saved_rollouts_are_not_sampled(tmp_path):
    """So how training samples contradicts nothing."""
    place = directory(tmp_path / "c", **TRAINED | {"mask_truncated_completions": True})
    filled, notes = with_trainer_settings(config(place, batches=GIVEN | {"update": SAMPLED["update"]}))
    assert (filled.update, notes) == (None, ())
    assert not filled.probe.update_selected


def test_without_a_file_the_defaults_stand(tmp_path):
    place = directory(tmp_path / "c", named=None)
    given = config(place, probe={"max_completion_length": 8})
    assert with_trainer_settings(given) == (given.resolved(), ())
    with pytest.raises(ValueError, match=r"probe.max_completion_length: required to sample the update batch, but miss"):
        with_trainer_settings(config(place))


@pytest.mark.parametrize(
    ("named", "log"),
    [
        ("trl.trainer.dpo_config DPOConfig", []),
        ("trl.trainer.sft_config SFTConfig", []),
        ("trl.experimental.online_dpo.online_dpo_config OnlineDPOConfig", []),
        ("transformers.training_args TrainingArguments", [{"loss": 0.5, "rewards/chosen": 1.0}]),
        (None, [{"loss": 0.5, "rewards/chosen": 1.0}]),
        (None, [{"loss": 0.5, "mean_token_accuracy": 1.0}]),
        (None, [{"loss": 0.5, "grad_norm": 1.0}]),
    ],
)
def test_trainers_of_other_losses_are_refused_by_name(tmp_path, named, log):
    place = directory(tmp_path / "c", named, log=log, beta=0.1)
    name = "trainer_state.json logs" if log else named.replace(" ", ".")  # type: ignore[union-attr]
    with pytest.raises(CheckpointError, match=f"got one of .*{name}.*whose step is that of another loss"):
        with_trainer_settings(config(place, probe={"max_completion_length": 8}))
    filled, _ = with_trainer_settings(config(place, trust_config=True, probe={"max_completion_length": 8}))
    assert (filled.probe.loss.loss_type, filled.probe.loss.beta) == ("dapo", 0.0)  # that beta is another one


def test_a_logged_kl_asks_for_its_coefficient(tmp_path):
    log = [{"reward": 1.0, "clip_ratio/high_max": 0.0, "kl": 0.01}]
    place = directory(tmp_path / "c", named=None, log=log)
    length = {"max_completion_length": 8}
    with pytest.raises(ValueError, match=r"probe.loss.beta: expected above 0, which .*\(kl\) says .* got 0.0; set it"):
        with_trainer_settings(config(place, probe=length))
    _, notes = with_trainer_settings(config(place, probe=length | {"loss": {"trainer": "trl", "beta": 0.1}}))
    assert notes == ()
    _, notes = with_trainer_settings(config(place, probe=length, trust_config=True))
    assert [note.code for note in notes] == ["config_trusted"]


def test_settings_that_only_the_log_tells(tmp_path):
    log = [{"reward": 1.0, "cispo_clip_ratio": 0.0, "entropy_coef": 0.02}]
    place = directory(tmp_path / "c", named=None, log=log)
    filled, _ = with_trainer_settings(config(place, probe={"max_completion_length": 8}))
    assert (filled.probe.loss.loss_type, filled.probe.loss.entropy_coef) == ("cispo", 0.02)
    with pytest.raises(ValueError, match=r"expected cispo, which .*trainer_state.json \(cispo_clip_ratio\) says"):
        with_trainer_settings(config(place, probe={"max_completion_length": 8, "loss_type": "dapo"}))


REUSING = TRAINED | {"num_iterations": 2, "steps_per_generation": 4, "gradient_accumulation_steps": 2}


@pytest.mark.parametrize(("step", "batches", "taken"), [(4, GIVEN, 1), (5, GIVEN, 2), (4, SAMPLED, 2), (5, SAMPLED, 2)])
def test_several_steps_on_the_same_rollouts(tmp_path, step, batches, taken):
    """Given rollouts are of the step that the checkpoint is before, and need no old log-probabilities for the first."""
    place = directory(tmp_path / "c", step=step, **REUSING)
    filled, notes = with_trainer_settings(config(place, batches=batches))
    assert notes == ()
    assert filled.probe.loss.num_iterations == taken
    assert filled.probe.loss.steps_per_generation == (None if taken == 1 else 4)
    (tmp_path / "again.yaml").write_text(filled.to_yaml())
    assert with_trainer_settings(load_config(tmp_path / "again.yaml"))[0] == filled


def test_truncated_responses_are_masked_as_in_training(tmp_path):
    place = directory(tmp_path / "c", **TRAINED | {"mask_truncated_completions": True})
    filled, _ = with_trainer_settings(config(place))
    assert filled.update is not None
    assert filled.update.mask_truncated_completions
    assert filled.probe.update_selected


def test_other_advantages_are_not_sampled(tmp_path):
    place = directory(tmp_path / "c", "trl.trainer.rloo_config RLOOConfig", **TRAINED | {"beta": 0.0})
    with pytest.raises(ValueError, match=r"update: expected the trainer's own rollouts.*\(RLOO\)"):
        with_trainer_settings(config(place))
    filled, _ = with_trainer_settings(config(place, batches=SAMPLED | GIVEN))
    assert filled.probe.loss.loss_type == "rloo"
    place = directory(tmp_path / "d", **TRAINED | {"multi_objective_aggregation": "normalize_then_sum"})
    with pytest.raises(ValueError, match="normalises each reward before"):
        with_trainer_settings(config(place, reward=["gsm8k", "math"]))
    with_trainer_settings(config(place))


def test_weights_of_rewards(tmp_path):
    place = directory(tmp_path / "c", **TRAINED | {"reward_weights": [1.0, 0.5]})
    filled, _ = with_trainer_settings(config(place, reward=["gsm8k", "math"]))
    assert filled.reward_weights == (1.0, 0.5)
    with pytest.raises(ValueError, match=r"reward_weights: expected \(1.0, 0.5\), which .* got \(1.0, 1.0\)"):
        with_trainer_settings(config(place, reward=["gsm8k", "math"], reward_weights=[1.0, 1.0]))
    with pytest.raises(ValueError, match=r"reward_weights: expected \(1.0, 0.5\).* got null; name the trainer's 2 rew"):
        with_trainer_settings(config(place))


def test_another_size_of_groups_is_said(tmp_path):
    place = directory(tmp_path / "c", **TRAINED | {"num_generations": 16})
    _, notes = with_trainer_settings(config(place))
    assert [note.code for note in notes] == ["other_group_size"]
    assert notes[0].numbers == {"own": 4.0, "told": 16.0}


def test_a_largest_length_within_the_loss_stays(tmp_path):
    loss = {"trainer": "trl", "loss_type": "dr_grpo", "max_completion_length": 16}
    filled, _ = with_trainer_settings(config(directory(tmp_path / "c", None), batches=GIVEN, probe={"loss": loss}))
    assert filled.probe.loss.max_completion_length == 16
    with pytest.raises(ValueError, match=r"loss.max_completion_length: expected 64, .* got 16"):
        with_trainer_settings(config(directory(tmp_path / "d", **TRAINED), batches=GIVEN, probe={"loss": loss}))


def test_each_checkpoint_of_a_sweep_has_its_own(tmp_path):
    for name, beta in (("c", 0.04), ("d", 0.0)):
        directory(tmp_path / name, **TRAINED | {"beta": beta})
    sweep = {"learning_rates": [1e-4, 1e-3], "checkpoints": [str(tmp_path / name) for name in "cd"]}
    whole = SweepConfig.model_validate(SAMPLED | {"output_dir": tmp_path / "out", "sweep": sweep, "device": "cpu"})
    each = [with_trainer_settings(one)[0] for one in whole.resolved().each()]
    assert [one.probe.loss.beta for one in each] == [0.04, 0.0]


def test_a_value_that_the_loss_does_not_take_names_the_checkpoint(tmp_path):
    place = directory(tmp_path / "c", **TRAINED | {"loss_type": "new_loss"})
    with pytest.raises(ValueError, match=rf"{place}: .*loss_type.*got 'new_loss'"):
        with_trainer_settings(config(place))


VERL = {
    "actor_rollout_ref": {
        "actor": {"clip_ratio_high": 0.28, "grad_clip": 0.5, "ppo_mini_batch_size": 4},
        "rollout": {"temperature": 0.6, "n": 4},
    },
    "algorithm": {"adv_estimator": "grpo"},
    "data": {"train_batch_size": 4, "max_response_length": 64},
}


def of_verl(tmp_path: Path, **algorithm: Any) -> Path:
    place = directory(tmp_path / "c", named=None)
    given = VERL | {"algorithm": VERL["algorithm"] | algorithm}
    (place / ".hydra").mkdir()
    (place / ".hydra/config.yaml").write_text(yaml.safe_dump(given))
    return place


def test_the_loss_is_the_trainers_own_where_the_config_names_none(tmp_path):
    filled, notes = with_trainer_settings(config(of_verl(tmp_path)))
    loss = filled.probe.loss
    assert (loss.trainer, loss.clip_ratio_high, loss.needs_old) == ("verl", 0.28, False)
    assert (filled.probe.temperature, filled.probe.max_grad_norm, filled.probe.max_completion_length) == (0.6, 0.5, 64)
    assert [note.code for note in notes] == ["version_assumed"]
    stated = config(tmp_path / "c", probe={"loss": {"trainer": "verl", "version": "0.8.0"}})
    filled, notes = with_trainer_settings(stated)
    assert (filled.probe.loss.version, filled.probe.loss.clip_ratio_high, notes) == ("0.8.0", 0.28, ())


@pytest.mark.parametrize(
    ("probe", "match"),
    [
        (
            {"loss": {"trainer": "trl"}},
            "probe.loss.trainer: expected verl, which .*config.yaml says of training, got trl",
        ),
        ({"loss_type": "dapo"}, "probe.loss.trainer: expected verl"),
        ({"loss": {"trainer": "verl", "clip_ratio_high": 0.3}}, "probe.loss.clip_ratio_high: expected 0.28, .*got 0.3"),
        ({"temperature": 1.0}, "probe.temperature: expected 0.6, .* got 1.0"),
    ],
)
def test_a_config_against_another_trainers_settings_is_an_error(tmp_path, probe, match):
    place = of_verl(tmp_path)
    with pytest.raises(ValueError, match=match):
        with_trainer_settings(config(place, probe=probe))
    filled, notes = with_trainer_settings(config(place, probe=probe, trust_config=True))
    assert "config_trusted" in [note.code for note in notes]
    assert filled.probe.loss.trainer == probe.get("loss", {}).get("trainer", "trl" if "loss_type" in probe else "verl")


def test_advantages_that_sampling_does_not_give_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"update: expected the trainer's own rollouts, since training estimates adv.*gae"
    ):
        with_trainer_settings(config(of_verl(tmp_path, adv_estimator="gae")))


def test_a_loss_that_is_not_read_has_to_be_stated(tmp_path):
    place = directory(tmp_path / "c", named=None)
    (place / "config.yaml").write_text(yaml.safe_dump({"loss_fn": {}, "policy": {"max_grad_norm": 0.2}}))
    batches = SAMPLED | {"probe": {"max_completion_length": 8}}
    with pytest.raises(ValueError, match=r"probe.loss: expected it to be set, since that of NeMo-RL is none"):
        with_trainer_settings(config(place, batches=batches))
    batches["probe"] |= {"loss_type": "dapo"}
    filled, _ = with_trainer_settings(config(place, batches=batches))
    assert filled.probe.max_grad_norm == 0.2


def test_a_trainers_config_is_given_where_it_lies_elsewhere(tmp_path):
    place = directory(tmp_path / "c", named=None)
    (tmp_path / "other").mkdir()
    file = tmp_path / "other/verl.yaml"
    file.write_text(yaml.safe_dump(VERL))
    filled, _ = with_trainer_settings(config(place, trainer_config=file))
    assert (filled.probe.loss.trainer, filled.trainer_config) == ("verl", file)
    whole = directory(tmp_path / "d", **TRAINED)
    with pytest.raises(CheckpointError, match=r"expected no trainer's config beside .*training_args.bin"):
        with_trainer_settings(config(whole, trainer_config=file))
