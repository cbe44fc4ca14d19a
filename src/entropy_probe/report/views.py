"""What the page says of a result, as rows for its template."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from entropy_probe.report.charts import Bar, BarChart, bar_chart
from entropy_probe.report.numbers import format_estimate, format_number, format_percent, typeset
from entropy_probe.report.wording import ESTIMATORS, HARMLESS_ESS, UNITS, column_exponent
from entropy_probe.results.probe import Estimate, OptimizerStateReport, ProbeResult, Realized

__all__ = [
    "Card", "Check", "cards", "caveats", "changes", "checks", "comparison", "component_names", "how_computed",
    "optimizer_checks", "story", "waterfall",
]  # fmt: skip

State = Literal["ok", "look", "bad", "plain"]
NOTABLE_ROUNDING = 0.01


@dataclass(frozen=True)
class Card:
    """A number of the headline."""

    label: str
    value: str
    note: str


@dataclass(frozen=True)
class Check:
    """A diagnostic: its value, how it stands, what it means, and what to do about it."""

    name: str
    value: str
    state: State
    meaning: str
    advice: str = ""


def story(result: ProbeResult) -> str:
    """The finding in a sentence or two: how much, which part of the entropy, and which part of the step."""
    predicted = result.predicted
    if predicted is None:
        return ""
    way = "lower" if predicted.value < 0 else "raise"
    size = typeset(format_number(abs(predicted.value)))
    sentence = f"To first order the step will {way} entropy by {size} {predicted.unit}"
    if result.entropy.value > 0:
        sentence += f", {format_percent(abs(predicted.value) / result.entropy.value)} of what it is"
    parts = {name: part.value for name, part in result.components.items() if part.value}
    if len(parts) < 2:
        return f"{sentence}."
    largest = max(parts, key=lambda name: abs(parts[name]))
    if all(value * predicted.value > 0 for value in parts.values()):
        share = format_percent(parts[largest] / predicted.value, 0)
        return f"{sentence}; {share} of that comes from {_SOURCES[largest]}."
    against = [_SOURCES[name] for name, value in parts.items() if value * predicted.value < 0]
    return f"{sentence}; {' and '.join(against)} work{'s' * (len(against) == 1)} against it."


def caveats(result: ProbeResult) -> list[str]:
    """What a reader of the headline must know: rollouts that are not the policy's, parts that are not modelled."""
    found, diagnostics = [], result.diagnostics
    fit = diagnostics.policy_fit
    if fit.evaluation is not None and fit.evaluation.status == "off_policy":
        found.append("The evaluation rollouts do not fit the policy, so the numbers are biased.")
    if fit.update is not None and fit.update.status == "off_policy":
        found.append("The update rollouts do not fit the policy; the step is taken on them as given.")
    if count := len(diagnostics.not_modelled):
        parts = "One part of the trainer's step is" if count == 1 else f"{count} parts of the trainer's step are"
        found.append(f"{parts} not in these numbers.")
    return found


def cards(result: ProbeResult) -> list[Card]:
    """The numbers of the headline, each with its error."""
    found = []
    exponent = column_exponent(result)
    if (predicted := result.predicted) is not None:
        parts = (typeset(format_number(error, 2)) for error in (predicted.se_evaluation, predicted.se_update))
        how = " (jackknife)" if predicted.se_update_method == "jackknife" else ""
        note = "error from evaluation rollouts {}, from update rollouts {}".format(*parts) + how
        found.append(Card("Predicted δH₁", _written(predicted, exponent), note))
    if (realized := result.realized) is not None:
        estimate = realized.estimate
        value = "refused" if estimate is None else _written(estimate, exponent)
        how = "on the update batch: biased" if realized.batch == "update" else ESTIMATORS[realized.estimator]
        found.append(Card("Realized ΔH", value, how))
    if (cross := result.cross_prompt) is not None:
        error = max(cross.se_plugin, cross.se_jackknife)
        value = typeset(format_estimate(cross.delta_h1, error, exponent))
        found.append(Card("One batch δH₁", value, f"from {cross.num_units} units of the update batch, frozen geometry"))
    units = UNITS[result.diagnostics.evaluation_unit]
    found.append(Card("Entropy H(θ)", _written(result.entropy), f"{result.entropy.num_units} {units}"))
    return found


def changes(result: ProbeResult) -> BarChart | None:
    """Predicted against realized, as points with their errors."""
    exponent = column_exponent(result)
    rows = []
    if (predicted := result.predicted) is not None:
        rows.append(_dot("Predicted δH₁", predicted, exponent))
    if result.realized is not None and result.realized.estimate is not None:
        rows.append(_dot("Realized ΔH", result.realized.estimate, exponent))
    if (cross := result.cross_prompt) is not None:
        rows.append(_dot("One batch δH₁", cross.estimate, exponent))
    return bar_chart(rows, result.entropy.unit)


