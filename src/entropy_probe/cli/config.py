"""What ``entropy-probe run`` reads: one YAML file, validated, with every key known by name."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from entropy_probe.cli.allowed import check_code
from entropy_probe.cli.errors import describe
from entropy_probe.cli.known_keys import suggestion, unknown_keys
from entropy_probe.cli.yaml_settings import apply_overrides, dump_yaml, load_yaml
from entropy_probe.config import ProbeConfig
from entropy_probe.results.record import Settings, file_errors
from entropy_probe.sampling import EvaluationSettings, GenerationSettings, PromptSource, UpdateSettings

MOST_SECONDS = 1e6


class SavedRollouts(Settings):
    """Rollouts that are read instead of sampled: Parquet of ours, or what a trainer left of its own.

    Attributes:
        update: the update batch, advantages included; takes the place of the ``update`` settings. The same as
            ``update: {path: FILE}``.
        evaluation: the evaluation batch; takes the place of the ``evaluation`` settings, likewise.
    """

    update: Path | None = None
    evaluation: Path | None = None


class RunConfig(Settings):
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
        overwrite: whether to replace an earlier run in ``output_dir``; on the command line only.
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
        reward_time_limit: seconds that a reward may take for the responses of one round of sampling; no limit by
            default.
        generation: how responses are sampled. Temperature and largest length are those of ``probe``.
        update: the batch that the optimizer step is taken on.
        evaluation: the batch that the entropy is measured on.
        rollouts: saved batches to read instead of sampling.
        save_rollouts: whether to save both batches beside the results.
        attribution: whether to divide the prediction over tokens, prompts and layers, into tables beside the results.
        attribution_folds: standard errors of the prompts' contributions from this many folds of the evaluation batch;
            ``auto`` takes 8 where that costs no pass over the update batch, ``null`` leaves the errors out.
        origins: divide the momentum part over the steps whose gradients it comes from, as far as the run recorded them
            beside its checkpoints (``EntropyProbeCallback(keep_gradients=N)``).
        questions: what else to ask of the prediction, by name: ``without_prompts: {prompts: [[3], [5]]}``.
        trainer_config: the trainer's own config (verl, OpenRLHF, prime-rl: YAML, JSON, TOML, or the script with its
            command), where it does not lie beside the checkpoint.
        trust_config: go by the config where the checkpoint's files say otherwise of training, and probe the checkpoint
            of any trainer. The result says where they differ.
        probe: how to probe. Loss, temperature, clipping and largest length are the trainer's where the checkpoint tells
            them and the config does not.
    """

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
    reward_time_limit: float | None = Field(default=None, gt=0, le=MOST_SECONDS)
    generation: GenerationSettings = GenerationSettings()
    update: UpdateSettings | None = None
    evaluation: EvaluationSettings | None = None
    rollouts: SavedRollouts = SavedRollouts()
    save_rollouts: bool = True
    attribution: bool = False
    attribution_folds: Annotated[int, Field(ge=2)] | Literal["auto"] | None = "auto"
    questions: dict[str, dict[str, Any]] = Field(default_factory=dict)
    origins: bool = False
    trainer_config: Path | None = None
    trust_config: bool = False
    probe: ProbeConfig = ProbeConfig()

    @property
    def needs_no_evaluation(self) -> bool:
        """Whether the update batch is the only one."""
        return self.mode == "one_batch"

    def named_code(self) -> Iterator[tuple[str, str]]:
        """Key and name of every ``package.module:function`` that this run would import."""
        update, evaluation = self.rollouts.update is None, self.rollouts.evaluation is None
        if update and self.reward is not None:
            for name in (self.reward,) if isinstance(self.reward, str) else self.reward:
                if ":" in name:
                    yield "reward", name
        asks = update or (evaluation and not self.needs_no_evaluation)
        if asks and self.prompts is not None and self.prompts.callable is not None:
            yield "prompts.callable", self.prompts.callable

    @model_validator(mode="before")
    @classmethod
    def _paths_of_batches(cls, settings: Any) -> Any:
        return with_paths(settings)

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        problem = next(self._problems(), None)
        if problem is not None:
            raise ValueError(problem)
        if self.questions:
            from entropy_probe.questions.base import check_questions

            check_questions(self.questions)
        return self

    def _problems(self) -> Iterator[str]:
        """What does not go together, in a line each."""
        if self.update is not None and self.update.num_prompts < 2:
            yield "update.num_prompts: expected at least 2, since one prompt has no standard error, got 1"
        count = 0 if self.reward is None else 1 if isinstance(self.reward, str) else len(self.reward)
        if count == 0 and self.reward is not None:
            yield "reward: expected at least one, got an empty list; name a reward"
        if self.reward_weights is not None and len(self.reward_weights) != count:
            yield f"reward_weights: expected one for each of the {count} rewards, got {len(self.reward_weights)}"
        yield from self._problems_of_batches()
        if self.reference is not None and self.shard:
            yield "reference: expected shard: false beside it, got true; record reference_logprobs instead"
        if self.generation.server is not None and self.probe.on_low_ess == "resample":
            yield (
                "probe.on_low_ess: expected psis or refuse beside generation.server, which does not have the policy "
                "after the step, got resample; change it, or use generation.engine: hf"
            )
        yield from self._problems_of_attribution()
        if self.questions and self.needs_no_evaluation:
            yield (
                f"questions: expected mode two_batch or both, whose prediction they are about, got {self.mode}; change "
                "the mode, or leave them out"
            )

    def _problems_of_batches(self) -> Iterator[str]:
        for batch in self._sampled:
            needed = {batch: getattr(self, batch), "prompts": self.prompts}
            needed |= {"reward": self.reward} if batch == "update" else {}
            without = ", or mode to one_batch" if batch == "evaluation" else ""
            for key in (key for key, value in needed.items() if value is None):
                yield (
                    f"{key}: required to sample the {batch} batch, but missing; set it, or set rollouts.{batch} to a "
                    f"saved batch{without}"
                )
        for batch, other in (("update", "evaluation"), ("evaluation", "update")):
            path = getattr(self.rollouts, batch)
            if path is not None and path.absolute() == self.output_dir.absolute() / f"{other}.parquet":
                yield f"rollouts.{batch}: lies in output_dir where the {other} batch goes; choose another output_dir"

    @property
    def _sampled(self) -> list[str]:
        """The batches that are needed and not given."""
        batches = ("update",) if self.needs_no_evaluation else ("update", "evaluation")
        return [batch for batch in batches if getattr(self.rollouts, batch) is None]

    def _problems_of_attribution(self) -> Iterator[str]:
        if self.attribution and self.shard:
            yield "attribution: expected shard: false beside it, since it needs whole parameters, got true"
        folds = None if self.attribution_folds == "auto" else self.attribution_folds
        if self.attribution and self.probe.geometry == "frozen" and self.needs_no_evaluation:
            yield (
                "probe.geometry: frozen: expected evaluation rollouts beside it, got mode one_batch; change one of them"
            )
        if folds is not None and not self.attribution:
            yield "attribution_folds: expected attribution: true beside it, got false; set it too"
        drawn, of, batch = None, "the {} clusters of the evaluation batch", "evaluation"
        if self.needs_no_evaluation:
            of, batch = "{}, half the prompts of the update batch", "update"
            drawn = self.update.num_prompts // 2 if self.update else None
        elif self.evaluation:
            drawn = self.evaluation.num_clusters
        if folds is not None and drawn is not None and folds > drawn and batch in self._sampled:
            yield f"attribution_folds: expected at most {of.format(drawn)}, got {folds}"

    def check_filled(self) -> None:
        """Check what the trainer's settings are part of, once they were filled in from the checkpoint.

        Raises:
            ValueError: if responses are to be sampled and neither the config nor the checkpoint has their largest
                length, or a reference is given that the loss has no use for.
        """
        sampled = next(iter(self._sampled), None)
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
        Sampling settings that saved rollouts take the place of are left out. Where a server samples all of them, what
        does not fit the policy is refused unless the config says otherwise.

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
        for name in ("reference", "trainer_config"):
            if getattr(self, name) is not None:
                changes[name] = getattr(self, name).absolute()
        if self.prompts is not None and self.prompts.file is not None:
            kind, path = self.prompts.file
            changes["prompts"] = self.prompts.model_copy(update={kind: path.absolute()})
        server = self.generation.server
        if server is not None and server.adapter is not None:
            where = server.model_copy(update={"adapter": server.adapter.absolute()})
            changes["generation"] = self.generation.model_copy(update={"server": where})
        saved = {batch: path.absolute() for batch, path in self.rollouts if path is not None}
        changes["rollouts"] = SavedRollouts(**saved)
        changes |= dict.fromkeys(saved)
        drawn: dict[str, Any] = {}
        if "evaluation" not in saved and not self.needs_no_evaluation and self.probe.evaluation_unit == "auto":
            grouped = self.evaluation is not None and self.evaluation.draws_per_prompt is not None
            drawn["evaluation_unit"] = "prompt" if grouped else "sequence"
        if "update" not in saved and self.update is not None and self.update.selects:
            drawn["update_selected"] = True
        if server is not None and not saved and "on_mismatch" not in self.probe.model_fields_set:
            drawn["on_mismatch"] = "refuse"
        changes["probe"] = self.probe.model_copy(update=drawn)
        return self.model_copy(update=changes)

    def to_yaml(self) -> str:
        """The settings as a YAML file that gives the same run, without what has to be asked for each time."""
        asked = {"overwrite": True, "generation": {"server": {"api_key_env"}}}
        return dump_yaml(self.model_dump(mode="json", exclude=asked))


