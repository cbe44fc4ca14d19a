"""What a checkpoint holds, as a table for the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from entropy_probe.report.numbers import format_number, format_percent
from entropy_probe.results import CheckpointReport, GroupReport, OptimizerStateReport

__all__ = ["print_checkpoint"]

STYLES = {"healthy": "bold green", "suspicious": "bold yellow", "unusable": "bold red"}


def print_checkpoint(report: CheckpointReport, console: Console) -> None:
    """Print parameter groups, what the optimizer state covers, the verdict and the reasons for it."""
    console.print(Text(f" {report.path}", "bold"), soft_wrap=True)
    facts = Table(box=None, show_header=False, padding=(0, 1))
    for label, value in _facts(report):
        facts.add_row(label, Text(value))
    console.print(facts)
    if report.groups:
        console.print(_groups(report.groups))
    console.print(Padding(Text.assemble("Verdict: ", (report.verdict, STYLES[report.verdict])), (1, 1, 0, 1)))
    for reason in report.reasons:
        console.print(Padding(Text(f"- {reason}"), (0, 1)))


def _facts(report: CheckpointReport) -> list[tuple[str, str]]:
    kind = "LoRA adapter" if report.kind == "lora" else "full weights"
    facts = [("weights", kind + (f" on {report.base_model}" if report.base_model else ""))]
    if report.global_step is not None:
        facts.append(("global step", str(report.global_step)))
    if report.optimizer is not None:
        facts.append(("optimizer", report.optimizer))
    if report.optimizer_state is not None:
        facts += _state_facts(report, report.optimizer_state)
    return facts


def _state_facts(report: CheckpointReport, state: OptimizerStateReport) -> list[tuple[str, str]]:
    low, high = state.steps
    scale = (
        "no usable second moment"
        if state.scale_min is None or state.scale_max is None
        else f"{format_number(state.scale_min)} to {format_number(state.scale_max)}"
    )
    total = state.num_parameters
    return [
        ("parameters", f"{total} tensors, {state.num_elements:,} elements"),
        ("mapping", state.mapping),
        (
            "exp_avg_sq",
            f"{report.num_with_exp_avg_sq} of {total} tensors, {format_percent(state.coverage)} of elements",
        ),
        ("zero exp_avg_sq", f"{report.num_zero_elements:,} elements"),
        (
            "step",
            f"{report.num_with_step} of {total} tensors, " + (f"all at {low}" if low == high else f"{low} to {high}"),
        ),
        ("Adam scale", scale),
    ]


def _groups(groups: tuple[GroupReport, ...]) -> Table:
    table = Table(box=None, padding=(0, 1), header_style="dim")
    for name in ("group", "tensors", "learning rate", "betas", "eps", "weight decay"):
        table.add_column(name, justify="right")
    for i, group in enumerate(groups):
        betas = ", ".join(f"{beta:g}" for beta in group.betas)
        rate, eps, decay = (f"{x:g}" for x in (group.learning_rate, group.eps, group.weight_decay))
        table.add_row(str(i), str(group.num_parameters), rate, betas, eps, decay)
    return table
