"""How far the numbers of a run can be trusted, and what the optimizer's state covers."""

from __future__ import annotations

from typing import Any

from entropy_probe.report.numbers import format_number, format_percent
from entropy_probe.report.sections.base import Row, Rows, Section, Verbatim
from entropy_probe.report.wording import HARMLESS_ESS
from entropy_probe.results.probe import OptimizerStateReport, ProbeResult, Realized

__all__ = ["diagnostics_section", "optimizer_section"]

NOTABLE_ROUNDING = 0.01


def diagnostics_section(result: ProbeResult) -> Section:
    """The checks, one row each, and how the numbers were computed."""
    diagnostics = result.diagnostics
    weights = () if result.realized is None else _weight_rows(result.realized, result.config)
    clipped = diagnostics.clip_factor < 1
    clipping = Row(
        "clipping",
        f"×{format_number(diagnostics.clip_factor)}",
        f"norm of the gradient {format_number(diagnostics.gradient_norm)}",
        state="plain" if clipped else "ok",
        meaning="What clipping multiplies the update gradient by; 1 when it does not act.",
        advice="Compare with probe.max_grad_norm: null to see what clipping does." if clipped else "",
    )
    length = format_number(diagnostics.step_norm)
    step = Row("step length", length, meaning="Euclidean norm of the parameter change.")
    return Section(
        title="Diagnostics",
        key="diagnostics",
        short="Diagnostics",
        blocks=(
            Rows((*weights, *_fit_rows(result), clipping, step), title="Checks"),
            Rows(_how_computed(result), title="How the numbers were computed", page_only=True),
        ),
        notes=diagnostics.notes,
        not_modelled=diagnostics.not_modelled,
    )


def _fit_rows(result: ProbeResult) -> list[Row]:
    """Whether the batches may be the policy's own, by their tokens and by the sampler's log-probabilities."""
    found, diagnostics, allowed = [], result.diagnostics, result.config.get("max_mismatch")
    fits = (diagnostics.policy_fit.evaluation, diagnostics.policy_fit.update)
    mismatches = (diagnostics.mismatch, diagnostics.update_mismatch)
    batches = ("evaluation", "update") if fits[0] != fits[1] or fits[0] is None else ("both batches",)
    for batch, fit, mismatch in zip(batches, fits, mismatches, strict=False):
        if fit is not None:
            off, selected = fit.status == "off_policy", fit.status == "selected"
            meaning = (
                f"Surprisal minus entropy over {fit.num_sequences} sequences: has mean 0, and z is within ±4, where "
                "the tokens are the policy's own."
            )
            meaning += " Not judged: its responses were selected." if selected else ""
            advice = "Sample from this checkpoint at the training temperature, without top_p or top_k." if off else ""
            note = f"surprisal − entropy {format_number(fit.excess, 2)} nats/token{', selected' if selected else ''}"
            state = "look" if off else "ok"
            found.append(Row(f"policy fit, {batch}", f"z {fit.z:+.1f}", note, "", state=state, meaning=meaning,
                             advice=advice))  # fmt: skip
        if mismatch is not None:
            high = allowed is not None and mismatch.mean > allowed
            found.append(
                Row(
                    f"sampler, {batch}",
                    format_number(mismatch.mean, 2),
                    f"|Δ log π|, at most {format_number(mismatch.max, 2)}; ESS {format_percent(mismatch.ess_fraction)}",
                    state="look" if high else "ok",
                    meaning="How far the log-probabilities that the sampler recorded are from the policy's, in "
                    "nats/token; 0 up to rounding.",
                    advice="See the notes for what they look like." if high else "",
                )
            )
    return found


