"""How far the numbers of a run can be trusted, and what the optimizer's state covers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from entropy_probe.report.numbers import format_number, format_percent
from entropy_probe.report.sections.base import Row, Rows, Section, State, Verbatim
from entropy_probe.report.wording import HARMLESS_ESS
from entropy_probe.results.probe import Draws, GradientAgreement, OptimizerStateReport, ProbeResult, Realized

NOTABLE_ROUNDING = 0.01
NOTABLE_DISTANCE = 0.05
SMALLER = "Probe a smaller learning rate, or set probe.on_low_ess to resample."
CHECKS = {  # what each means, and what to do where it is not as it should be
    "ESS": (
        "Effective sample size: what the evaluation rollouts are worth after the step. Below {} the change is not "
        "taken from them.",
        SMALLER,
    ),
    "Pareto k": (
        "How heavy the tail of the importance weights is; judged where the effective sample size is below {}.",
        SMALLER,
    ),
    "noise floor": (
        "What rounding alone does to the realized change.",
        "Set probe.dtype to float64, switch autocast off, or probe a larger learning rate.",
    ),
    "step rounding": (
        "Length of what the parameters' precision adds to the step, relative to the step's.",
        "Set probe.dtype to float64 to separate rounding from the step.",
    ),
    "measured on": ("The step is fitted to these responses: biased.", "Give or sample a separate evaluation batch."),
    "policy fit": (
        "Surprisal minus entropy over {} sequences: has mean 0, and z is within ±4, where the tokens are the policy's "
        "own.",
        "Sample from this checkpoint at the training temperature, without top_p or top_k.",
    ),
    "sampler": (
        "How far the log-probabilities that the sampler recorded are from the policy's, in nats/token; 0 up to "
        "rounding.",
        "See the notes for what they look like.",
    ),
    "draws per prompt": (
        "Responses to a prompt have it in common; the design effect is the variance over that of as many single draws.",
        "",
    ),
    "gradients": (
        "How far the gradient of the update batch is from the one that the step is of, relative to that one's length.",
        "See the notes for what the loss may leave out.",
    ),
    "clipping": (
        "What clipping multiplies the update gradient by; 1 when it does not act.",
        "Compare with probe.max_grad_norm: null to see what clipping does.",
    ),
    "step length": ("Euclidean norm of the parameter change.", ""),
    "optimizer": ("Whose step is predicted.", ""),
    "parameters": ("What the optimizer steps.", ""),
    "mapping": ("How each entry of the state was matched to its parameter.", ""),
    "coverage": (
        "Elements with a usable second moment: present, finite, not all zero.",
        "Normal for lora_A after the first step and for parts that were never trained; else run entropy-probe inspect "
        "on the checkpoint.",
    ),
    "step count": (
        "Optimizer steps that the moments are worth.",
        "Make sure that the late starters were unfrozen on purpose.",
    ),
    "Adam scale": ("Range of 1/(√v̂ + ε): what a gradient is multiplied by.", ""),
}


def _check(label: str, value: str, note: str = "", state: State = "ok", *, batch: str = "", limit: Any = "") -> Row:
    meaning, advice = CHECKS[label]
    name = f"{label}, {batch}" if batch else label
    todo = "" if state == "ok" else advice
    return Row(name, value, note, state=state, meaning=meaning.format(limit), advice=todo)


def diagnostics_section(result: ProbeResult) -> Section:
    """The checks, one row each, and how the numbers were computed."""
    diagnostics = result.diagnostics
    weights = () if result.realized is None else _weight_rows(result.realized, result.config)
    norm, clipped = f"norm of the gradient {format_number(diagnostics.gradient_norm)}", diagnostics.clip_factor < 1
    clipping = _check("clipping", f"×{format_number(diagnostics.clip_factor)}", norm, "plain" if clipped else "ok")
    num_update, num_evaluation = diagnostics.num_update_sequences, diagnostics.num_evaluation_sequences
    length = _check("step length", format_number(diagnostics.step_norm), state="plain")
    batch = f"{num_update} sequences of {diagnostics.num_update_prompts} prompts"
    how = [
        Row("evaluation batch", f"{num_evaluation} sequences; unit of error: {diagnostics.evaluation_unit}"),
        Row("update batch", "none: the step is of a gradient from outside" if num_update is None else batch),
        Row("output layer", Verbatim(diagnostics.head)),
        Row("shared prompts", Verbatim(diagnostics.prefix_sharing)),
        Row("per-sample gradients", Verbatim(diagnostics.per_sample_gradients)),
    ]
    if (frozen := result.preconditioner) is not None:
        how.append(Row("frozen geometry", f"bias correction: {frozen.bias_correction}; {frozen.num_clamped} clamped"))
    rows = (
        *weights,
        *_draws_rows(result.draws),
        *_fit_rows(result),
        *_agreement_rows(diagnostics.gradient_agreement),
        clipping,
        length,
    )
    checks = Rows(rows, title="Checks")
    computed = Rows(tuple(how), title="How the numbers were computed", page_only=True)
    return Section("Diagnostics", "diagnostics", "Diagnostics", blocks=(checks, computed), notes=diagnostics.notes,
                   not_modelled=diagnostics.not_modelled)  # fmt: skip


def _draws_rows(draws: Draws | None) -> Iterator[Row]:
    """What several draws per prompt have in common."""
    if draws is not None:
        share, effect = format_percent(draws.between_share), format_number(draws.design_effect, 3)
        note = f"of {draws.num_prompts} prompts; share of the variance between prompts {share}, design effect {effect}"
        yield _check("draws per prompt", f"{draws.per_prompt:.3g}", note, "plain")


def _fit_rows(result: ProbeResult) -> Iterator[Row]:
    """Whether the batches may be the policy's own, by their tokens and by the sampler's log-probabilities."""
    diagnostics, allowed = result.diagnostics, result.config.get("max_mismatch")
    fits = (diagnostics.policy_fit.evaluation, diagnostics.policy_fit.update)
    mismatches = (diagnostics.mismatch, diagnostics.update_mismatch)
    batches = ("evaluation", "update") if fits[0] != fits[1] or fits[0] is None else ("both batches",)
    for batch, fit, mismatch in zip(batches, fits, mismatches, strict=False):
        if fit is not None:
            note = f"surprisal − entropy {format_number(fit.excess, 2)} nats/token"
            note += ", not judged" if fit.status == "selected" else ""
            state = "look" if fit.status == "off_policy" else "ok"
            yield _check("policy fit", f"z {fit.z:+.1f}", note, state, batch=batch, limit=fit.num_sequences)
        if mismatch is not None:
            note = f"|Δ log π|, at most {format_number(mismatch.max, 2)}; ESS {format_percent(mismatch.ess_fraction)}"
            said = any(note.numbers.get("mean") == mismatch.mean for note in diagnostics.notes)
            state = "look" if said or (allowed is not None and mismatch.mean > allowed) else "ok"
            yield _check("sampler", format_number(mismatch.mean, 2), note, state, batch=batch)


def _agreement_rows(agreement: GradientAgreement | None) -> Iterator[Row]:
    """Whether the update rollouts' gradient is the one that the step was given."""
    if agreement is None or agreement.relative_distance is None:
        return
    cosine = "" if agreement.cosine is None else f"cosine {agreement.cosine:.4f}"
    state = "look" if agreement.relative_distance > NOTABLE_DISTANCE else "ok"
    yield _check("gradients", format_percent(agreement.relative_distance), cosine, state)


