"""What ``entropy-probe run`` reads: one YAML file, validated, with every key known by name."""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from entropy_probe.cli.errors import describe
from entropy_probe.cli.yaml_settings import apply_overrides, dump_yaml, load_yaml
from entropy_probe.config import ProbeConfig
from entropy_probe.losses import Loss
from entropy_probe.sampling import EvaluationSettings, GenerationSettings, PromptSource, UpdateSettings

__all__ = ["RunConfig", "SavedRollouts", "ValidateConfig", "load_config"]


class SavedRollouts(BaseModel):
    """Parquet files of rollouts, read instead of sampling.

    Attributes:
        update: the update batch, advantages included; takes the place of the ``update`` settings.
        evaluation: the evaluation batch; takes the place of the ``evaluation`` settings.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    update: Path | None = None
    evaluation: Path | None = None


class RunConfig(BaseModel):
    """One probe of one checkpoint. Relative paths are relative to the current directory.

    Attributes:
        checkpoint: a checkpoint directory holding weights or an adapter, and the optimizer's state.
        base_model: the base model of an adapter, where the adapter's own config does not lead to it.
        adapter: the adapter that was trained, where the checkpoint has several.
        quantization: the ``BitsAndBytesConfig`` with which training quantised the base model while loading it.
        mapping: which parameters the entries of an optimizer file without names belong to, where its groups are of no
            known rule: a file with a name on each line in the optimizer's order, or for regular expressions the group
            of the parameters that they match first, ``{lora_A: 0, lora_B: 1}``.
        weights: where the optimizer keeps float32 copies of rounded weights (DeepSpeed): those, which it steps, or
            ``rounded``, which the policy samples with.
        policy: where one optimizer stepped a value model too (PPO), the policy's name in the module that both are in.
        reference: the reference policy of a KL term, a directory of full weights, where the rollouts have no
            ``reference_logprobs`` and the checkpoint no adapter that can be switched off.
        output_dir: where the results go; new or empty, unless ``overwrite``.
        overwrite: whether to replace an earlier run in ``output_dir``.
        device: where the model runs; ``auto`` is CUDA where there is one.
        shard: spread model and optimizer over the ranks that ``torchrun`` started (FSDP2), for a model that does not
            fit one device. Every rank then works on the whole batches, so more ranks bring memory, not speed.
        prompts: where prompts come from; not needed when both batches are read from files.
        mode: ``two_batch`` predicts and measures on an evaluation batch; ``one_batch`` on the update batch alone, over
            pairs of different prompts; ``pooled`` on both, weighted by their variances, with each one's numbers beside;
            ``both`` is two batches, with the cross-prompt U-statistic beside. With
            ``probe.geometry: frozen`` one batch is that statistic too.
        reward: the reward of update responses, by name, or several.
        reward_weights: of several rewards, whose weighted sum counts; 1 each by default.
        generation: how responses are sampled. Temperature and largest length are those of ``probe``.
        update: the batch that the optimizer step is taken on.
        evaluation: the batch that the entropy is measured on.
        rollouts: saved batches to read instead of sampling.
        save_rollouts: whether to save both batches beside the results.
        attribution: whether to divide the prediction over tokens, prompts and layers, into tables beside the results.
        attribution_folds: standard errors of the prompts' contributions from this many folds of the evaluation batch.
        questions: what else to ask of the prediction, by name: ``without_prompts: {prompts: [[3], [5]]}``.
        trust_config: go by the config where the checkpoint's files say otherwise of training, and probe the checkpoint
            of any trainer. The result says where they differ.
        probe: how to probe. Loss, temperature, clipping and largest length are the trainer's where the checkpoint tells
            them and the config does not.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    checkpoint: Path
    base_model: str | None = None
    adapter: str | None = None
    quantization: dict[str, Any] | None = None
    mapping: str | dict[str, int] | None = None
    weights: Literal["masters", "rounded"] = "masters"
    policy: str | None = None
    reference: Path | None = None
    output_dir: Path
    overwrite: bool = False
    device: Literal["cpu", "cuda", "auto"] = "auto"
    shard: bool = False
    prompts: PromptSource | None = None
    mode: Literal["two_batch", "one_batch", "both", "pooled"] = "two_batch"
    reward: str | tuple[str, ...] | None = None
    reward_weights: tuple[float, ...] | None = None
    generation: GenerationSettings = GenerationSettings()
    update: UpdateSettings | None = None
    evaluation: EvaluationSettings | None = None
    rollouts: SavedRollouts = SavedRollouts()
    save_rollouts: bool = True
    attribution: bool = False
    attribution_folds: int | None = Field(default=None, ge=2)
    questions: dict[str, dict[str, Any]] = Field(default_factory=dict)
    trust_config: bool = False
    probe: ProbeConfig = ProbeConfig()

    @property
    def needs_no_evaluation(self) -> bool:
        """Whether the update batch is the only one."""
        return self.mode == "one_batch"

    @model_validator(mode="after")
    def _check_prompts(self) -> RunConfig:
        if self.update is not None and self.update.num_prompts < 2:
            raise ValueError("update.num_prompts: expected at least 2, since one prompt has no standard error, got 1")
        return self

    @model_validator(mode="after")
    def _check_rewards(self) -> RunConfig:
        count = 0 if self.reward is None else 1 if isinstance(self.reward, str) else len(self.reward)
        if count == 0 and self.reward is not None:
            raise ValueError("reward: expected at least one, got an empty list; name a reward")
        if self.reward_weights is not None and len(self.reward_weights) != count:
            raise ValueError(
                f"reward_weights: expected one for each of the {count} rewards, got {len(self.reward_weights)}"
            )
        return self

    @model_validator(mode="after")
    def _check_sources(self) -> RunConfig:
        for batch in ("update",) if self.needs_no_evaluation else ("update", "evaluation"):
            if getattr(self.rollouts, batch) is not None:
                continue
            needed = {
                batch: getattr(self, batch),
                "prompts": self.prompts,
                **({"reward": self.reward} if batch == "update" else {}),
            }
            for key, value in needed.items():
                if value is None:
                    raise ValueError(
                        f"{key}: required to sample the {batch} batch, but missing; set it, or set rollouts.{batch} "
                        "to a saved batch"
                    )
        return self

    @model_validator(mode="after")
    def _check_places(self) -> RunConfig:
        for batch, other in (("update", "evaluation"), ("evaluation", "update")):
            path = getattr(self.rollouts, batch)
            if path is not None and path.absolute() == self.output_dir.absolute() / f"{other}.parquet":
                raise ValueError(
                    f"rollouts.{batch}: lies in output_dir where the {other} batch goes; choose another output_dir"
                )
        return self

    @model_validator(mode="after")
    def _check_reference(self) -> RunConfig:
        if self.reference is not None and self.shard:
            raise ValueError("reference: expected shard: false beside it, got true; record reference_logprobs instead")
        return self

    @model_validator(mode="after")
    def _check_attribution(self) -> RunConfig:
        if self.attribution and self.shard:
            raise ValueError("attribution: expected shard: false beside it, since it needs whole parameters, got true")
        alone = self.attribution and self.needs_no_evaluation
        if alone and (self.probe.geometry == "frozen" or self.attribution_folds is not None):
            what = "attribution_folds" if self.attribution_folds is not None else "probe.geometry"
            raise ValueError(
                f"{what}: expected evaluation rollouts where it is set beside attribution, got mode one_batch; change "
                "the mode, or leave it out"
            )
        if self.attribution_folds is not None and not self.attribution:
            raise ValueError("attribution_folds: expected attribution: true beside it, got false; set it too")
        drawn = self.evaluation.num_clusters if self.evaluation and self.rollouts.evaluation is None else None
        if self.attribution_folds is not None and drawn is not None and self.attribution_folds > drawn:
            raise ValueError(
                f"attribution_folds: expected at most the {drawn} clusters of the evaluation batch, got "
                f"{self.attribution_folds}"
            )
        return self

    @model_validator(mode="after")
    def _check_questions(self) -> RunConfig:
        if not self.questions:
            return self
        from entropy_probe.questions.base import check_questions

        check_questions(self.questions)
        if self.needs_no_evaluation:
            raise ValueError(
                f"questions: expected mode two_batch or both, whose prediction they are about, got {self.mode}; change "
                "the mode, or leave them out"
            )
        return self

    def check_filled(self) -> None:
        """Check what the trainer's settings are part of, once they were filled in from the checkpoint.

        Raises:
            ValueError: if responses are to be sampled and neither the config nor the checkpoint has their largest
                length, or a reference is given that the loss has no use for.
        """
        batches = ("update",) if self.needs_no_evaluation else ("update", "evaluation")
        sampled = next((batch for batch in batches if getattr(self.rollouts, batch) is None), None)
        missing = "but missing, and the checkpoint does not tell it; set it"
        if self.probe.max_completion_length is None and sampled is not None:
            raise ValueError(
                f"probe.max_completion_length: required to sample the {sampled} batch, {missing}, or set "
                f"rollouts.{sampled} to a saved batch"
            )
        if self.probe.max_completion_length is None and self.probe.on_low_ess == "resample":
            raise ValueError(
                "probe.max_completion_length: required to sample responses anew (probe.on_low_ess is resample), "
                f"{missing}"
            )
        if self.reference is not None and not self.probe.loss.needs_reference:
            raise ValueError(
                "reference: expected a loss with a KL term beside it (probe.loss.beta above 0), got none; set it, or "
                "leave reference out"
            )

    def resolved(self) -> RunConfig:
        """The config with nothing left to circumstances: absolute paths, the device, how batches were drawn.

        Evaluation sequences that are sampled here are drawn with replacement, so each is a cluster of its own, or are
        several of each of distinct prompts, which are the clusters. Update
        prompts that are filtered here, or whose truncated responses are masked, are selected by what they are.
        Sampling settings that saved rollouts take the place of are left out.

        Raises:
            ValueError: if a CUDA device is asked for and there is none.
        """
        import torch

        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device: expected a CUDA device, torch finds none; set device to cpu")
        changes: dict[str, Any] = {
            "checkpoint": self.checkpoint.absolute(),
            "output_dir": self.output_dir.absolute(),
            "device": "cuda" if self.device != "cpu" and torch.cuda.is_available() else "cpu",
        }
        if self.base_model is not None and Path(self.base_model).is_dir():
            changes["base_model"] = str(Path(self.base_model).absolute())
        if self.reference is not None:
            changes["reference"] = self.reference.absolute()
        if self.prompts is not None and self.prompts.file is not None:
            kind, path = self.prompts.file
            changes["prompts"] = self.prompts.model_copy(update={kind: path.absolute()})
        saved = {batch: path.absolute() for batch, path in self.rollouts if path is not None}
        changes["rollouts"] = SavedRollouts(**saved)
        changes |= dict.fromkeys(saved)
        drawn: dict[str, Any] = {}
        if "evaluation" not in saved and not self.needs_no_evaluation and self.probe.evaluation_unit == "auto":
            grouped = self.evaluation is not None and self.evaluation.draws_per_prompt is not None
            drawn["evaluation_unit"] = "prompt" if grouped else "sequence"
        if "update" not in saved and self.update is not None and self.update.selects:
            drawn["update_selected"] = True
        changes["probe"] = self.probe.model_copy(update=drawn)
        return self.model_copy(update=changes)

    def to_yaml(self) -> str:
        """The settings as a YAML file that gives the same run; ``overwrite`` has to be asked for each time."""
        return dump_yaml(self.model_dump(mode="json", exclude={"overwrite"}))


