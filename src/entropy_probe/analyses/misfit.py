"""Rollouts that are not the policy's own, in words: what was found, the likely cause, what it does and what to do."""

from __future__ import annotations

from dataclasses import dataclass

from entropy_probe.analyses.admission import Role
from entropy_probe.estimators.policy_fit import MAX_Z, Fit
from entropy_probe.estimators.sampler import Mismatch
from entropy_probe.results.note import Note, NoteKind
from entropy_probe.results.probe import BatchFit

FOREIGN = 1.0
"""Nats per token above the entropy, beyond which ids are more likely another tokenizer's than another policy's."""
REWEIGHTED = NoteKind(
    "reweighted",
    "{said}; its sequences are reweighted, which leaves that share of them effective",
    "Read the errors, which the weights enlarge; sampling from this checkpoint has none.",
)
_MISFIT = "{said}; {consequence}"
LOGPROBS_AMISS = NoteKind(
    "logprobs_amiss",
    _MISFIT,
    "Record the log-probability that each token was drawn with (after temperature, per token), or leave them out.",
)
OTHER_TOKENIZER = NoteKind(
    "other_tokenizer",
    _MISFIT,
    "Tokenize prompts and responses with this checkpoint's tokenizer, or keep the sampler's own token ids.",
)
OTHER_TEMPERATURE = NoteKind(
    "other_temperature",
    _MISFIT,
    "Set probe.temperature to that of sampling if it is the trainer's too; else sample again.",
)
OFF_POLICY_UPDATE = NoteKind(
    "off_policy_update",
    _MISFIT,
    "If the trainer takes importance ratios to the policy that sampled, record its old_logprobs in the update batch.",
)
OFF_POLICY = NoteKind(
    "off_policy",
    _MISFIT,
    "Sample from this checkpoint at the training temperature without top_p or top_k, or let entropy-probe sample.",
)
OF_UPDATE_BATCH = NoteKind(
    "biased_as_update_batch",
    "results {how} biased by what is said of the update batch",
    "Read the prediction from two batches, or sample from this checkpoint.",
)
_AS_IT_IS = {k.code for k in (LOGPROBS_AMISS, OTHER_TOKENIZER, OTHER_TEMPERATURE, OFF_POLICY_UPDATE, OFF_POLICY)}
"""Notes on a batch that is not the policy's and counts as it is."""


@dataclass(frozen=True, eq=False)
class Misfit:
    """What a diagnosis is made from.

    Attributes:
        fit: of the tokens to the policy.
        strange: whether they are not the policy's, by chance or by selection.
        mismatch: the sampler's log-probabilities against the policy's; ``None`` without any.
        share: of the sequences that weights between them leave effective.
        differ: whether they are further apart than allowed.
        amiss: what went wrong in recording them, if that explains it.
        of_tokens: the temperature at which the tokens are likeliest, with its error.
        of_logprobs: the temperature at which the policy has the sampler's log-probabilities.
        corrected: whether the loss weights tokens by ratios to the sampler's log-probabilities.
        spread: root mean square of the distance per token, and what bfloat16 makes of it, where that was measured.
        adapter: how much of what the policy's adapter adds the sampler had, where that is not about 1.
    """

    fit: Fit
    strange: bool
    mismatch: Mismatch | None
    share: float
    differ: bool
    amiss: str | None = None
    of_tokens: tuple[float, float] | None = None
    of_logprobs: float | None = None
    corrected: bool = False
    spread: tuple[float, float] | None = None
    adapter: float | None = None

    @property
    def blame_logprobs(self) -> bool:
        """Whether the sampler's log-probabilities are wrong, whoever drew the tokens."""
        contradicted = self.mismatch is not None and self.mismatch.z > MAX_Z
        return self.differ and (self.amiss is not None or contradicted)

    @property
    def foreign(self) -> bool:
        """Whether the tokens look like those of another tokenizer."""
        return self.strange and self.fit.z >= 0 and self.fit.excess > FOREIGN

    @property
    def only_logprobs(self) -> bool:
        """Whether nothing is wrong but log-probabilities that nothing is computed from."""
        return self.blame_logprobs and not self.strange and not self.corrected

    @property
    def remedy(self) -> str:
        """What to do about a batch that is refused."""
        if self.blame_logprobs and not self.strange:
            return "record the log-probability that each token was drawn with, or leave them out"
        return "sample from the policy itself or set the temperature of sampling"

    def said(self, role: Role, temperature: float) -> str:
        """What was found and what it looks like, where the policy is taken at this temperature."""
        return f"{role}: {_diagnosis(self, temperature)}"

    def note(self, role: Role, said: str) -> Note:
        """The note on a batch that counts as it is; the likely cause decides on what to do."""
        if self.blame_logprobs:
            kind = LOGPROBS_AMISS
        elif self.foreign and not self.differ:
            kind = OTHER_TOKENIZER
        elif self.of_logprobs is not None and self.mismatch is not None and not self.mismatch.never_lower:
            kind = OTHER_TEMPERATURE
        else:
            kind = OFF_POLICY if role == "evaluation" else OFF_POLICY_UPDATE
        return kind(said=said, consequence=_consequence(role, self), **self._numbers)

    def reweighted(self, said: str) -> Note:
        """The note on a batch whose sequences are weighted to be the policy's."""
        return REWEIGHTED(said=said, **self._numbers)

    @property
    def _numbers(self) -> dict[str, float]:
        """Those of the diagnosis."""
        numbers: dict[str, float | None] = {"z": self.fit.z, "sequences": self.fit.num_sequences}
        if self.strange:
            numbers |= {"excess": self.fit.excess, "token_temperature": self.of_tokens and self.of_tokens[0]}
        if self.mismatch is not None and self.differ:
            numbers |= {"mean": self.mismatch.mean, "max": self.mismatch.max, "effective_share": self.share}
            numbers |= {"logprob_temperature": self.of_logprobs, "adapter_share": self.adapter}
        return {name: x for name, x in numbers.items() if x is not None}


