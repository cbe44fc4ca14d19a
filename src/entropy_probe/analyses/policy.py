"""The policy whose next step is asked about: model, optimizer and settings, and what a run computes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import Parameter

from entropy_probe.analyses.admission import Role
from entropy_probe.analyses.overlap import COPIES, Contents, copies
from entropy_probe.analyses.policy_check import Checked, PolicyCheck
from entropy_probe.analyses.provenance import Clock, Phase
from entropy_probe.analyses.tried import Tried
from entropy_probe.config import ProbeConfig
from entropy_probe.gradients.hooks import Hooks, hookable
from entropy_probe.gradients.sharded import check_gradient, gathered_precisions
from entropy_probe.parallel.batch import LocalRows
from entropy_probe.parallel.ranks import ALONE, Ranks
from entropy_probe.parallel.shards import is_sharded
from entropy_probe.results.note import Note, NoteKind
from entropy_probe.results.probe import (
    PreconditionerReport,
    Unit,
)
from entropy_probe.rollouts.batch import Rollouts
from entropy_probe.scoring.cache import ScoreCache, fingerprint, rollouts_fingerprint
from entropy_probe.scoring.forward import Scorer
from entropy_probe.scoring.isolation import evaluating, hooked_parameters
from entropy_probe.scoring.precision import precisions
from entropy_probe.steps.adamw import Gradient, is_adam
from entropy_probe.steps.copied import check_optimizer, optimizer_name
from entropy_probe.steps.moments import unmoved_adapter
from entropy_probe.steps.preconditioner import frozen_preconditioner
from entropy_probe.types import TokenScores

LOW_PRECISIONS = (torch.bfloat16, torch.float16)
LOW = (
    "computed in {precision}: log-probabilities are quantised; measured on small models, that costs the realized "
    "change tens of percent at a learning rate of 1e-4 and leaves only noise at 1e-6"
)
_WIDEN = "Set probe.dtype to float32 and probe.autocast to off, and compare."
LOW_PRECISION = NoteKind("low_precision", LOW, _WIDEN)
LOW_PRECISION_SHARDED = NoteKind(
    "low_precision_sharded", LOW + "; sharded gradients were not compared with differences", _WIDEN
)
NOT_IN_OPTIMIZER = NoteKind(
    "not_in_optimizer",
    "{tensors} tensors require a gradient but are not in the optimizer: they do not move, and are left out of the norm "
    "that clipping uses",
    "Fine if the trainer froze them on purpose; otherwise the optimizer was built before they were unfrozen.",
)
NOT_PRECONDITIONED = NoteKind(
    "not_preconditioned",
    "frozen geometry: {share:.1%} of the elements are not preconditioned (second moment covers {coverage:.1%})",
    "The frozen prediction mixes Adam's geometry with the plain gradient's; a later checkpoint covers more.",
)
GRADIENT_HOOKS = NoteKind(
    "gradient_hooks",
    "{parameters} parameters have gradient hooks, {name} first: the update gradient is taken with them, microbatch by "
    "microbatch as training takes it, the entropy's without them",
    "Remove them if training does not run with them; a hook that is not linear sees other microbatches here.",
)
SCALE_CLAMPED = NoteKind(
    "scale_clamped",
    "frozen geometry: the scale of {share:.1%} of the elements is clamped to {largest:g}, so this is not quite Adam's "
    "geometry; raise frozen_max_scale to see",
    "Raise probe.frozen_max_scale and see whether the number moves.",
)
SHARDED = "the parameters are sharded"
"""Why single clusters take a backward pass each: a layer's call does not show where its gradient is summed."""
Resample = Callable[[Rollouts], Rollouts]
"""Fresh responses of the policy as it is now, to the prompts of the given rollouts, in the same order."""


@dataclass(eq=False)
class Log:
    """What a run has to say beside its numbers; it grows while the run computes.

    Attributes:
        notes: what a careful reader should know.
        not_modelled: what belongs to the trainer's step and not to the numbers.
        checked: how each batch fits the policy.
        per_sample_gradients: how they were computed.
    """

    notes: list[Note]
    not_modelled: list[str]
    checked: dict[Role, Checked] = field(default_factory=dict)
    per_sample_gradients: str = "not needed"