class ValidateConfig(RunConfig):
    """A run's settings with attribution switched on, for ``validate`` to check."""

    @model_validator(mode="before")
    @classmethod
    def _attributed(cls, settings: dict[str, Any]) -> dict[str, Any]:
        return settings | {"attribution": True}


def with_paths(settings: Any) -> Any:
    """Settings in which ``update: {path: FILE}`` is ``rollouts: {update: FILE}``, likewise for ``evaluation``.

    Raises:
        ValueError: if a batch has a file and how to sample it, or two files.
    """
    if not isinstance(settings, Mapping):
        return settings
    settings = dict(settings)
    for batch in ("update", "evaluation"):
        section = settings.get(batch)
        if not (isinstance(section, Mapping) and "path" in section):
            continue
        saved = settings.get("rollouts") or {}
        others = [key for key in section if key != "path"] or [f"rollouts.{batch}"] * (batch in saved)
        if others:
            raise ValueError(f"{batch}: expected path alone, got {others[0]} too; leave one out")
        settings = {**settings, batch: None, "rollouts": {**saved, batch: section["path"]}}
    return settings


@file_errors()
def load_config(
    path: Path | None,
    overrides: Iterable[str] = (),
    options: Mapping[str, Any] | None = None,
    kind: type[RunConfig] = RunConfig,
    *,
    allow_code: bool = False,
) -> RunConfig:
    """Read and validate a config file.

    Args:
        path: the YAML file; None for no settings but those below.
        overrides: dotted ``key=value`` replacements, in order.
        options: values of command-line options by dotted key, applied last; None and False leave a key alone.
        kind: the class of the config: :class:`RunConfig`, or one that adds a section to it.
        allow_code: whether it may name any function; otherwise those of packages that the user has allowed.

    Raises:
        ValueError: one line with the full key of the first problem, and the nearest known key for an unknown one; or
            with the code that it names and may not.
    """
    # JSON values are YAML values, whatever characters they hold.
    chosen = {key: value for key, value in (options or {}).items() if value is not None and value is not False}
    given = [f"{key}={json.dumps(value, default=str)}" for key, value in chosen.items()]
    settings = {} if path is None else load_yaml(path)
    place = "settings" if path is None else str(path)
    if settings.get("overwrite") not in (None, False):
        raise ValueError(
            f"{place}: overwrite: counts on the command line only, since a file may be somebody else's; leave it out, "
            "and pass --overwrite to replace an earlier run"
        )
    server: Any = settings
    for key in ("generation", "server"):
        server = server.get(key) if isinstance(server, dict) else None
    if isinstance(server, dict) and server.get("api_key_env") is not None:
        raise ValueError(
            f"{place}: generation.server.api_key_env: counts on the command line only, since a file may be somebody "
            "else's and send your key to its server; leave it out, and pass generation.server.api_key_env=NAME"
        )
    settings = apply_overrides(settings, [*overrides, *given])
    try:
        settings = with_paths(settings)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    unknown = next(unknown_keys(settings, kind), None)
    if unknown is not None:
        raise ValueError(f"{place}: {unknown}: unknown key; {suggestion(unknown, kind)}")
    try:
        config = kind.model_validate(settings)
    except ValidationError as error:
        raise ValueError(f"{place}: {describe(error)}") from error
    if not allow_code:
        check_code(config.named_code(), place)
    return config