class ValidateConfig(RunConfig):
    """A run's settings with attribution switched on, for ``validate`` to check."""

    @model_validator(mode="before")
    @classmethod
    def _attributed(cls, settings: dict[str, Any]) -> dict[str, Any]:
        if settings.get("mode") == "one_batch":
            raise ValueError(
                f"validate: expected mode two_batch or both, whose prediction is attributed, got {settings['mode']}; "
                "change the mode"
            )
        return settings | {"attribution": True}


def load_config(
    path: Path,
    overrides: Iterable[str] = (),
    options: Mapping[str, Any] | None = None,
    kind: type[RunConfig] = RunConfig,
) -> RunConfig:
    """Read and validate a config file.

    Args:
        path: the YAML file.
        overrides: dotted ``key=value`` replacements, in order.
        options: values of command-line options by dotted key, applied last; None leaves a key alone.
        kind: the class of the config: :class:`RunConfig`, or one that adds a section to it.

    Raises:
        ValueError: one line with the full key of the first problem, and the nearest known key for an unknown one.
    """
    # JSON values are YAML values, whatever characters they hold.
    given = [f"{key}={json.dumps(value)}" for key, value in (options or {}).items() if value is not None]
    settings = apply_overrides(load_yaml(path), [*overrides, *given])
    unknown = next(_unknown_keys(settings, kind), None)
    if unknown is not None:
        raise ValueError(f"{path}: {unknown}: unknown key; {_suggestion(unknown, kind)}")
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        raise ValueError(f"{path}: {describe(error)}") from error


