"""What a run's config leaves open and the checkpoint's files tell, and where the two contradict each other.

The trainer's settings are part of the question that a run asks, so those that the config does not set are the trainer's
own, and one that the config sets otherwise is a mistake unless the user insists.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from entropy_probe.cli.errors import describe
from entropy_probe.config import ProbeConfig
from entropy_probe.losses import trainers
from entropy_probe.results.checkpoint import ABOVE_ZERO
from entropy_probe.results.note import Note, NoteKind
from entropy_probe.sampling import UpdateSettings

if TYPE_CHECKING:
    from entropy_probe.checkpoints.training_run import TrainingRun
    from entropy_probe.cli.config import RunConfig

TRUSTED = NoteKind(
    "config_trusted",
    "{key} is {own}, {source} says {told}; the config is trusted",
    "Leave trust_config out to take the trainer's settings.",
)
OTHER_GROUPS = NoteKind(
    "other_group_size",
    "update.group_size is {own}, training takes {told} responses to each prompt, so advantages have other errors",
    "Set update.group_size to the trainer's num_generations.",
)
VERSION = NoteKind(
    "version_assumed",
    "{file} does not say the trainer's version, which its loss depends on; {version} is taken",
    "Set probe.loss.trainer and probe.loss.version to those of training.",
)

SAME_NAME = ("temperature", "max_grad_norm", "max_completion_length")
"""Settings of ``probe`` that TRL calls the same."""
OF_FIRST_STEP: dict[str, Any] = {"num_iterations": 1, "steps_per_generation": None}
"""Settings of the loss that ask about the first step on fresh rollouts, and their values for it."""


@dataclass(frozen=True)
class Told:
    """A value that a file of the checkpoint tells.

    Attributes:
        value: as the config would have it.
        source: the file.
        written: how the file has it, where that is another way to say the same.
    """

    value: Any
    source: str
    written: Any = ...

    def __str__(self) -> str:
        return _shown(self.value if self.written is ... else self.written)

    def agrees(self, own: Any) -> bool:
        """Whether a value of the config is this one."""
        return own > 0 if self.value == ABOVE_ZERO else own in (self.value, self.written)


def with_trainer_settings(config: RunConfig) -> tuple[RunConfig, tuple[Note, ...]]:
    """The config, resolved, with the trainer's settings where it has none of its own, and what to say about it.

    Raises:
        ValueError: if the checkpoint's files cannot be read, the config contradicts them without ``trust_config``, or
            batches are to be sampled in another way than training does.
    """
    from entropy_probe.checkpoints.training_run import TrainingRun

    run = TrainingRun.read(config.checkpoint, config.trainer_config)
    told = dict(_told(config, run))
    try:
        filled = _filled(config, run, told)
    except ValidationError as error:
        raise ValueError(f"{config.checkpoint}: {describe(error)}") from error
    filled.check_filled()
    if not config.trust_config:
        run.refuse_other_loss()
        if run.needs_loss is not None and "trainer" not in config.probe.loss.model_fields_set:
            raise ValueError(
                f"probe.loss: expected it to be set, since that of {run.needs_loss} is none that is read from its own "
                f"files ({run.settings and run.settings.file}), got none; set the one that is the same (trainer: "
                f"{', '.join(trainers())}), or take the step from the trainer's own gradient"
            )
    notes = list(_about_version(config, filled, run))
    for key, own, there in _contradictions(filled, told):
        words = {"key": key, "own": _shown(own), "source": there.source, "told": str(there)}
        if not config.trust_config:
            raise ValueError(
                "{key}: expected {told}, which {source} says of training, got {own}; ".format(**words)
                + f"{_remedy(there.value, own)}, or insist on the config with trust_config: true (--trust-config)"
            )
        notes.append(TRUSTED(**words))
    if filled.update is not None and filled.rollouts.update is None:
        notes += _about_sampling(filled, filled.update, run)
    return filled.resolved(), tuple(notes)


def _told(config: RunConfig, run: TrainingRun) -> Iterator[tuple[str, Told]]:
    """By the config's keys what the files say of them."""
    from entropy_probe.checkpoints.trainer_log import LOG_FILE

    whose = None if run.loss is None else run.loss["trainer"]
    if whose is not None and run.settings is not None:
        yield "probe.loss.trainer", Told(whose, str(run.settings.file))
    fields = trainers()[_family(config, run)].model_fields if _family(config, run) == (whose or "trl") else {}
    samples = config.update is not None and config.rollouts.update is None
    for setting in run.reports():
        name, value, source = setting.name, setting.value, f"{config.checkpoint / setting.source}"
        of_loss = fields if whose is not None or setting.source.startswith(LOG_FILE) else {}  # DPO has a beta too
        if name == "max_grad_norm":  # the Trainer does not clip to 0
            yield f"probe.{name}", Told(value or None, source)
        elif name in SAME_NAME:
            if value is not None:
                yield f"probe.{name}", Told(value, source)
        elif name == "epsilon" and value == (0.4 if run.loss and run.loss["loss_type"] == "gmpo" else 0.2):
            yield f"probe.loss.{name}", Told(None, source, written=value)  # the default, which need not be mentioned
        elif name in of_loss:
            yield f"probe.loss.{name}", Told(value, source)
        elif samples and name in ("scale_rewards", "mask_truncated_completions"):
            word = {True: "group", False: "none"}.get(value, value) if name == "scale_rewards" else value
            yield f"update.{name}", Told(word, source)
        elif samples and name == "reward_weights" and value is not None:
            yield name, Told(tuple(value), source)