def _weight_rows(realized: Realized, config: dict[str, Any]) -> Iterator[Row]:
    """Whether the realized change may be taken from the importance weights."""

    def state(refused: str) -> State:
        return "bad" if realized.status == refused else "ok"

    size, harmless = f"{realized.ess:.1f} sequences", f"{HARMLESS_ESS:.0%}"
    note = f"{size}; largest weight {format_number(realized.max_weight)}"
    least = format_percent(config.get("min_ess_fraction", 0.5))
    yield _check("ESS", format_percent(realized.ess_fraction), note, state("low_ess"), limit=least)
    if (k := realized.pareto_k) is not None:
        bound = f"at most {format_number(realized.pareto_k_threshold, 2)}"
        if k > realized.pareto_k_threshold and realized.ess_fraction >= HARMLESS_ESS:
            bound = f"judged below {harmless} ESS"
        note = f"tail of the weights; {bound}"
        yield _check("Pareto k", format_number(k, 2), note, state("high_pareto_k"), limit=harmless)
    if (floor := realized.noise_floor) is not None:
        note = f"{realized.unit}, by rounding"
        yield _check("noise floor", format_number(floor, 2), note, state("below_noise_floor"))
    share = realized.step_rounding
    high = share > NOTABLE_ROUNDING
    text = format_percent(share) if high else format_number(share, 2)
    yield _check("step rounding", text, "of the step's length", "look" if high else "ok")
    if realized.batch == "update":
        yield _check("measured on", "the update batch", state="look")


def optimizer_section(state: OptimizerStateReport) -> Section:
    """Whether the optimizer's state is complete and of one training run."""
    low, high = state.steps
    size = f"{state.num_parameters:,} tensors, {state.num_elements:,} elements"
    covered = f"{format_percent(state.coverage)} of the elements"
    rows = [
        _check("optimizer", Verbatim(state.optimizer or "Adam or AdamW"), state="plain"),
        _check("parameters", size, state="plain"),
        _check("mapping", Verbatim(state.mapping)),
        _check("coverage", covered, state="look" if state.coverage < 1 else "ok"),
        _check("step count", str(low) if low == high else f"{low} to {high}", state="ok" if low == high else "look"),
    ]
    if state.scale_min is not None and state.scale_max is not None:
        scale = f"{format_number(state.scale_min)} to {format_number(state.scale_max)}"
        rows.append(_check("Adam scale", scale, state="plain"))
    return Section("Optimizer state", "optimizer", "Optimizer", blocks=(Rows(tuple(rows)),), page_only=True)
