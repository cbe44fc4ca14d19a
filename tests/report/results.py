"""Results to show, built from a few numbers."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

from rich.console import Console

from entropy_probe.report import Section, page, print_sections, run_sections
from entropy_probe.results.note import Note
from entropy_probe.results.probe import (
    BatchFit,
    CrossPrompt,
    Diagnostics,
    Estimate,
    OptimizerStateReport,
    PolicyFit,
    PreconditionerReport,
    Predicted,
    ProbeResult,
    Realized,
)

COMMON: dict[str, Any] = {"num_clusters": 256, "unit": "nats/token"}


def shown(sections: Iterable[Section], width: int = 80, terminal: bool = False) -> str:
    """What the console shows of sections."""
    stream = io.StringIO()
    print_sections(sections, Console(file=stream, width=width, force_terminal=terminal))
    return stream.getvalue()


def run_page(result: ProbeResult, *more: Any, name: str = "", **settings: Any) -> str:
    """The page of a run."""
    return page(run_sections(result, *more, **settings), name=name)


def make_result(
    predicted: tuple[float, float] | None = (-1.432e-3, 0.081e-3),
    realized: tuple[float, float] | None = (-1.38e-3, 0.08e-3),
    difference: tuple[float, float] | None = (0.052e-3, 0.03e-3),
    *,
    status: str = "ok",
    estimator: str = "per_decision",
    noise_floor: float | None = 2e-8,
    notes: tuple[Note, ...] = (),
    cross_prompt: CrossPrompt | None = None,
) -> ProbeResult:
    """A result from ``(value, standard error)`` pairs; a pair of None leaves that part out."""

    refused = status in ("low_ess", "high_pareto_k")

    def estimate(pair: tuple[float | None, float | None]) -> dict[str, Any]:
        return {"value": pair[0], "standard_error": pair[1], **COMMON}

    return ProbeResult(
        entropy=Estimate(value=0.8421, standard_error=0.0123, **COMMON),
        predicted=predicted and Predicted(**estimate(predicted), se_evaluation=6e-5, se_update=5.4e-5),
        components={
            "gradient": Estimate(**estimate((-0.52e-3, 0.03e-3))),
            "momentum": Estimate(**estimate((-0.912e-3, 0.06e-3))),
            "weight_decay": Estimate(**estimate((0.0, 0.0))),
        }
        if predicted
        else {},
        realized=realized
        and Realized(
            **(estimate((None, None) if refused else realized)),
            estimator=estimator,
            status=status,
            ess=5.1 if status == "low_ess" else 251.7,
            ess_fraction=(5.1 if status == "low_ess" else 251.7) / 256,
            max_weight=1.41,
            pareto_k=0.81 if status == "high_pareto_k" else 0.31,
            pareto_k_threshold=0.5848,
            noise_floor=noise_floor,
            step_rounding=1e-6,
        ),
        difference=Estimate(**estimate(difference)) if difference and predicted and realized and not refused else None,
        cross_prompt=cross_prompt,
        optimizer_state=OptimizerStateReport(
            num_parameters=16,
            num_elements=1234,
            coverage=1.0,
            mapping="rule",
            steps=(20, 20),
            scale_min=1.0,
            scale_max=10.0,
            learning_rates=(8e-7, 8e-7),
        ),
        diagnostics=Diagnostics(
            evaluation_unit="sequence",
            num_evaluation_sequences=256,
            num_update_sequences=32,
            num_update_prompts=8,
            gradient_norm=1.0,
            clip_factor=1.0,
            step_norm=0.1,
            prefix_sharing="on",
            head="chunked",
            per_sample_gradients="hooks",
            policy_fit=PolicyFit(
                evaluation=BatchFit(z=-0.42, excess=-0.0031, num_sequences=256),
                update=BatchFit(z=5.26, excess=0.041, num_sequences=32, status="off_policy"),
            ),
            notes=notes,
        ),
    )


def make_cross_prompt(
    delta_h1: float = -1.9e-3, se_plugin: float = 0.4e-3, se_jackknife: float = 0.45e-3
) -> CrossPrompt:
    """A one-batch prediction in blocks of two prompts."""
    return CrossPrompt(
        delta_h1=delta_h1,
        se_plugin=se_plugin,
        se_jackknife=se_jackknife,
        unit="nats/token",
        u_cross=-delta_h1 / 3e-4,
        zeta_plugin=1.0,
        zeta_jackknife=1.1,
        bars_dot=9.0,
        bars_dot_ratio=120.0,
        diagonal=3.0,
        row_means=(1.0, 2.0, 3.0),
        num_clusters=48,
        mode="block",
        block_size=2,
        learning_rate=3e-4,
        gradients="one pass, gradients of 48 units kept (1 MiB)",
        preconditioner=PreconditionerReport(
            coverage=1.0,
            bias_correction="own step",
            num_identity=0,
            identity_parameters=(),
            num_clamped=0,
            max_scale=200.0,
            min_denominator=0.005,
        ),
    )