def comparison(result: ProbeResult) -> str:
    """How the realized change compares with the prediction, in numbers; "" unless both are there."""
    realized, predicted = result.realized and result.realized.estimate, result.predicted
    if result.difference is None or realized is None or predicted is None:
        return ""
    difference = f"Paired difference ΔH − δH₁ = {_written(result.difference, column_exponent(result))}"
    ratio = f"; ratio ΔH/δH₁ = {typeset(format_number(realized.value / predicted.value))}" if predicted.value else ""
    return f"{difference}{ratio}. The two share most of their sampling noise, so it is sharper than either."


def waterfall(result: ProbeResult) -> BarChart | None:
    """The parts of the step one after the other, their sum, and what the realized change adds to it."""
    predicted, exponent = result.predicted, column_exponent(result)
    if predicted is None or not result.components:
        return None
    rows, start = [], 0.0
    for name, part in result.components.items():
        text = _written(part, exponent)
        label = component_names[name]
        rows.append(Bar(label, part.value, text, part.margin, start, linked=bool(rows)))
        start += part.value
    text = _written(predicted, exponent)
    rows.append(Bar("Predicted δH₁", predicted.value, text, predicted.margin, look="total"))
    realized = result.realized and result.realized.estimate
    if result.difference is not None and realized is not None:
        text = _written(result.difference, exponent)
        rows.append(
            Bar("Beyond first order", result.difference.value, text, result.difference.margin, predicted.value,
                linked=True)
        )  # fmt: skip
        rows.append(Bar("Realized ΔH", realized.value, _written(realized, exponent), realized.margin, look="total"))
    return bar_chart(rows, predicted.unit)


def checks(result: ProbeResult) -> list[Check]:
    """How far the numbers can be trusted, one row each."""
    found = []
    if result.realized is not None:
        found += _weight_checks(result.realized, result.config)
    found += _fit_checks(result)
    diagnostics = result.diagnostics
    clipped = diagnostics.clip_factor < 1
    found.append(
        Check(
            "Gradient clipping",
            f"×{format_number(diagnostics.clip_factor)}, norm {typeset(format_number(diagnostics.gradient_norm))}",
            "plain" if clipped else "ok",
            "What clipping multiplies the update gradient by; 1 when it does not act.",
            "Compare with probe.max_grad_norm: null to see what clipping does." if clipped else "",
        )
    )
    found.append(
        Check(
            "Step length",
            typeset(format_number(diagnostics.step_norm)),
            "plain",
            "Euclidean norm of the parameter change.",
        )
    )
    return found


def _fit_checks(result: ProbeResult) -> list[Check]:
    """Whether the batches may be the policy's own, by their tokens and by the sampler's log-probabilities."""
    found, diagnostics, allowed = [], result.diagnostics, result.config.get("max_mismatch")
    fits = (diagnostics.policy_fit.evaluation, diagnostics.policy_fit.update)
    mismatches = (diagnostics.mismatch, diagnostics.update_mismatch)
    batches = ("evaluation", "update") if fits[0] != fits[1] or fits[0] is None else ("both batches",)
    for batch, fit, mismatch in zip(batches, fits, mismatches, strict=False):
        if fit is not None:
            off = fit.status == "off_policy"
            value = f"z {fit.z:+.1f}; {typeset(format_number(fit.excess, 2))} nats/token".replace("-", "−")
            meaning = (
                f"Surprisal minus entropy over {fit.num_sequences} sequences: has mean 0, and z is within ±4, where "
                "the tokens are the policy's own."
            )
            if fit.status == "selected":
                meaning += " Not judged: its responses were selected."
            advice = "Sample from this checkpoint at the training temperature, without top_p or top_k." if off else ""
            found.append(Check(f"Policy fit, {batch}", value, "look" if off else "ok", meaning, advice))
        if mismatch is not None:
            high = allowed is not None and mismatch.mean > allowed
            found.append(
                Check(
                    f"Sampler, {batch}",
                    f"{typeset(format_number(mismatch.mean, 2))} nats/token, at most "
                    f"{typeset(format_number(mismatch.max, 2))}; ESS {format_percent(mismatch.ess_fraction)}",
                    "look" if high else "ok",
                    "How far the log-probabilities that the sampler recorded are from the policy's; 0 up to rounding.",
                    "See the notes for what they look like." if high else "",
                )
            )
    return found


