"""What trainers other than TRL's wrote down of their settings: verl, OpenRLHF and prime-rl, in files of their own.

verl's are composed by Hydra (``.hydra/config.yaml``), prime-rl's lie in ``configs/``, OpenRLHF's are arguments of a
command. They are found around a checkpoint, or given: YAML (W&B's ``config.yaml`` too), JSON, TOML, or the script with
the command. A trainer is an entry of :data:`DIALECTS`: by our names where its settings are.
"""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from entropy_probe.checkpoints.errors import InvalidValueError, MissingFileError, UnsafeFileError, UnsupportedError
from entropy_probe.checkpoints.trainer_settings import TrainerSettings, check_kinds, plain

MOST = 2**20
"""Bytes of a file of settings."""
LEVELS = 3
"""How far above a checkpoint its run's files may be."""
Settings = Mapping[str, Any]
"""Of any depth, by name."""


@dataclass(frozen=True)
class Dialect:
    """How one trainer calls its settings."""

    name: str  # of the trainer, for people
    # whose losses in ``ProbeConfig(loss=...)`` its loss is one of; None: none that is read from its files
    loss_of: str | None
    marks: tuple[str, ...]  # settings of which a file of this trainer has one, and of no other
    # by the names of the loss where each setting is; the first that is there counts
    loss: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    others: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # likewise of what else is used
    # what is said in other ways: given all settings and what was taken, what to add or change
    derive: Callable[[Settings, dict[str, Any], dict[str, Any]], None] = lambda settings, loss, others: None


def _under(place: str, names: str) -> dict[str, tuple[str, ...]]:
    return {name: (f"{place}.{name}",) for name in names.split()}


def _since_sections(text: str) -> dict[str, tuple[str, ...]]:
    """``name=place``: where OpenRLHF has it since its settings are in sections; before that under the name itself."""
    pairs = (pair.split("=") for pair in text.split())
    return {name: (place, name) for name, place in pairs}


def _of_verl(settings: Settings, loss: dict[str, Any], others: dict[str, Any]) -> None:
    if loss.get("loss_mode") == "bypass_mode":
        del loss["loss_mode"]
        loss["bypass_mode"] = True
    if loss.get("loss_agg_mode") == "seq-mean-token-sum-norm" and loss.get("loss_scale_factor") is None:
        loss["loss_scale_factor"] = others.get("max_completion_length")
    ranks = [_at(settings, f"trainer.{name}") for name in ("n_gpus_per_node", "nnodes")]
    along = _at(settings, "actor_rollout_ref.actor.ulysses_sequence_parallel_size") or 1
    if all(isinstance(n, int) for n in (*ranks, along)):
        loss["num_processes"] = max(1, ranks[0] * ranks[1] // along)
    if others.get("adv_estimator") == "grpo":
        others["scale_rewards"] = "none" if _at(settings, "algorithm.norm_adv_by_std_in_grpo") is False else "group"


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
        "OpenRLHF",
        "openrlhf",
        ("actor.eps_clip", "eps_clip", "actor.policy_loss_type", "policy_loss_type", "algo.kl", "init_kl_coef"),
        _since_sections(
            "policy_loss_type=actor.policy_loss_type eps_clip=actor.eps_clip dual_clip=actor.dual_clip "
            "eps_clip_low_high=actor.eps_clip_low_high entropy_loss_coef=actor.entropy_coef "
            "use_kl_loss=algo.kl.use_loss init_kl_coef=algo.kl.init_coef kl_estimator=algo.kl.estimator "
            "enable_vllm_is_correction=algo.advantage.is_correction_enable "
            "vllm_is_truncated_threshold=algo.advantage.is_correction_threshold "
            "vllm_is_correction_type=algo.advantage.is_correction_type max_epochs=train.max_epochs "
            "rollout_batch_size=rollout.batch_size n_samples_per_prompt=rollout.n_samples_per_prompt "
            "train_batch_size=train.batch_size use_dynamic_batch=train.dynamic_batch_enable"
        ),
        {
            "max_grad_norm": ("actor.max_norm", "max_norm"),
            "max_completion_length": ("rollout.max_new_tokens", "generate_max_len"),
            "num_generations": ("rollout.n_samples_per_prompt", "n_samples_per_prompt"),
            "adv_estimator": ("algo.advantage.estimator", "advantage_estimator"),
            **_since_sections("temperature=rollout.temperature top_p=rollout.top_p"),
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
        None,
        ("trainer.algorithm",),
        others={
            "max_grad_norm": ("trainer.policy.optimizer_config.max_grad_norm",),
            "max_completion_length": ("generator.sampling_params.max_generate_length",),
            "num_generations": ("generator.n_samples_per_prompt",),
            **_under("generator.sampling_params", "temperature top_p top_k min_p"),
        },
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
        "AReaL",
        None,
        ("gconfig", "actor.ppo_n_minibatches"),
        others={
            "max_grad_norm": ("actor.optimizer.gradient_clipping",),
            "max_completion_length": ("gconfig.max_new_tokens",),
            "num_generations": ("gconfig.n_samples",),
            **_under("gconfig", "temperature top_p top_k"),
        },
    ),
)
_WANDB = {"value", "desc"}
UNREAD = tuple(dialect.name for dialect in DIALECTS if dialect.loss_of is None)
"""Trainers whose loss is none that is read from their files."""
_PLACES = (
    *(".hydra/config.yaml", "configs/trainer.json", "configs/trainer.toml", "configs/rl.json", "configs/rl.toml"),
    "config.yaml",
)