@dataclass(frozen=True, eq=False)
class Policy:
    """The policy whose next step is asked about, as one run sees it.

    Attributes:
        model: the policy.
        optimizer: holds the moments.
        parameters: what the optimizer steps, by name.
        learning_rates: of each parameter group, as used.
        mapping: how the optimizer's state was matched to parameters.
        config: the settings.
        scorer: computes log-probabilities and entropies of the model.
        clock: seconds by phase, and where progress is reported.
        log: what the run has to say beside its numbers.
        resample: samples fresh responses after the step, where the config asks for it.
        reference: the reference policy of a KL term, where it is a model of its own.
        cache: scores at the policy as it is, of batches seen before.
        ranks: the processes that share the work.
        end_ids: tokens that end a response.
        stop_texts: whether responses may end at a stop text instead.
        past: gradients of the last steps, the latest first, as the optimizer got them.
        tried: how the model may be called, as far as earlier runs have tried it.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    parameters: dict[str, Parameter]
    learning_rates: tuple[float, ...]
    mapping: str
    config: ProbeConfig
    scorer: Scorer
    clock: Clock
    log: Log
    resample: Resample | None
    reference: nn.Module | None
    cache: ScoreCache
    ranks: Ranks = ALONE
    end_ids: tuple[int, ...] = ()
    stop_texts: bool = False
    past: tuple[Gradient, ...] = ()
    tried: Tried = field(default_factory=Tried)

    @property
    def unit(self) -> Unit:
        """Of every change."""
        return "nats/token" if self.config.normalization == "token" else "nats/sequence"

    def isolated(self) -> AbstractContextManager[None]:
        """The model ready to be scored and differentiated, and left as it was."""
        return evaluating(self.model, torch.bfloat16 if self.config.autocast == "bfloat16" else None)

    def prepare(self, *batches: Rollouts) -> None:
        """Check batches against the model, choose how to compute, and see what shards make of it.

        Raises:
            ValueError: as :meth:`~entropy_probe.scoring.forward.Scorer.prepare`; or if a sharded model computes in a
                lower precision than configured, or its gradients are not summed as they should be.
        """
        with self.ranks.agreeing():
            distinct = {id(batch): batch for batch in batches}.values()
            if not self.scorer.sharded:
                self.tried.prepare(self.scorer, [*distinct])
                return
            self.scorer.prepare(*distinct)
            used, wanted = gathered_precisions(self.scorer, batches[0]), getattr(torch, self.config.dtype)
            lowest = min(used, key=lambda dtype: torch.finfo(dtype).bits)
            if torch.promote_types(lowest, wanted) != lowest:
                raise ValueError(
                    f"model: expected computation in at least {self.config.dtype}, got {lowest}, to which FSDP's "
                    "MixedPrecisionPolicy lowers gathered parameters; shard the model without it, or lower "
                    "ProbeConfig.dtype"
                )
            if lowest in LOW_PRECISIONS:
                self.log.notes.append(LOW_PRECISION_SHARDED(precision=str(lowest)))
            else:
                check_gradient(self.scorer, self.parameters, batches[0])

    def check_ranks_agree(self, gradient: Mapping[str, Tensor | None] | None = None, **batches: Rollouts) -> None:
        """Make sure that all ranks probe the same policy with the same settings and batches."""
        if self.ranks is ALONE:
            return
        state = self.optimizer.state
        known = {
            "config": repr(self.config),
            "optimizer": repr(self.optimizer.state_dict()["param_groups"]),
            **{name: fingerprint(_tensors(vars(batch))) for name, batch in batches.items()},
        }
        if not self.scorer.sharded:  # else every rank has other rows
            named = self.parameters.items()
            moments = [(f"{name} {key}", x) for name, p in named for key, x in _tensors(state.get(p, {}))]
            known["policy"] = self._weights
            known["optimizer"] += fingerprint(moments)
            known["gradient"] = fingerprint(_tensors(gradient or {}))
        seen = self.ranks.gather(known)
        for what in known:
            others = [rank for rank, of_rank in enumerate(seen) if of_rank.get(what) != seen[0].get(what)]
            if others:
                raise ValueError(
                    f"{what}: expected the same on every rank, got another on rank {others[0]} than on rank 0; give "
                    "every rank the same policy, settings and whole batches, which are shared out here"
                )

    @contextmanager
    def on_rank(self, local: LocalRows) -> Iterator[None]:
        """Work on this rank's rows of a batch; an error there is one on all ranks."""
        with self.ranks.agreeing():
            try:
                yield
            except (ValueError, MemoryError) as error:
                if len(local.rows) < local.size:
                    error.add_note(f"sequences are counted within the share of rank {self.ranks.rank}")
                raise

    def reference_scores(self, batch: Rollouts, local: LocalRows, phase: str) -> TokenScores:
        """Scores of some rows of a batch at the policy as it is; computed once for the same policy and rows."""
        own = local.select(batch)
        with self.clock.phase(phase) as progress, self.on_rank(local):
            return self.cache.get(self._key(batch, own), lambda: self.scorer.score(own, progress))

    def keep_scores(self, batch: Rollouts, local: LocalRows, scores: TokenScores) -> TokenScores:
        """Keep scores that another pass came by, as :meth:`reference_scores` keeps its own; returns what is kept."""
        return self.cache.get(self._key(batch, local.select(batch)), lambda: scores)

    @cached_property
    def _weights(self) -> str:
        """What parameters and buffers are recognised by, which are the same for as long as a run lasts."""
        return fingerprint([*self.model.named_parameters(), *self.model.named_buffers()])

    def _key(self, batch: Rollouts, own: Rollouts) -> str:
        """What the scores of some rows of a batch are found again by.

        Not all that makes a policy is in its parameters and buffers (which adapter is active, say), so what it makes of
        the shortest sequence is part of what it is recognised by.
        """
        scorer = self.scorer
        how = (scorer.temperature, scorer.max_tokens, scorer.head_path, scorer.prefix_sharing, self.config.autocast)
        state = f"{self._weights} {fingerprint(scorer.shortest_scores(batch))}"
        if scorer.sharded:
            state = " ".join(self.ranks.gather(state))  # all score, or none does
        return f"{state} {rollouts_fingerprint(own)} {how}"

    def check_rollouts(self, role: Role, scores: TokenScores, local: LocalRows, rollouts: Rollouts) -> TokenScores:
        """Compare a batch with the policy: its tokens, and the sampler's own log-probabilities if there are any.

        Returns:
            The scores, with weights where another policy sampled the batch and the config says to reweight it.

        Raises:
            ValueError: if they differ by more than the config allows, or too much to reweight.
        """
        checked = PolicyCheck(self.scorer, self.config, self.ranks)(role, scores, local, rollouts)
        self.log.checked[role] = checked
        if checked.note is not None:
            self.log.notes.append(checked.note)
        if checked.not_modelled is not None:
            self.log.not_modelled.append(checked.not_modelled)
        logprobs = self.sequence_logprobs(local, scores)
        if rollouts.old_logprobs is not None and role != "evaluation":
            logprobs = rollouts.old_logprobs.double().masked_fill(~rollouts.response_mask, 0.0).sum(1)
        repeated = copies(Contents.of(rollouts), logprobs)
        # what chance makes of another policy's responses this one cannot say
        if repeated.significant and checked.note is None:
            batch = "update" if role == "batch" else role
            numbers = {"copies": repeated.sequences, "sequences": len(rollouts), "expected": repeated.expected}
            self.log.notes.append(COPIES(batch=batch, **numbers))
        return checked.scores

    def sequence_logprobs(self, local: LocalRows, own: TokenScores) -> Float[Tensor, " N"]:
        """Log-probabilities of the responses of the whole batch, from the scores of this rank's rows."""
        return self.ranks.sum(local.by_sequence(own.sequence_logprobs.double()))

    def choose_hooks(self, rollouts: Rollouts) -> Hooks | None:
        """How per-sequence gradients can be read off the layers, if they can; the result will say."""
        with self.ranks.agreeing():
            hooks = SHARDED if self.scorer.sharded else self.tried.hooks
            if hooks is None:
                hooks = hookable(self.scorer, self.parameters, rollouts)
                self.tried.keep(self.model, hooks)
        self.log.per_sample_gradients = str(hooks) if isinstance(hooks, Hooks) else f"per cluster ({hooks})"
        return hooks if isinstance(hooks, Hooks) else None

    def frozen_scale(self) -> tuple[dict[str, Tensor], PreconditionerReport]:
        """``lr P`` of the frozen geometry, each parameter with its own group's rate, and how P came about."""
        config = self.config
        frozen = frozen_preconditioner(
            self.parameters,
            self.optimizer,
            config.frozen_max_scale,
            config.checkpoint_step,
            config.identity_if_coverage_below,
        )
        report, elements = frozen.report, sum(p.numel() for p in self.parameters.values())
        if report.num_identity:
            self.log.notes.append(NOT_PRECONDITIONED(share=report.num_identity / elements, coverage=report.coverage))
        if report.num_clamped:
            self.log.notes.append(SCALE_CLAMPED(share=report.num_clamped / elements, largest=config.frozen_max_scale))
        groups = zip(self.optimizer.param_groups, self.learning_rates, strict=True)
        rates = {id(p): rate for group, rate in groups for p in group["params"]}
        return {name: frozen.scale[name] * rates[id(p)] for name, p in self.parameters.items()}, report


