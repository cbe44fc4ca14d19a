"""Settings of verl, OpenRLHF and prime-rl from their own configs, under the names of their losses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from entropy_probe.checkpoints.errors import CheckpointError
from entropy_probe.checkpoints.foreign_settings import find_settings, read_settings
from entropy_probe.losses import build_loss

VERL = {
    "actor_rollout_ref": {
        "actor": {
            "clip_ratio_high": 0.28, "loss_agg_mode": "seq-mean-token-sum-norm", "loss_scale_factor": None,
            "use_kl_loss": True, "kl_loss_coef": 0.01, "grad_clip": 0.5, "ppo_mini_batch_size": 8,
            "ulysses_sequence_parallel_size": 2, "policy_loss": {"loss_mode": "gspo"},
        },
        "rollout": {"temperature": 0.6, "n": 4, "top_p": 0.95, "top_k": -1},
    },
    "algorithm": {
        "adv_estimator": "grpo", "norm_adv_by_std_in_grpo": False, "rollout_correction": {"rollout_is": "token"},
    },
    "data": {"train_batch_size": 16, "max_response_length": 64},
    "trainer": {"n_gpus_per_node": 4, "nnodes": 1},
}  # fmt: skip


def written(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content) if path.suffix == ".yaml" else json.dumps(content))
    return path


def test_verls_config_is_found_around_the_checkpoint(tmp_path):
    file = written(tmp_path / "run/.hydra/config.yaml", VERL)
    actor = tmp_path / "run/global_step_4/actor"
    actor.mkdir(parents=True)
    settings = find_settings(actor)
    assert settings is not None
    assert (settings.file, settings.trainer) == (file, "verl")
    loss = build_loss(settings.loss)
    assert loss.trainer == "verl"
    assert (loss.loss_mode, loss.clip_ratio_high, loss.loss_scale_factor, loss.num_processes) == ("gspo", 0.28, 64, 2)
    assert (loss.use_kl_loss, loss.kl_loss_coef, loss.rollout_is, loss.needs_old) == (True, 0.01, "token", True)
    others = {"temperature": 0.6, "max_grad_norm": 0.5, "max_completion_length": 64, "num_generations": 4}
    assert others.items() <= settings.values.items()
    assert (settings.values["scale_rewards"], settings.values["top_p"]) == ("none", 0.95)


@pytest.mark.parametrize("names", ["flat", "dotted", "nested", "script", "wandb"])
def test_openrlhf_by_its_older_and_newer_names(tmp_path, names):
    flat = {"policy_loss_type": "gspo", "eps_clip_low_high": [0.1, 0.3], "use_kl_loss": True, "init_kl_coef": 0.02}
    flat |= {"advantage_estimator": "group_norm", "max_norm": 0.7, "generate_max_len": 32, "temperature": 0.9}
    dotted = {
        "actor.policy_loss_type": "gspo", "actor.eps_clip_low_high": [0.1, 0.3], "algo.kl.use_loss": True,
        "algo.kl.init_coef": 0.02, "algo.advantage.estimator": "group_norm", "actor.max_norm": 0.7,
        "rollout.max_new_tokens": 32, "rollout.temperature": 0.9,
    }  # fmt: skip
    if names == "script":
        words = " \\\n   ".join(
            f"--{name}" + ("" if x is True else " 0.1 0.3" if isinstance(x, list) else f" {x}")
            for name, x in dotted.items()
        )
        file = tmp_path / "train.sh"
        file.write_text(f"set -x  # run\npython3 -m openrlhf.cli.train_ppo_ray {words} \\\n   --ckpt.path $HOME/x\n")
    elif names == "nested":
        nested: dict[str, Any] = {}
        for name, x in dotted.items():
            *parents, last = name.split(".")
            place = nested
            for parent in parents:
                place = place.setdefault(parent, {})
            place[last] = x
        file = written(tmp_path / "args.json", nested)
    else:
        content = {"flat": flat, "dotted": dotted, "wandb": {name: {"value": x} for name, x in flat.items()}}[names]
        file = written(tmp_path / "args.yaml", content)
    settings = read_settings(file)
    loss = build_loss(settings.loss)
    assert (loss.trainer, loss.policy_loss_type, loss.eps_clip_low_high) == ("openrlhf", "gspo", (0.1, 0.3))
    assert (loss.use_kl_loss, loss.init_kl_coef) == (True, 0.02)
    others = {"temperature": 0.9, "max_grad_norm": 0.7, "max_completion_length": 32, "scale_rewards": "group"}
    assert others.items() <= settings.values.items()


def test_verls_overrides_in_a_script(tmp_path):
    file = tmp_path / "run.sh"
    file.write_text(
        "python3 -m verl.trainer.main_ppo algorithm.adv_estimator=grpo \\\n"
        " actor_rollout_ref.actor.clip_ratio_high=0.28 actor_rollout_ref.actor.use_kl_loss=False \\\n"
        " +actor_rollout_ref.actor.policy_loss.loss_mode=clip_cov trainer.n_gpus_per_node=$GPUS \\\n"
        " actor_rollout_ref.rollout.temperature=$T $@\n"
    )
    with pytest.raises(CheckpointError, match=r"rollout.temperature: expected a plain value, got '\$T'; write it out"):
        read_settings(file)
    file.write_text(file.read_text().replace("$T", "0.8"))
    settings = read_settings(file)
    loss = build_loss(settings.loss)
    assert (loss.loss_mode, loss.clip_ratio_high, loss.use_kl_loss) == ("clip_cov", 0.28, False)
    assert settings.values["temperature"] == 0.8


@pytest.mark.parametrize(
    ("loss", "version"),
    [({"dppo_mask_low": 0.3}, "0.8"), ({"ipo_mask_low": 0.3}, "0.5"), ({"ratio_type": "sequence"}, "0.4")],
)
def test_prime_rls_two_files(tmp_path, loss, version):
    written(tmp_path / "configs/trainer.json", {"loss": loss, "optim": {"max_norm": 0.3}, "max_concurrent_runs": 1})
    sampling = {"temperature": 0.7, "max_completion_tokens": 99}
    written(tmp_path / "configs/orchestrator.json", {"train": {"sampling": sampling}, "group_size": 16})
    settings = find_settings(tmp_path / "checkpoints/step_3/trainer")
    assert settings is not None
    built = build_loss(settings.loss)
    assert (built.trainer, built.version) == ("prime_rl", version)
    assert all(getattr(built, name) == value for name, value in loss.items())
    others = {"max_grad_norm": 0.3, "temperature": 0.7, "max_completion_length": 99, "num_generations": 16}
    assert others.items() <= settings.values.items()


def test_a_trainer_whose_loss_is_not_read_still_tells_the_rest(tmp_path):
    written(tmp_path / "step_3/config.yaml", {"loss_fn": {"ratio_clip_min": 0.2}, "policy": {"max_grad_norm": 0.2}})
    settings = find_settings(tmp_path / "step_3/policy")
    assert settings is not None
    assert (settings.trainer, settings.loss, settings.values) == ("NeMo-RL", None, {"max_grad_norm": 0.2})


def test_other_files_are_not_taken_for_a_trainers(tmp_path):
    written(tmp_path / "config.yaml", {"checkpoint": "x", "probe": {"temperature": 1.0}})
    (tmp_path / "step_3").mkdir()
    (tmp_path / "step_3/config.yaml").write_text("a: !include [b")
    assert find_settings(tmp_path / "step_3") is None
    with pytest.raises(
        CheckpointError, match=r"expected the config of verl, AReaL, OpenRLHF, prime-rl, .*, got settings called"
    ):
        read_settings(tmp_path / "config.yaml")
    with pytest.raises(CheckpointError, match="found no such file"):
        read_settings(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("actor_rollout_ref: [")
    with pytest.raises(CheckpointError, match="expected settings that can be read, got: while parsing"):
        read_settings(tmp_path / "bad.yaml")
    (tmp_path / "code.yaml").write_text("actor_rollout_ref: !!python/object/apply:os.system ['touch owned']")
    with pytest.raises(CheckpointError, match="could not determine a constructor"):
        read_settings(tmp_path / "code.yaml")
    file = written(tmp_path / "v.yaml", {"actor_rollout_ref": {"rollout": {"temperature": "hot"}}})
    with pytest.raises(CheckpointError, match="temperature: expected a number, got 'hot'"):
        read_settings(file)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"gradient_clipping": 0.5}, {"max_grad_norm": 0.5}),
        ({"gradient_clipping": "auto"}, {}),
        ({}, {}),
        (
            {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": "auto", "gradient_clipping": 1},
            {"max_grad_norm": 1, "per_device_train_batch_size": 2},
        ),
    ],
)
def test_what_deepspeed_is_configured_to_do(tmp_path, config, told):
    file = tmp_path / "ds_config.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}, **config}))
    assert read_settings(file).values == told
    assert find_settings(tmp_path / "checkpoint-3").values == told


@pytest.mark.parametrize("value", ["much", [1.0]])
def test_clipping_that_is_no_number_is_refused(tmp_path, value):
    file = tmp_path / "ds_config.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}, "gradient_clipping": value}))
    with pytest.raises(CheckpointError, match=r"max_grad_norm: expected a number, got .*; give it in the config"):
        read_settings(file)


SKYRL = (
    "uv run -m skyrl.train.entrypoints.main_base trainer.algorithm.policy_loss_type=dual_clip "
    "trainer.algorithm.loss_reduction=sequence_mean trainer.algorithm.use_kl_loss=false trainer.train_batch_size=8 "
    "trainer.policy_mini_batch_size=8 trainer.algorithm.sapo.tau_pos=0.5 trainer.algorithm.grpo_norm_by_std=false "
    "trainer.policy.optimizer_config.max_grad_norm=0.5 generator.sampling_params.temperature=0.7"
)


def test_skyrl_by_its_command(tmp_path):
    file = tmp_path / "run.sh"
    file.write_text(SKYRL)
    told = read_settings(file)
    loss = build_loss(told.loss)
    assert (loss.trainer, loss.policy_loss_type, loss.loss_reduction) == ("skyrl", "dual_clip", "sequence_mean")
    assert (loss.use_kl_loss, loss.needs_old, loss.tau_pos) == (False, False, 0.5)
    assert told.values == {"max_grad_norm": 0.5, "temperature": 0.7, "scale_rewards": "none"}


@pytest.mark.parametrize(
    "correction", ["off_policy_correction.tis_ratio_type=token", "use_tis=true",
                   "off_policy_correction.token_mask_is_threshold_high=2.0"],
)  # fmt: skip
def test_what_skyrl_corrects_and_is_not_modelled_is_refused(tmp_path, correction):
    file = tmp_path / "run.sh"
    file.write_text(f"{SKYRL} trainer.algorithm.{correction}")
    with pytest.raises(ValueError, match=r"loss\.off_policy_correction: input should be None, got"):
        build_loss(read_settings(file).loss)


AREAL = {
    "gconfig": {"n_samples": 4, "temperature": 0.9, "max_new_tokens": 64},
    "actor": {
        "eps_clip": 0.4, "use_decoupled_loss": True, "ppo_n_minibatches": 1, "kl_ctl": 0.0, "c_clip": None,
        "rejection_sampling": {"metric": "ratio", "upper": 5.0}, "optimizer": {"gradient_clipping": 0.5},
        "reward_norm": {"mean_level": "group", "std_level": "group", "group_size": "${gconfig.n_samples}"},
        "adv_norm": None, "temperature": "${gconfig.temperature}",
    },
}  # fmt: skip


def test_areal_by_its_config(tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(AREAL))
    told = find_settings(tmp_path / "checkpoint")
    loss = build_loss(told.loss)
    assert (loss.trainer, loss.eps_clip, loss.needs_old, loss.weighs_sampler) == ("areal", 0.4, False, True)
    assert loss.rejection_sampling.upper == 5.0
    assert told.values == {
        "max_grad_norm": 0.5, "max_completion_length": 64, "num_generations": 4, "temperature": 0.9,
        "use_kl_in_reward": False, "adv_estimator": "grpo", "scale_rewards": "group",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("actor", "estimator"),
    [
        ({"adv_norm": {"mean_level": "batch"}}, "a norm over the batch (adv_norm)"),
        ({"reward_norm": None}, "its own norm of rewards (reward_norm)"),
        ({"reward_norm": {"mean_level": "group", "std_level": None, "mean_leave1out": True}}, "its own norm of rewards "
         "(reward_norm)"),
        ({"overlong_reward_penalty": True, "gae_lambda": 0.95}, "rewards of its own shape (gae_lambda 0.95, "
         "overlong_reward_penalty True)"),
        ({"reward_scaling": 10.0, "reward_bias": -0.5, "reward_clip": 20.0}, "grpo"),
        ({"reward_scaling": 10.0, "reward_norm": {"mean_level": "group", "std_level": None}}, "rewards of its own "
         "shape (reward_scaling 10.0)"),
    ],
)  # fmt: skip
def test_advantages_of_areal_that_are_not_computed_here_are_said(tmp_path, actor, estimator):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**AREAL, "actor": {**AREAL["actor"], **actor}}))
    assert find_settings(tmp_path).values["adv_estimator"] == estimator


def test_areals_cap_of_a_decoupled_loss_is_refused(tmp_path):
    for decoupled in (True, False):
        actor = AREAL["actor"] | {
            "rejection_sampling": None,
            "behave_imp_weight_cap": 5.0,
            "use_decoupled_loss": decoupled,
        }
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({**AREAL, "actor": actor}))
        assert ("behave_imp_weight_cap" in find_settings(tmp_path).loss) == decoupled


def test_settings_that_should_be_by_name_are_one_line(tmp_path):
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump({**AREAL, "actor": {**AREAL["actor"], "reward_norm": "group"}})
    )
    with pytest.raises(CheckpointError, match=r"actor\.reward_norm: expected settings by name, got 'group'"):
        find_settings(tmp_path)


def test_a_trainers_own_settings_go_before_those_of_deepspeed_beside_the_checkpoint(tmp_path):
    checkpoint = tmp_path / "global_step_1"
    checkpoint.mkdir()
    (checkpoint / "ds_config.json").write_text(
        json.dumps({"zero_optimization": {"stage": 2}, "gradient_clipping": 0.3})
    )
    assert find_settings(checkpoint).trainer == "DeepSpeed"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(VERL))
    assert find_settings(checkpoint).trainer == "verl"