def find_settings(path: Path) -> TrainerSettings | None:
    """The settings that a trainer left in a checkpoint's directory or a few levels above; None where there are none."""
    above = (path.absolute(), *path.absolute().parents[:LEVELS])
    for file in (place / name for place in above for name in _PLACES):
        if file.is_file() and file.stat().st_size <= MOST and _may_be_a_trainers(file):
            settings = _read(file)
            dialect = _dialect(settings)
            if dialect is not None:
                return _settings(file, dialect, settings)
    return None


def read_settings(file: Path) -> TrainerSettings:
    """The settings in a file that was given."""
    if not file.is_file():
        raise MissingFileError(f"{file}: expected a trainer's own config, found no such file; check the path")
    if file.stat().st_size > MOST:
        raise UnsafeFileError(f"{file}: expected settings of at most {MOST:,} bytes, got {file.stat().st_size:,}")
    settings = _read(file)
    dialect = _dialect(settings)
    if dialect is None:
        raise UnsupportedError(
            f"{file}: expected the config of {', '.join(d.name for d in DIALECTS)}, got settings called "
            f"{', '.join(map(str, settings))[:120] or 'nothing'}; give loss, temperature and clipping under probe"
        )
    return _settings(file, dialect, settings)


def _may_be_a_trainers(file: Path) -> bool:
    """Whether a file has the words of a trainer's settings: what else is called ``config.yaml`` is not looked into."""
    text = file.read_bytes()
    return any(word.encode() in text for dialect in DIALECTS for mark in dialect.marks for word in mark.split(".")[-1:])


def _dialect(settings: Settings) -> Dialect | None:
    fitting = (d for d in DIALECTS if any(_at(settings, mark) is not None for mark in d.marks))
    return next(fitting, None)


def _settings(file: Path, dialect: Dialect, settings: Settings) -> TrainerSettings:
    loss, others = (dict(_taken(file, settings, places)) for places in (dialect.loss, dialect.others))
    dialect.derive(settings, loss, others)
    check_kinds(file, others, others, "give it in the config")
    told = None if dialect.loss_of is None else {"trainer": dialect.loss_of, **loss}
    return TrainerSettings(file, dialect.name, others, told, other_loss=False)


def _taken(file: Path, settings: Settings, places: Mapping[str, tuple[str, ...]]) -> Iterator[tuple[str, Any]]:
    for name, paths in places.items():
        path = next((path for path in paths if _at(settings, path, ...) is not ...), None)
        if path is not None:
            told = _at(settings, path)
            value = plain(told)
            if value is ... or (isinstance(value, str) and "$" in value):
                raise InvalidValueError(
                    f"{file}: {path}: expected a plain value, got {told!r:.60}; write it out, or give it in the config"
                )
            yield name, value


def _at(settings: Any, path: str, missing: Any = None) -> Any:
    """The value of a dotted name."""
    for part in path.split("."):
        if not isinstance(settings, Mapping) or part not in settings:
            return missing
        settings = settings[part]
    return settings


def _nested(settings: Settings) -> dict[str, Any]:
    """With ``a.b`` as ``b`` in ``a``."""
    nested: dict[str, Any] = {}
    for name, value in settings.items():
        *parents, last = str(name).split(".")
        place = nested
        for parent in parents:
            inner = place.get(parent)
            place[parent] = place = dict(inner) if isinstance(inner, Mapping) else {}
        place[last] = value
    return nested


def _read(file: Path) -> Settings:
    """A file's settings, by its ending; what is no mapping is none."""
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".json":
            content = json.loads(text)
        elif file.suffix == ".toml":
            content = tomllib.loads(text)
        elif file.suffix in (".yaml", ".yml"):
            content = yaml.safe_load(text)
        else:
            content = dict(_arguments(text))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise InvalidValueError(
            f"{file}: expected settings that can be read, got: {reason}; correct the file"
        ) from error
    if not isinstance(content, Mapping):
        return {}
    of_wandb = {name for name, x in content.items() if isinstance(x, Mapping) and {"value"} <= x.keys() <= _WANDB}
    content = _nested({name: x["value"] if name in of_wandb else x for name, x in content.items()})
    beside = file.with_name(file.name.replace("trainer", "orchestrator"))
    if file.stem == "trainer" and beside.is_file() and beside.stat().st_size <= MOST:  # prime-rl's two halves
        return {"trainer": content, "orchestrator": _read(beside)}
    return content


def _arguments(text: str) -> Iterator[tuple[str, Any]]:
    """Of the commands in a script, ``--name value`` and ``name=value``; later ones count."""
    words = shlex.split(text.replace("\\\n", " "), comments=True)
    for i, word in enumerate(words):
        name, equals, value = word.lstrip("-+").partition("=")
        if not re.fullmatch(r"[a-z][\w.]*", name):
            continue
        if equals:
            yield name, _value(value)
        elif word.startswith("--"):
            values = []
            for following in words[i + 1 :]:
                if not re.fullmatch(r"[-+]?[\d.][\w.+-]*|[A-Za-z$][\w./:${}-]*", following):
                    break
                values.append(_value(following))
            yield name, (True if not values else values[0] if len(values) == 1 else values)


def _value(text: str) -> Any:
    """A word of a command as YAML would have it."""
    if text in ("True", "False", "None"):
        return {"True": True, "False": False, "None": None}[text]
    try:
        return json.loads(text)
    except ValueError:
        return text
