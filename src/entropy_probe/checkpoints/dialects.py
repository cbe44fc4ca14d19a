"""How each trainer calls its settings; a new one is an entry of :data:`DIALECTS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from entropy_probe.checkpoints.errors import InvalidValueError

Settings = Mapping[str, Any]
"""Of any depth, by name."""


@dataclass(frozen=True)
class Dialect:
    """How one trainer calls its settings.

    Attributes:
        name: of the trainer, for people.
        loss_of: whose losses in ``ProbeConfig(loss=...)`` its loss is one of; None: none that is read from its files.
        marks: settings of which a file of this trainer has one, and none of those below it does.
        loss: by the names of the loss where each setting is; the first that is there counts.
        others: likewise of what else is used.
        derive: what is said in other ways: given all settings and what was taken, what to add or change.
    """

    name: str
    loss_of: str | None
    marks: tuple[str, ...]
    loss: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    others: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    derive: Callable[[Settings, dict[str, Any], dict[str, Any]], None] = lambda settings, loss, others: None


def _under(place: str, names: str) -> dict[str, tuple[str, ...]]:
    return {name: (f"{place}.{name}",) for name in names.split()}


def _of_verl(settings: Settings, loss: dict[str, Any], others: dict[str, Any]) -> None:
    if loss.get("loss_mode") == "bypass_mode":
        del loss["loss_mode"]
        loss["bypass_mode"] = True
    if loss.get("loss_agg_mode") == "seq-mean-token-sum-norm" and loss.get("loss_scale_factor") is None:
        loss["loss_scale_factor"] = others.get("max_completion_length")
    ranks = [at(settings, f"trainer.{name}") for name in ("n_gpus_per_node", "nnodes")]
    along = at(settings, "actor_rollout_ref.actor.ulysses_sequence_parallel_size") or 1
    if all(isinstance(n, int) for n in (*ranks, along)):
        loss["num_processes"] = max(1, ranks[0] * ranks[1] // along)
    if others.get("adv_estimator") == "grpo":
        others["scale_rewards"] = "none" if at(settings, "algorithm.norm_adv_by_std_in_grpo") is False else "group"


def _of_openrlhf(settings: Settings, loss: dict[str, Any], others: dict[str, Any]) -> None:
    scale = {"group_norm": "group", "dr_grpo": "none"}.get(str(others.get("adv_estimator")))
    if scale is not None:
        others |= {"scale_rewards": scale, "adv_estimator": "grpo"}


def _of_prime_rl(settings: Settings, loss: dict[str, Any], others: dict[str, Any]) -> None:
    """The version, by the settings that only some have."""
    if {"token_mask_low", "token_mask_high", "geo_mask_low", "ratio_type"} & loss.keys():
        loss["version"] = "0.4"
    elif {"ipo_mask_low", "ipo_mask_high"} & loss.keys():
        loss["version"] = "0.5"


def _of_skyrl(settings: Settings, loss: dict[str, Any], others: dict[str, Any]) -> None:
    if others.get("adv_estimator", "grpo") == "grpo":
        others["scale_rewards"] = "none" if at(settings, "trainer.algorithm.grpo_norm_by_std") is False else "group"
    if at(settings, "trainer.algorithm.advantage_batch_normalize"):
        others["adv_estimator"] = "norms over the whole batch (advantage_batch_normalize)"
    place = "trainer.algorithm.off_policy_correction"
    correction = _mapping(settings, place)
    switches = ("tis_ratio_type", "sequence_mask_metric", *(name for name in correction if "is_threshold" in str(name)))
    on = [name for name in switches if at(settings, f"{place}.{name}") is not None]
    if on or at(settings, "trainer.algorithm.use_tis"):
        loss["off_policy_correction"] = ", ".join(on) or "use_tis"


def _of_areal(settings: Settings, loss: dict[str, Any], others: dict[str, Any]) -> None:
    """Norms of rewards and advantages; without a reference its KL term is one of the log-probabilities alone."""
    loss.setdefault("ppo_n_minibatches", 4)
    if at(settings, "actor.use_decoupled_loss") and not at(settings, "actor.rejection_sampling"):
        loss |= _given(settings, "behave_imp_weight_cap")
    others["use_kl_in_reward"] = at(settings, "actor.kl_ctl") != 0  # 0.1 by default
    norm = _mapping(settings, "actor.reward_norm")
    levels = norm.get("mean_level", "batch"), norm.get("std_level", "batch")
    if at(settings, "actor.adv_norm") is not None:
        others["adv_estimator"] = "a norm over the batch (adv_norm)"
    elif (
        levels[0] != "group" or levels[1] == "batch" or norm.get("mean_leave1out") or norm.get("std_unbiased") is False
    ):
        others["adv_estimator"] = "its own norm of rewards (reward_norm)"
    elif shaped := _shaped(settings, scaled=levels[1] != "group"):
        others["adv_estimator"] = f"rewards of its own shape ({', '.join(shaped)})"
    else:
        others |= {"adv_estimator": "grpo", "scale_rewards": levels[1] or "none"}


def _shaped(settings: Settings, *, scaled: bool) -> list[str]:
    """What AReaL does to rewards and advantages beside their norms; a bias goes with the mean of the group."""
    neutral = {"discount": 1, "gae_lambda": 1, "overlong_reward_penalty": False, "mask_no_eos_with_zero": False}
    neutral |= {"reward_clip": 20, **({"reward_scaling": 1} if scaled else {})}
    return [
        f"{name} {value}"
        for name, usual in neutral.items()
        for value in _given(settings, name).values()
        if value != usual
    ]


def _given(settings: Settings, name: str) -> dict[str, Any]:
    value = at(settings, f"actor.{name}")
    return {} if value is None else {name: value}


def _mapping(settings: Settings, place: str) -> dict[Any, Any]:
    """What stands at a place, which may be left out."""
    value = at(settings, place)
    if value is not None and not isinstance(value, dict):
        raise InvalidValueError(f"{place}: expected settings by name, got {value!r}; correct the trainer's config")
    return value or {}


def _of_deepspeed(settings: Settings, loss: dict[str, Any], others: dict[str, Any]) -> None:
    """``auto`` says nothing."""
    for name in [name for name, value in others.items() if value == "auto"]:
        del others[name]


DEEPSPEED = "DeepSpeed"
_ACTOR, _SAMPLING = "actor_rollout_ref.actor", ("orchestrator.train.sampling", "orchestrator.sampling", "sampling")
DIALECTS = (
    Dialect(
        "verl",
        "verl",
        ("actor_rollout_ref",),
        {
            **_under(
                _ACTOR,
                "clip_ratio clip_ratio_low clip_ratio_high clip_ratio_c loss_agg_mode loss_scale_factor entropy_coeff "
                "tau_pos tau_neg use_kl_loss kl_loss_coef kl_loss_type ppo_epochs ppo_mini_batch_size",
            ),
            **_under(
                f"{_ACTOR}.policy_loss",
                "loss_mode clip_cov_ratio clip_cov_lb clip_cov_ub kl_cov_ratio ppo_kl_coef dro_beta",
            ),
            **_under(
                "algorithm.rollout_correction",
                "rollout_is rollout_is_threshold rollout_is_batch_normalize rollout_rs rollout_rs_threshold loss_type "
                "bypass_mode",
            ),
            **_under("data", "train_batch_size"),
            **_under("trainer", "use_legacy_worker_impl"),
        },
        {
            "max_grad_norm": (f"{_ACTOR}.grad_clip",),
            "max_completion_length": ("data.max_response_length",),
            "num_generations": ("actor_rollout_ref.rollout.n",),
            **_under("actor_rollout_ref.rollout", "temperature top_p top_k"),
            **_under("algorithm", "adv_estimator use_kl_in_reward"),
        },
        _of_verl,
    ),
    Dialect(
        "AReaL",
        "areal",
        ("gconfig", "actor.ppo_n_minibatches"),
        _under(
            "actor",
            "eps_clip eps_clip_higher c_clip use_decoupled_loss recompute_logprob prox_logp_method "
            "importance_sampling_level rejection_sampling use_sapo_loss sapo_tau_pos sapo_tau_neg m2_threshold "
            "ppo_n_minibatches",
        ),
        {
            "max_grad_norm": ("actor.optimizer.gradient_clipping",),
            "max_completion_length": ("gconfig.max_new_tokens",),
            "num_generations": ("gconfig.n_samples",),
            **_under("gconfig", "temperature top_p top_k"),
        },
        _of_areal,
    ),
    Dialect(
        "OpenRLHF",
        "openrlhf",
        ("actor.eps_clip", "eps_clip", "actor.policy_loss_type", "policy_loss_type", "algo.kl", "init_kl_coef"),
        {
            "policy_loss_type": ("actor.policy_loss_type", "policy_loss_type"),
            "eps_clip": ("actor.eps_clip", "eps_clip"),
            "eps_clip_low_high": ("actor.eps_clip_low_high", "eps_clip_low_high"),
            "dual_clip": ("actor.dual_clip", "dual_clip"),
            "use_kl_loss": ("algo.kl.use_loss", "use_kl_loss"),
            "init_kl_coef": ("algo.kl.init_coef", "init_kl_coef"),
            "kl_estimator": ("algo.kl.estimator", "kl_estimator"),
            "entropy_loss_coef": ("actor.entropy_coef", "entropy_loss_coef"),
            "enable_vllm_is_correction": ("algo.advantage.is_correction_enable", "enable_vllm_is_correction"),
            "vllm_is_truncated_threshold": ("algo.advantage.is_correction_threshold", "vllm_is_truncated_threshold"),
            "vllm_is_correction_type": ("algo.advantage.is_correction_type", "vllm_is_correction_type"),
            "max_epochs": ("train.max_epochs", "max_epochs"),
            "rollout_batch_size": ("rollout.batch_size", "rollout_batch_size"),
            "n_samples_per_prompt": ("rollout.n_samples_per_prompt", "n_samples_per_prompt"),
            "train_batch_size": ("train.batch_size", "train_batch_size"),
            "use_dynamic_batch": ("train.dynamic_batch_enable", "use_dynamic_batch"),
        },
        {
            "max_grad_norm": ("actor.max_norm", "max_norm"),
            "max_completion_length": ("rollout.max_new_tokens", "generate_max_len"),
            "num_generations": ("rollout.n_samples_per_prompt", "n_samples_per_prompt"),
            "temperature": ("rollout.temperature", "temperature"),
            "top_p": ("rollout.top_p", "top_p"),
            "adv_estimator": ("algo.advantage.estimator", "advantage_estimator"),
        },
        _of_openrlhf,
    ),
    Dialect(
        "prime-rl",
        "prime_rl",
        ("orchestrator", "trainer.loss", "max_concurrent_runs", "enable_token_export", "weight_broadcast"),
        {
            name: (f"trainer.loss.{name}", f"loss.{name}")
            for name in (
                *("type", "dppo_mask_low", "dppo_mask_high", "ipo_threshold", "ipo_mask_low", "ipo_mask_high"),
                *("ratio_type", "token_mask_low", "token_mask_high", "geo_mask_low", "geo_mask_high", "teacher_tau"),
                *("sequence_mask_low", "sequence_mask_high", "sequence_clip_high", "kl_tau", "adv_tau"),
            )
        },
        {
            "max_grad_norm": ("trainer.optim.max_norm", "optim.max_norm"),
            "temperature": tuple(f"{place}.temperature" for place in _SAMPLING),
            "max_completion_length": tuple(
                f"{place}.{name}" for place in _SAMPLING for name in ("max_completion_tokens", "max_tokens")
            ),
            "num_generations": ("orchestrator.group_size", "orchestrator.rollouts_per_example"),
        },
        _of_prime_rl,
    ),
    Dialect(
        "SkyRL",
        "skyrl",
        ("trainer.algorithm",),
        {
            **_under(
                "trainer.algorithm",
                "policy_loss_type loss_reduction max_seq_len eps_clip_low eps_clip_high clip_ratio_c use_kl_loss "
                "kl_loss_coef kl_estimator_type use_entropy_loss entropy_loss_coef",
            ),
            **_under("trainer.algorithm.sapo", "tau_pos tau_neg"),
            **_under("trainer.algorithm.cispo", "cispo_anchor cispo_eps_clip_low cispo_eps_clip_high"),
            **_under("trainer.algorithm.dppo", "dppo_type delta_low delta_high"),
            **_under("trainer", "update_epochs_per_batch train_batch_size policy_mini_batch_size"),
        },
        {
            "max_grad_norm": ("trainer.policy.optimizer_config.max_grad_norm",),
            "max_completion_length": ("generator.sampling_params.max_generate_length",),
            "num_generations": ("generator.n_samples_per_prompt",),
            "adv_estimator": ("trainer.algorithm.advantage_estimator",),
            **_under("trainer.algorithm", "use_kl_in_reward"),
            **_under("generator.sampling_params", "temperature top_p top_k min_p"),
        },
        _of_skyrl,
    ),
    Dialect(
        "NeMo-RL",
        None,
        ("loss_fn", "grpo.num_prompts_per_step"),
        others={
            "max_grad_norm": ("policy.max_grad_norm",),
            "max_completion_length": ("policy.generation.max_new_tokens",),
            "num_generations": ("grpo.num_generations_per_prompt",),
            **_under("policy.generation", "temperature top_p top_k"),
        },
    ),
    Dialect(
        DEEPSPEED,
        None,
        ("zero_optimization", "train_micro_batch_size_per_gpu"),
        others={
            "max_grad_norm": ("gradient_clipping",),
            "per_device_train_batch_size": ("train_micro_batch_size_per_gpu",),
            "gradient_accumulation_steps": ("gradient_accumulation_steps",),
        },
        derive=_of_deepspeed,
    ),
)
UNREAD = tuple(dialect.name for dialect in DIALECTS if dialect.loss_of is None and dialect.name != DEEPSPEED)
"""Trainers whose loss is none that is read from their files."""


def at(settings: Any, path: str, missing: Any = None) -> Any:
    """The value of a dotted name."""
    for part in path.split("."):
        if not isinstance(settings, Mapping) or part not in settings:
            return missing
        settings = settings[part]
    return settings