def _weight_rows(realized: Realized, config: dict[str, Any]) -> list[Row]:
    refused, smaller = realized.status, "Probe a smaller learning rate, or set probe.on_low_ess to resample."
    found = [
        Row(
            "ESS",
            format_percent(realized.ess_fraction),
            f"{realized.ess:.1f} sequences; largest weight {format_number(realized.max_weight)}",
            state="bad" if refused == "low_ess" else "ok",
            meaning="Effective sample size: what the evaluation rollouts are worth after the step. Below "
            f"{format_percent(config.get('min_ess_fraction', 0.5))} the change is not taken from them.",
            advice=smaller if refused == "low_ess" else "",
        )
    ]
    if realized.pareto_k is not None:
        heavy = realized.pareto_k > realized.pareto_k_threshold
        harmless = heavy and realized.ess_fraction >= HARMLESS_ESS
        allowed = format_number(realized.pareto_k_threshold, 2)
        found.append(
            Row(
                "Pareto k",
                format_number(realized.pareto_k, 2),
                "tail of the weights; "
                + (f"judged below {HARMLESS_ESS:.0%} ESS" if harmless else f"at most {allowed}"),
                state="bad" if refused == "high_pareto_k" else "ok",
                meaning="How heavy the tail of the importance weights is; judged where the effective sample size is "
                f"below {HARMLESS_ESS:.0%}.",
                advice=smaller if refused == "high_pareto_k" else "",
            )
        )
    if realized.noise_floor is not None:
        below = refused == "below_noise_floor"
        found.append(
            Row(
                "noise floor",
                format_number(realized.noise_floor, 2),
                f"{realized.unit}, by rounding",
                state="bad" if below else "ok",
                meaning="What rounding alone does to the realized change.",
                advice="Set probe.dtype to float64, switch autocast off, or probe a larger learning rate."
                if below
                else "",
            )
        )
    found.append(_rounding_row(realized.step_rounding))
    if realized.batch == "update":
        found.append(
            Row("measured on", "the update batch", state="look", meaning="The step is fitted to these responses: "
                "biased.", advice="Give or sample a separate evaluation batch.")
        )  # fmt: skip
    return found


def _rounding_row(share: float) -> Row:
    high = share > NOTABLE_ROUNDING
    return Row(
        "step rounding",
        format_percent(share) if high else format_number(share, 2),
        "of the step's length",
        state="look" if high else "ok",
        meaning="Length of what the parameters' precision adds to the step, relative to the step's.",
        advice="Set probe.dtype to float64 to separate rounding from the step." if high else "",
    )


def _how_computed(result: ProbeResult) -> tuple[Row, ...]:
    found = result.diagnostics
    rows = [
        Row("evaluation batch", f"{found.num_evaluation_sequences} sequences; unit of error: {found.evaluation_unit}"),
        Row("update batch", f"{found.num_update_sequences} sequences of {found.num_update_prompts} prompts"),
        Row("output layer", Verbatim(found.head)),
        Row("shared prompts", Verbatim(found.prefix_sharing)),
        Row("per-sample gradients", Verbatim(found.per_sample_gradients)),
    ]
    if (frozen := result.preconditioner) is not None:
        rows.append(Row("frozen geometry", f"bias correction: {frozen.bias_correction}; {frozen.num_clamped} clamped"))
    return tuple(rows)


def optimizer_section(state: OptimizerStateReport) -> Section:
    """Whether the optimizer's state is complete and of one training run."""
    low, high = state.steps
    partial, late = state.coverage < 1, low != high
    rows = [
        Row("optimizer", Verbatim(state.optimizer or "Adam or AdamW"), meaning="Whose step is predicted."),
        Row("parameters", f"{state.num_parameters:,} tensors, {state.num_elements:,} elements",
            meaning="What the optimizer steps."),
        Row("mapping", Verbatim(state.mapping), state="ok",
            meaning="How each entry of the state was matched to its parameter."),
        Row(
            "coverage",
            f"{format_percent(state.coverage)} of the elements",
            state="look" if partial else "ok",
            meaning="Elements with a usable second moment: present, finite, not all zero.",
            advice="Normal for lora_A after the first step and for parts that were never trained; else run "
            "entropy-probe inspect on the checkpoint."
            if partial
            else "",
        ),
        Row(
            "step count",
            f"{low} to {high}" if late else str(low),
            state="look" if late else "ok",
            meaning="Optimizer steps that the moments are worth.",
            advice="Make sure that the late starters were unfrozen on purpose." if late else "",
        ),
    ]  # fmt: skip
    if state.scale_min is not None and state.scale_max is not None:
        rows.append(
            Row("Adam scale", f"{format_number(state.scale_min)} to {format_number(state.scale_max)}",
                meaning="Range of 1/(√v̂ + ε): what a gradient is multiplied by.")
        )  # fmt: skip
    return Section("Optimizer state", "optimizer", "Optimizer", blocks=(Rows(tuple(rows)),), page_only=True)
