"""The update and the evaluation batch of a run: as given, as counted, and this rank's rows of them."""

from __future__ import annotations

from dataclasses import dataclass

from entropy_probe.analyses.admission import (
    SAME_BATCH,
    ClusterName,
    Role,
    admit,
    draws_of,
    end_tokens,
    evaluation_clusters,
    in_groups,
)
from entropy_probe.analyses.overlap import Contents
from entropy_probe.analyses.policy import Policy
from entropy_probe.estimators.jackknife import blocks_of
from entropy_probe.parallel.batch import LocalRows
from entropy_probe.rollouts.batch import Rollouts
from entropy_probe.steps.adamw import Gradient, is_adam
from entropy_probe.types import Clusters


@dataclass(frozen=True, eq=False)
class UpdateBatch:
    """The batch that the step is taken on.

    Attributes:
        given: as the user gave it, with the trainer's own groups.
        rollouts: the same with equal prompts under one id.
        prompts: the prompt of each sequence.
        shares: what the gradient is divided over: prompts, or blocks of them where steps are taken on copies.
        local: this rank's rows.
        own: its sequences.
    """

    given: Rollouts
    rollouts: Rollouts
    prompts: Clusters
    shares: Clusters
    local: LocalRows
    own: Rollouts


@dataclass(frozen=True, eq=False)
class EvaluationBatch:
    """The batch that entropy is taken on.

    Attributes:
        rollouts: the batch, without responses that have no tokens.
        clusters: what is independent in it.
        cluster_name: what that is called.
        draws: which sequences were drawn together.
        local: this rank's rows.
        own: its sequences.
        is_update: whether it is the update batch itself.
    """

    rollouts: Rollouts
    clusters: Clusters
    cluster_name: ClusterName
    draws: Clusters
    local: LocalRows
    own: Rollouts
    is_update: bool

    @property
    def role(self) -> Role:
        """What the batch is used for."""
        return "batch" if self.is_update else "evaluation"


def admitted(policy: Policy, batch: Rollouts, role: Role) -> Rollouts:
    """A batch as this run counts it; see :func:`~entropy_probe.analyses.admission.admit`."""
    config = policy.config
    end_ids, longest = end_tokens(policy.model, policy.end_ids), config.max_completion_length
    seen = admit(batch, role, config.merge_equal_prompts, end_ids, longest, policy.stop_texts)
    policy.log.notes += seen.notes
    policy.log.not_modelled += seen.not_modelled
    return seen.rollouts


def admit_batches(
    policy: Policy, update: Rollouts, evaluation: Rollouts, gradient: Gradient | None = None
) -> tuple[UpdateBatch, EvaluationBatch]:
    """Both batches as this run counts them, and a gradient beside them that ranks must agree on.

    Raises:
        ValueError: for unusable rollouts, or ranks that were given different ones.
    """
    for name, batch in (("update", update), ("evaluation", evaluation)):
        if not isinstance(batch, Rollouts):
            raise ValueError(
                f"{name}: expected Rollouts, got {type(batch).__name__}; read a file with Rollouts.from_parquet"
            )
    given, evaluation = update.cpu(), evaluation.cpu()
    same = Contents.of(given).same_as(Contents.of(evaluation))
    update = admitted(policy, given, "update")
    batch = admit_evaluation(policy, evaluation, is_update=same)
    if same:
        policy.log.notes.append(SAME_BATCH())
    prompts = Clusters.prompts(update.prompt_ids)
    shares = prompts if policy.config.geometry == "frozen" or is_adam(policy.optimizer) else blocks_of(prompts)
    policy.check_ranks_agree(gradient, update=update, evaluation=batch.rollouts)
    local = LocalRows.of(update, shares, shares, policy.ranks)
    return UpdateBatch(given, update, prompts, shares, local, local.select(update)), batch


def admit_evaluation(policy: Policy, evaluation: Rollouts, *, is_update: bool = False) -> EvaluationBatch:
    """The evaluation batch as this run counts it."""
    evaluation = evaluation.cpu()
    grouped = in_groups(evaluation)
    evaluation = admitted(policy, evaluation, "batch" if is_update else "evaluation")
    grouped = grouped or in_groups(evaluation)
    answered = evaluation.response_mask.any(1)
    evaluation = evaluation if bool(answered.all()) else evaluation.select(answered)
    name, clusters, notes = evaluation_clusters(evaluation, policy.config.evaluation_unit, grouped=grouped)
    policy.log.notes += notes
    local = LocalRows.of(evaluation, Clusters.prompts(evaluation.prompt_ids), clusters, policy.ranks)
    return EvaluationBatch(evaluation, clusters, name, draws_of(evaluation), local, local.select(evaluation), is_update)