def _sections(model: type[BaseModel]) -> dict[str, type[BaseModel] | None]:
    """The keys of a section, with the model of those that are sections themselves; a loss knows its own keys."""
    keys: dict[str, type[BaseModel] | None] = {}
    for name, field in model.model_fields.items():
        candidates = (field.annotation, *get_args(field.annotation))
        models = [kind for kind in candidates if isinstance(kind, type) and issubclass(kind, BaseModel)]
        keys[name] = models[0] if models and not inspect.isabstract(models[0]) else None
    return keys


def _known_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, section in _sections(model).items():
        yield prefix + name
        if section is not None:
            yield from _known_keys(section, f"{prefix}{name}.")


def _unknown_keys(settings: Mapping[Any, Any], model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    known = _sections(model)
    for name, value in settings.items():
        section = known.get(name)
        if name not in known:
            yield f"{prefix}{name}"
        elif section is not None and section is not Loss and isinstance(value, Mapping):
            yield from _unknown_keys(value, section, f"{prefix}{name}.")


def _suggestion(unknown: str, kind: type[BaseModel]) -> str:
    """The nearest known key by its last part, in the same section first, then in any."""
    section, _, name = unknown.rpartition(".")
    known = [(key.rpartition("."), key) for key in _known_keys(kind)]
    beside = {parts[2]: key for parts, key in known if parts[0] == section}
    anywhere = {parts[2]: key for parts, key in known}
    for keys in (beside, anywhere):
        nearest = difflib.get_close_matches(name, keys, n=1)
        if nearest:
            return f"did you mean {keys[nearest[0]]}?"
    return f"known here are {', '.join(beside)}"