def beside_two_batches(note: Note, fit: BatchFit | None) -> Note | None:
    """A note of a one-batch prediction beside those of two batches, where the update batch's says the same in full."""
    if note.code not in _AS_IT_IS or fit is None:
        return note
    if note.code == LOGPROBS_AMISS.code and fit.status != "off_policy":
        return None  # nothing is computed from them
    return OF_UPDATE_BATCH(how="may be" if fit.status == "ok" else "are")


def _diagnosis(misfit: Misfit, temperature: float) -> str:
    """What was found and what it looks like."""
    fit, symptoms = misfit.fit, []
    if misfit.strange:
        symptoms.append(
            f"the responses do not fit the policy: surprisal minus entropy is {fit.excess:+.3g} nats per token (z = "
            f"{fit.z:+.1f} over {fit.num_sequences} sequences, and 0 for the policy's own)"
        )
    if misfit.mismatch is not None and misfit.differ:
        symptoms.append(
            f"sampled_logprobs differ from the policy's by {misfit.mismatch.mean:.3g} nats per token on average, "
            f"{misfit.mismatch.max:.3g} at most ({_spread(misfit)}effective sample size of the weights between them "
            f"{misfit.share:.1%})"
        )
        if fit.holds:
            symptoms.append(f"the tokens fit the policy (z = {fit.z:+.1f})")
    return "; ".join((*symptoms, _cause(misfit, temperature)))


def _spread(misfit: Misfit) -> str:
    if misfit.spread is None:
        return ""
    return "root mean square {:.2g}, of which rounding to bfloat16 explains {:.2g}; ".format(*misfit.spread)


def _cause(misfit: Misfit, temperature: float) -> str:
    """The likely cause."""
    said = []
    if misfit.differ:
        said.append(_cause_of_logprobs(misfit, temperature))
    if misfit.strange and (not misfit.differ or misfit.blame_logprobs):
        said.append(_cause_of_tokens(misfit))
    return ", and ".join(said)


def _cause_of_logprobs(misfit: Misfit, temperature: float) -> str:
    assert misfit.mismatch is not None
    if misfit.amiss is not None:
        return f"the log-probabilities themselves are amiss: {misfit.amiss}"
    at = "" if misfit.adapter is None else _of_adapter(misfit.adapter)
    if misfit.of_logprobs is not None:
        at = f"the policy's at temperature {misfit.of_logprobs:.3g}, not {temperature:g}"
    if misfit.blame_logprobs:
        return "the log-probabilities themselves are amiss: " + (
            at or "the tokens are likelier under the policy, so they were not drawn with these"
        )
    if misfit.mismatch.never_lower:
        return (
            "no token is less likely under the sampler than under the policy, as where the batch was sampled from a "
            "part of the distribution (top_p, top_k or greedy)"
        )
    if misfit.of_logprobs is not None:
        return f"the log-probabilities are {at}: the batch was sampled at that temperature"
    if at:
        return f"the log-probabilities are {at}"
    return "the batch was sampled from another policy (other weights, such as an older policy's, or changed logits)"


def _of_adapter(share: float) -> str:
    """Whose they are, by how much of what the policy's adapter adds they have."""
    if abs(share) < 0.2:
        return "the base model's: the sampler had no adapter"
    return (
        f"those of the base model with {share:.1f} times what the adapter adds: the sampler had another adapter, such "
        "as an older one, or another lora_alpha"
    )


def _cause_of_tokens(misfit: Misfit) -> str:
    agree = misfit.mismatch is not None and not misfit.differ
    as_at = ""
    if misfit.of_tokens is not None:
        as_at = "; the tokens are likeliest at temperature {:.2f} ± {:.2f}".format(*misfit.of_tokens)
    if misfit.fit.z < 0:
        if agree:
            return (
                "sampled_logprobs agree with the policy's, so the sampler took a part of the distribution (top_p, "
                "top_k or greedy) after computing them" + as_at
            )
        return (
            "sampled at a lower temperature, with top_p, top_k or greedily, or by other weights of less entropy" + as_at
        )
    if misfit.foreign:
        return (
            "as far above the entropy as ids of another tokenizer would be, or responses to prompts that were changed"
        )
    if agree:
        return (
            "sampled_logprobs agree with the policy's, so they were not computed by the sampler, or it changed the "
            "logits after them" + as_at
        )
    return "sampled at a higher temperature, or by other weights, such as an older policy's" + as_at


def _consequence(role: Role, misfit: Misfit) -> str:
    if misfit.only_logprobs:
        return "nothing is computed from them, so results stand"
    biased = "so results are biased" if misfit.strange or not misfit.fit.holds else "so results may be biased"
    if role == "evaluation":
        return biased
    if role == "update" and misfit.foreign and (misfit.blame_logprobs or not misfit.differ):
        return "the step is taken on it as given"
    as_given = (
        "the step is taken on it as given; importance ratios of the trainer's loss are 1 here, since the batch has no "
        "old_logprobs"
    )
    if misfit.corrected:
        as_given = "the loss weights its tokens by ratios to sampled_logprobs"
    chosen = "; rollouts kept or dropped by reward do this as well (update_selected)" if misfit.strange else ""
    return (as_given if role == "update" else f"{biased}, and {as_given}") + chosen