def _family(config: RunConfig, run: TrainingRun) -> str:
    """Whose loss is probed: the config's, else that of the checkpoint's trainer."""
    own = config.probe.loss
    return own.trainer if run.loss is None or "trainer" in own.model_fields_set else run.loss["trainer"]


def _filled(config: RunConfig, run: TrainingRun, told: Mapping[str, Told]) -> RunConfig:
    """The config with what the files say where it says nothing."""
    probe, loss = config.probe, config.probe.loss

    def of(section: str) -> dict[str, Any]:
        inside = {key.removeprefix(section): there.value for key, there in told.items() if key.startswith(section)}
        return {name: value for name, value in inside.items() if "." not in name and value != ABOVE_ZERO}

    known = of("probe.loss.")
    if _takes_first_step(config, run):
        known |= {name: value for name, value in OF_FIRST_STEP.items() if name in type(loss).model_fields}
    elsewhere = {"max_completion_length"} & probe.model_fields_set  # the probe's is put into the loss
    own = {name: getattr(loss, name) for name in loss.model_fields_set - elsewhere}
    given = {name: getattr(probe, name) for name in probe.model_fields_set}
    settings = of("probe.") | given | {"loss": known | own | {"trainer": _family(config, run)}}
    changes: dict[str, Any] = {"probe": ProbeConfig.model_validate(settings)}
    if config.update is not None:
        changes["update"] = UpdateSettings.model_validate(of("update.") | config.update.model_dump(exclude_unset=True))
    weights, rewards = told.get("reward_weights"), config.reward
    if weights and config.reward_weights is None and isinstance(rewards, tuple) and len(rewards) == len(weights.value):
        changes["reward_weights"] = weights.value
    return config.model_copy(update=changes)


def _takes_first_step(config: RunConfig, run: TrainingRun) -> bool:
    """Whether the trainer's rollouts are fresh where it takes several steps on them; those sampled here say so."""
    whole_known = "num_items_in_batch" in config.probe.loss.model_fields_set
    given = config.rollouts.update is not None
    return given and not whole_known and run.place is not None and run.place[0] == 1 and run.place[1] > 1


def _contradictions(config: RunConfig, told: Mapping[str, Told]) -> Iterator[tuple[str, Any, Told]]:
    for key, there in told.items():
        own: Any = config
        for part in key.split("."):
            own = getattr(own, part)
        name = key.removeprefix("probe.loss.")
        if not there.agrees(own) and not (name in OF_FIRST_STEP and own == OF_FIRST_STEP[name]):
            yield key, own, there


def _about_version(config: RunConfig, filled: RunConfig, run: TrainingRun) -> Iterator[Note]:
    """Which version of a trainer's loss is taken where nothing says it."""
    loss = filled.probe.loss
    if run.loss is None or loss.trainer != run.loss["trainer"] or "version" not in type(loss).model_fields:
        return
    if "version" not in config.probe.loss.model_fields_set and "version" not in run.loss and run.settings is not None:
        yield VERSION(file=str(run.settings.file), version=str(getattr(loss, "version", "")))


def _about_sampling(config: RunConfig, update: UpdateSettings, run: TrainingRun) -> Iterator[Note]:
    """What differs from training in a batch that is sampled here; a ``ValueError`` where advantages do."""
    weighted = isinstance(config.reward, tuple) and len(config.reward) > 1
    if run.values.get("multi_objective_aggregation") == "normalize_then_sum" and weighted:
        raise ValueError(_OTHER_ADVANTAGES.format("normalises each reward before it adds them up"))
    if run.loss is not None and run.loss.get("loss_type") == "rloo":
        raise ValueError(_OTHER_ADVANTAGES.format("holds each reward against the others of its prompt (RLOO)"))
    estimator = run.values.get("adv_estimator")
    if estimator not in (None, "grpo"):
        raise ValueError(_OTHER_ADVANTAGES.format(f"estimates advantages by {estimator}"))
    if run.values.get("use_kl_in_reward"):
        raise ValueError(_OTHER_ADVANTAGES.format("takes a KL term off the rewards (use_kl_in_reward)"))
    size = run.values.get("num_generations")
    if size is not None and size != update.group_size:
        yield OTHER_GROUPS(own=update.group_size, told=size)


_OTHER_ADVANTAGES = (
    "update: expected the trainer's own rollouts, since training {}, which sampling here does not, got none; set "
    "rollouts.update to them"
)


def _remedy(told: Any, own: Any) -> str:
    if told == ABOVE_ZERO:
        return "set it"
    lacking = isinstance(told, tuple) and own is None  # weights of rewards
    return f"name the trainer's {len(told)} rewards" if lacking else "leave it out to take the trainer's"


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