def open_policy(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, Parameter],
    config: ProbeConfig,
    *,
    progress: Phase | None = None,
    **more: Any,
) -> Policy:
    """The policy for one run, with what can be said before a batch is seen."""
    notes: list[Note] = []
    narrow = ", ".join(sorted({str(dtype) for _, dtype in precisions(model) if dtype in LOW_PRECISIONS}))
    if config.autocast != "off":
        narrow = f"{narrow + ' and ' if narrow else ''}autocast in {config.autocast}"
    if narrow:
        notes.append(LOW_PRECISION(precision=narrow))
    held = {id(p) for p in parameters.values()}
    strays = sum(p.requires_grad and id(p) not in held for p in model.parameters())
    if strays:
        notes.append(NOT_IN_OPTIMIZER(tensors=strays))
    if hooked := hooked_parameters(parameters):
        notes.append(GRADIENT_HOOKS(parameters=len(hooked), name=hooked[0]))
    starting = ((p, optimizer.state.get(p, {})) for name, p in parameters.items() if ".lora_B." in name)
    if unmoved := unmoved_adapter(starting):
        notes.append(unmoved)
    scorer = Scorer(model, config.temperature, config.max_tokens_per_microbatch)
    log = Log(notes, [])
    return Policy(model, optimizer, parameters, config=config, scorer=scorer, clock=Clock(progress), log=log, **more)


