"""What a probe returns and what ``results.json`` holds: plain, validated, versioned data.

Reading a result needs no model and no torch.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field
from pydantic.json_schema import SkipJsonSchema

from entropy_probe.results.attribution import AttributionSummary
from entropy_probe.results.changes import Coasted, Horizons, Origins, Pooled, Predicted, Realized
from entropy_probe.results.estimate import Estimate, Unit
from entropy_probe.results.note import Note
from entropy_probe.results.record import Kept, Record, SavedRecord
from entropy_probe.results.step import StepVectors

SCHEMA_VERSION = 3
RESULTS_FILE = "results.json"

StepPart = Literal["gradient", "momentum", "weight_decay", "rounding"]


class OptimizerStateReport(Record):
    """What the loaded optimizer state covers.

    Attributes:
        optimizer: the class of an optimizer other than Adam; null for Adam and AdamW.
        num_parameters: parameter tensors the optimizer steps.
        num_elements: their elements in all.
        coverage: share of elements with a usable second moment (present, finite, and not all zero); with another
            optimizer, with any state.
        mapping: how state was matched to parameters.
        steps: smallest and largest step count over parameters, 0 where the optimizer keeps none.
        scale_min: smallest ``1 / (sqrt(v_hat) + eps)``; null when no second moment is usable, or not Adam's.
        scale_max: largest.
        learning_rates: the learning rate of each parameter group, as used.
    """

    optimizer: str | None = None
    num_parameters: int
    num_elements: int
    coverage: float
    mapping: str
    steps: tuple[int, int]
    scale_min: float | None
    scale_max: float | None
    learning_rates: tuple[float, ...]


class PreconditionerReport(Record):
    """How the frozen preconditioner P was built (frozen geometry and one-batch predictions).

    Attributes:
        coverage: share of elements with a usable second moment.
        bias_correction: where the step count of the bias correction came from.
        num_identity: elements that got the identity instead.
        identity_parameters: names of the parameters with such elements.
        num_clamped: elements whose scale was clamped.
        max_scale: the largest scale in use.
        min_denominator: the smallest ``sqrt(v_hat) + eps`` before clamping; null when P is the identity.
    """

    coverage: float
    bias_correction: str
    num_identity: int
    identity_parameters: tuple[str, ...]
    num_clamped: int
    max_scale: float
    min_denominator: float | None


class CrossPrompt(Record):
    """The first-order change from one batch that both predicts and updates, in the frozen geometry.

    Attributes:
        delta_h1: ``-learning_rate * u_cross``, in ``unit``.
        se_plugin: standard error of ``delta_h1`` from the variance of the row means.
        se_jackknife: standard error of ``delta_h1`` from leaving out one cluster at a time.
        unit: nats per token or nats per sequence.
        u_cross: the U-statistic of ``<X_u, P Y_w>`` over distinct clusters.
        zeta_plugin: estimated variance of the statistic's projection, plug-in.
        zeta_jackknife: the same, jackknife.
        bars_dot: ``<mean X, P mean Y>``, which keeps the biased diagonal.
        bars_dot_ratio: ``bars_dot`` over its value without P; null if that is 0.
        diagonal: ``sum_u <X_u, P Y_u>``.
        row_means: what each cluster contributes to ``u_cross``, which is their mean.
        num_clusters: clusters in the statistic.
        mode: ``exact`` (a cluster is a prompt) or ``block`` (a block of prompts).
        block_size: prompts per cluster.
        learning_rate: the largest rate of the parameter groups; rates of other groups are folded into P.
        gradients: how per-sample gradients were held.
        preconditioner: how P was built.
    """

    delta_h1: float
    se_plugin: float = Field(ge=0)
    se_jackknife: float = Field(ge=0)
    unit: Unit
    u_cross: float
    zeta_plugin: float
    zeta_jackknife: float
    bars_dot: float
    bars_dot_ratio: float | None
    diagonal: float
    row_means: tuple[float, ...]
    num_clusters: int
    mode: Literal["exact", "block"]
    block_size: int
    learning_rate: float
    gradients: str
    preconditioner: PreconditionerReport

    @property
    def estimate(self) -> Estimate:
        """``delta_h1`` with the larger of its two errors."""
        error = max(self.se_plugin, self.se_jackknife)
        return Estimate(value=self.delta_h1, standard_error=error, num_clusters=self.num_clusters, unit=self.unit)


class SamplerMismatch(Record):
    """How far the sampler's own log-probabilities are from the policy's, on the same responses.

    Attributes:
        mean: mean of ``|log pi - log pi_sampler|`` over response tokens, nats.
        max: the largest of them, nats.
        ess_fraction: effective sample size of the sequence weights ``pi / pi_sampler`` over the number of sequences; 1
            when the sampler was the policy.
    """

    mean: float = Field(ge=0)
    max: float = Field(ge=0)
    ess_fraction: float


class BatchFit(Record):
    """Whether the tokens of a batch may have been drawn from the policy: surprisal minus entropy has mean zero then.

    Attributes:
        z: its sum over its error; standard normal for the policy's own rollouts, positive where tokens are more
            surprising than that, negative where they are less. Of a reweighted batch, with its weights.
        excess: its mean, nats per token.
        num_sequences: sequences of the batch.
        status: ``ok``; ``off_policy``: further from 0 than chance explains (``|z|`` above 4); ``selected``: likewise,
            but expected of responses that were selected by what they are (``update_selected``) or drawn by an older
            policy (``old_logprobs``).
    """

    z: float
    excess: float
    num_sequences: int
    status: Literal["ok", "off_policy", "selected"] = "ok"


class PolicyFit(Record):
    """How each batch fits the policy; both are the same where one batch plays both parts.

    Attributes:
        evaluation: the evaluation batch; null where it was not scored.
        update: the update batch; null likewise. A batch selected by reward need not fit.
    """

    evaluation: BatchFit | None = None
    update: BatchFit | None = None


class GradientAgreement(Record):
    """How far the gradient of the update rollouts is from one that was given beside them, before clipping.

    Attributes:
        relative_distance: length of the difference, over that of the gradient given; null if that is 0.
        cosine: of the angle between the two; null if one of them is 0.
    """

    relative_distance: float | None = Field(ge=0)
    cosine: float | None


class Draws(Record):
    """How an evaluation batch with several draws per prompt compares with single draws.

    Attributes:
        num_prompts: prompts, which are the clusters.
        per_prompt: draws of each; their mean where they differ.
        between_share: share of the variance of one draw's part in the realized change that its prompt explains; below
            0 by chance where it explains next to nothing.
        design_effect: the variance of the mean over that of as many draws with a prompt each.
    """

    num_prompts: int
    per_prompt: float = Field(ge=1)
    between_share: float = Field(le=1)
    design_effect: float


class Diagnostics(Record):
    """How the numbers came about.

    Attributes:
        evaluation_unit: what was treated as independent on the evaluation side; ``trajectory`` where the rollouts say
            which sequences are parts of one.
        num_evaluation_sequences: sequences in the evaluation batch.
        num_update_sequences: sequences in the update batch; null where there is none, but a gradient from outside.
        num_update_prompts: prompts in the update batch, equal ones and those of one trajectory counted once; null
            likewise.
        gradient_agreement: of a gradient from outside, which the step is that of, and that of the update batch beside
            it; null without either.
        gradient_norm: norm of the gradient before clipping.
        clip_factor: what clipping multiplied it by, 1 when it did not act.
        step_norm: Euclidean norm of the parameter change.
        prefix_sharing: whether responses to one prompt were computed with the prompt once, or why not.
        head: how log-probabilities were computed (``chunked``, or ``logits`` and why).
        per_sample_gradients: how per-sample gradients were computed: ``linear-layer hooks`` or ``hooks`` (read
            off the layers), ``hooks; by autograd: NAMES`` (these by differentiating their layers alone), or
            ``per cluster (WHY)``: a backward pass each.
        policy_fit: whether the batches' tokens may be the policy's own.
        mismatch: the evaluation batch's sampler against the policy; null if the sampler reported no log-probabilities.
        update_mismatch: the update batch's; null likewise.
        notes: everything a careful reader should know.
        not_modelled: one line each for what is part of the trainer's step, as far as anything at hand shows, and not of
            these numbers; ``docs/theory.md``, "What is not modelled".
    """

    evaluation_unit: Literal["sequence", "prompt", "trajectory"]
    num_evaluation_sequences: int
    num_update_sequences: int | None
    num_update_prompts: int | None
    gradient_agreement: GradientAgreement | None = None
    gradient_norm: float
    clip_factor: float
    step_norm: float
    head: str
    prefix_sharing: str
    per_sample_gradients: str
    policy_fit: PolicyFit = PolicyFit()
    mismatch: SamplerMismatch | None = None
    update_mismatch: SamplerMismatch | None = None
    notes: tuple[Note, ...] = ()
    not_modelled: tuple[str, ...] = ()


class ProbeResult(SavedRecord):
    """The outcome of a probe, as returned by :class:`entropy_probe.EntropyProbe` and saved in ``results.json``.

    Attributes:
        entropy: H at the checkpoint.
        predicted: the first-order change of the next step; null after ``measure``.
        components: the gradient, momentum and weight-decay parts of ``predicted``, and what rounding adds where
            training keeps its weights in 16 bits; they sum to it. Empty for optimizers without a closed form.
        realized: the change measured after the step; null after ``predict``.
        origins: the momentum part by step of origin; null unless gradients of the last steps are given.
        lifetime: what the gradient does to first order over its life in the momentum, this step included, with the
            step's denominators held; null without a closed form.
        committed: what the moments alone will do to first order after this step if every later gradient is zero; null
            for one batch, whose responses are in them, and without a closed form unless ``coasted`` was asked for.
        coasted: the same measured, for any optimizer whose momentum comes to an end; null unless asked for
            (``config.coast``).
        horizons: both changes within 0, 1, 2, 4, ... tokens; null unless the step was predicted and measured.
        draws: what several draws per evaluation prompt have in common; null for single draws, and without a change that
            per-decision weights measure.
        difference: realized minus predicted, with the standard error of the paired difference over
            evaluation clusters. With ``per_decision`` and ``rao_blackwell`` much smaller than either error, since both
            share their sampling noise.
        pooled: the changes by these rollouts and by the batch of the step together; null unless asked for.
        cross_prompt: the first-order change from the update batch alone; null unless asked for.
        attribution: how the prediction divides over tokens, prompts and layers; null unless asked for.
        contributions: each evaluation cluster's contribution to ``predicted`` (their mean is its value); kept in
            memory only.
        step: the step itself and its clipped gradient, by parameter name; null where none is planned; kept in memory
            only.
        answers: to further questions, by name; each has a file of its own.
        optimizer_state: what the optimizer's state covers.
        preconditioner: the frozen preconditioner, when that geometry was asked for.
        diagnostics: how the numbers came about.
        timing: seconds by phase.
        memory: peak memory in bytes by kind.
        config: the resolved settings.
        versions: versions of the libraries involved.
    """

    kept: ClassVar = Kept(RESULTS_FILE, "result", "run", "probe the checkpoint again")
    schema_version: Literal[3] = SCHEMA_VERSION
    entropy: Estimate
    predicted: Predicted | None = None
    components: dict[StepPart, Predicted | Estimate] = Field(default_factory=dict)
    realized: Realized | None = None
    origins: Origins | None = None
    lifetime: Estimate | None = None
    committed: Estimate | None = None
    coasted: Coasted | None = None
    horizons: Horizons | None = None
    draws: Draws | None = None
    difference: Estimate | None = None
    pooled: Pooled | None = None
    cross_prompt: CrossPrompt | None = None
    attribution: AttributionSummary | None = None
    contributions: tuple[float, ...] | None = Field(default=None, exclude=True, repr=False)
    step: SkipJsonSchema[StepVectors] | None = Field(default=None, exclude=True, repr=False)
    answers: dict[str, Any] = Field(default_factory=dict, exclude=True, repr=False)
    optimizer_state: OptimizerStateReport
    preconditioner: PreconditionerReport | None = None
    diagnostics: Diagnostics
    timing: dict[str, float] = Field(default_factory=dict)
    memory: dict[str, int] = Field(default_factory=dict)
    config: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