def _weight_checks(realized: Realized, config: dict[str, Any]) -> list[Check]:
    refused, smaller = realized.status, "Probe a smaller learning rate, or set probe.on_low_ess to resample."
    found = [
        Check(
            "Effective sample size",
            f"{format_percent(realized.ess_fraction)}, {realized.ess:.1f} sequences",
            "bad" if refused == "low_ess" else "ok",
            "What the evaluation rollouts are worth after the step. Below "
            f"{format_percent(config.get('min_ess_fraction', 0.5))} the change is not taken from them.",
            smaller if refused == "low_ess" else "",
        )
    ]
    if realized.pareto_k is not None:
        allowed = format_number(realized.pareto_k_threshold, 2)
        heavy = refused == "high_pareto_k"
        found.append(
            Check(
                "Pareto k",
                f"{format_number(realized.pareto_k, 2)}, at most {allowed}",
                "bad" if heavy else "ok",
                "How heavy the tail of the importance weights is; judged where the effective sample size is below "
                f"{HARMLESS_ESS:.0%}.",
                smaller if heavy else "",
            )
        )
    if realized.noise_floor is not None:
        below = refused == "below_noise_floor"
        found.append(
            Check(
                "Noise floor",
                f"{typeset(format_number(realized.noise_floor, 2))} {realized.unit}",
                "bad" if below else "ok",
                "What rounding alone does to the realized change.",
                "Set probe.dtype to float64, switch autocast off, or probe a larger learning rate." if below else "",
            )
        )
    rounded = realized.step_rounding > NOTABLE_ROUNDING
    found.append(
        Check(
            "Rounding of the step",
            format_percent(realized.step_rounding) if rounded else typeset(format_number(realized.step_rounding, 2)),
            "look" if rounded else "ok",
            "Length of what the parameters' precision adds to the step, relative to the step's.",
            "Set probe.dtype to float64 to separate rounding from the step." if rounded else "",
        )
    )
    if realized.batch == "update":
        found.append(
            Check("Measured on", "the update batch", "look", "The step is fitted to these responses: biased.",
                  "Give or sample a separate evaluation batch.")
        )  # fmt: skip
    return found


def optimizer_checks(state: OptimizerStateReport) -> list[Check]:
    """Whether the optimizer's state is complete and of one training run."""
    low, high = state.steps
    partial = state.coverage < 1
    found = [
        Check("Optimizer", state.optimizer or "Adam or AdamW", "plain", "Whose step is predicted."),
        Check(
            "Parameters",
            f"{state.num_parameters:,} tensors, {state.num_elements:,} elements",
            "plain",
            "What the optimizer steps.",
        ),
        Check("Mapping", state.mapping, "ok", "How each entry of the state was matched to its parameter."),
        Check(
            "Coverage",
            f"{format_percent(state.coverage)} of the elements",
            "look" if partial else "ok",
            "Elements with a usable second moment: present, finite, not all zero.",
            "Normal for lora_A after the first step and for parts that were never trained; else run "
            "entropy-probe inspect on the checkpoint."
            if partial
            else "",
        ),
        Check(
            "Step count",
            str(low) if low == high else f"{low} to {high}",
            "ok" if low == high else "look",
            "Optimizer steps that the moments are worth.",
            "" if low == high else "Make sure that the late starters were unfrozen on purpose.",
        ),
    ]
    if state.scale_min is not None and state.scale_max is not None:
        scales = (typeset(format_number(scale)) for scale in (state.scale_min, state.scale_max))
        found.append(
            Check("Adam scale", " to ".join(scales), "plain", "Range of 1/(√v̂ + ε): what a gradient is multiplied by.")
        )
    return found


def how_computed(result: ProbeResult) -> list[tuple[str, str]]:
    """The ways the numbers were computed, for a careful reader."""
    found = result.diagnostics
    rows = [
        ("Evaluation batch", f"{found.num_evaluation_sequences} sequences; unit of error: {found.evaluation_unit}"),
        ("Update batch", f"{found.num_update_sequences} sequences of {found.num_update_prompts} prompts"),
        ("Output layer", found.head),
        ("Shared prompts", found.prefix_sharing),
        ("Gradients of each unit", found.per_unit_gradients),
    ]
    if (frozen := result.preconditioner) is not None:
        rows.append(("Frozen geometry", f"bias correction: {frozen.bias_correction}; {frozen.num_clamped} clamped"))
    return rows


component_names = {"gradient": "Gradient", "momentum": "Momentum", "weight_decay": "Weight decay"}
_SOURCES = {"gradient": "this batch's gradient", "momentum": "momentum", "weight_decay": "weight decay"}


def _dot(label: str, estimate: Estimate, exponent: int | None) -> Bar:
    return Bar(label, estimate.value, _written(estimate, exponent), estimate.margin, look="dot")


def _written(estimate: Estimate, exponent: int | None = None) -> str:
    return typeset(format_estimate(estimate.value, estimate.standard_error, exponent))