def checked_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, config: ProbeConfig, resample: Resample | None
) -> torch.optim.Optimizer:
    """The optimizer itself, taken out of what accelerate wraps it in, once all that a probe is given is checked.

    Raises:
        ValueError: if something is of another kind, or does not fit the config.
    """
    for name, value, kind in (("model", model, nn.Module), ("config", config, ProbeConfig)):
        if not isinstance(value, kind):
            raise ValueError(f"{name}: expected a {kind.__name__}, got {type(value).__name__}; pass one")
    if type(optimizer).__module__.partition(".")[0] == "accelerate":
        optimizer = getattr(optimizer, "optimizer", optimizer)
    check_optimizer(optimizer)
    check_dtype(model, config)
    check_device(model)
    if config.on_low_ess == "resample" and resample is None:
        raise ValueError(
            "resample: expected a function from rollouts to fresh rollouts beside on_low_ess 'resample', got none"
        )
    return optimizer


def check_own_step(model: nn.Module, optimizer: torch.optim.Optimizer, config: ProbeConfig) -> None:
    """Refuse shards with an optimizer whose step is its own kernel's."""
    if is_sharded(model) and not (is_adam(optimizer) or config.geometry == "frozen"):
        raise ValueError(
            f"optimizer: expected torch.optim.AdamW or Adam for a sharded model, got {optimizer_name(optimizer)}; "
            "its own step is taken on whole parameters only"
        )


def check_differentiable(model: nn.Module) -> None:
    """Refuse what inference mode keeps from being differentiated."""
    if torch.is_inference_mode_enabled() or any(p.is_inference() for p in model.parameters()):
        raise ValueError(
            "model: expected one that can be differentiated, got torch.inference_mode, which it was made or is "
            "probed under; leave that block"
        )


def check_dtype(model: nn.Module, config: ProbeConfig) -> None:
    """Refuse a model whose precision is below the one configured."""
    wanted = getattr(torch, config.dtype)
    for name, dtype in precisions(model):
        if torch.promote_types(dtype, wanted) != dtype:
            raise ValueError(
                f"model: expected parameters of at least {config.dtype}, got {dtype} in {name}; convert the model "
                "(model.float()) or lower ProbeConfig.dtype, knowing that low-precision log-probabilities are "
                "quantised more coarsely than one step changes them"
            )


def check_device(model: nn.Module) -> None:
    """Refuse a model that is spread over devices other than by FSDP2, or has no values."""
    devices = sorted({str(p.device) for p in model.parameters()})
    if len(devices) > 1 or devices == ["meta"]:
        raise ValueError(
            f"model: expected all parameters on one device and with values, got them on {', '.join(devices)}; load the "
            "model onto one device, in a lower precision if it is too large for it"
        )


def _tensors(values: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    return [(name, x) for name, x in values.items() if isinstance(x, Tensor)]
