"""What a checkpoint holds, as a table for the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from entropy_probe.report.numbers import format_number, format_percent
from entropy_probe.report.terminal import print_not_modelled
from entropy_probe.report.text import printable
from entropy_probe.results.checkpoint import CheckpointReport, GroupReport, MovementReport
from entropy_probe.results.probe import OptimizerStateReport

__all__ = ["print_checkpoint"]

MANIFESTS = {"training": "during training", "inspection": "by inspection, after training"}
STYLES = {"healthy": "bold green", "suspicious": "bold yellow", "unusable": "bold red"}


def print_checkpoint(report: CheckpointReport, console: Console) -> None:
    """Print parameter groups, what the optimizer state covers, the verdict and the notes that it comes from."""
    console.print(Text(printable(f" {report.path}"), "bold"), soft_wrap=True)
    facts = Table(box=None, show_header=False, padding=(0, 1))
    for label, value in _facts(report):
        facts.add_row(label, Text(printable(value)))
    console.print(facts)
    if report.groups:
        console.print(_groups(report.groups))
    console.print(Padding(Text.assemble("Verdict: ", (report.verdict, STYLES[report.verdict])), (1, 1, 0, 1)))
    for note in report.notes:
        console.print(Padding(Text(printable(f"- {note.text}")), (0, 1)))
        if report.verdict != "unusable":  # whose reason says what to do
            console.print(Padding(Text(printable(note.remedy), style="dim"), (0, 1, 0, 3)))
    print_not_modelled(report.not_modelled, console)


def _facts(report: CheckpointReport) -> list[tuple[str, str]]:
    kind = "LoRA adapter" if report.kind == "lora" else "full weights"
    facts = [("weights", kind + (f" on {report.base_model}" if report.base_model else ""))]
    if report.global_step is not None:
        facts.append(("global step", str(report.global_step)))
    if report.optimizer is not None:
        facts.append(("optimizer", report.optimizer))
    if report.optimizer_state is not None:
        facts += _state_facts(report, report.optimizer_state)
    if report.movement is not None:
        facts.append(("movement", _movement(report.movement)))
    if report.movement_not_checked is not None:
        facts.append(("movement", f"not checked: {report.movement_not_checked}"))
    if report.manifest is not None:
        facts.append(("manifest", f"recorded {MANIFESTS[report.manifest]}; hashes agree"))
    return facts


def _state_facts(report: CheckpointReport, state: OptimizerStateReport) -> list[tuple[str, str]]:
    low, high = state.steps
    scale = (
        "no usable second moment"
        if state.scale_min is None or state.scale_max is None
        else f"{format_number(state.scale_min)} to {format_number(state.scale_max)}"
    )
    total = state.num_parameters
    parameters = [("parameters", f"{total} tensors, {state.num_elements:,} elements"), ("mapping", state.mapping)]
    steps = (
        "step",
        f"{report.num_with_step} of {total} tensors, " + (f"all at {low}" if low == high else f"{low} to {high}"),
    )
    if state.optimizer is not None:
        kept = ("state", f"covers {format_percent(state.coverage)} of elements")
        return [*parameters, kept, *([steps] if report.num_with_step else [])]
    return [
        *parameters,
        (
            "exp_avg_sq",
            f"{report.num_with_exp_avg_sq} of {total} tensors, {format_percent(state.coverage)} of elements",
        ),
        ("zero exp_avg_sq", f"{report.num_zero_elements:,} elements"),
        steps,
        ("Adam scale", scale),
    ]


def _movement(movement: MovementReport) -> str:
    since = f"from {movement.reference}, {movement.num_parameters} tensors"
    if movement.correlation is None:
        return f"{since}: none has moved, cannot tell the order of equal shapes"
    others = movement.correlation_of_others
    against = "" if others is None else f", {others:.2f} with others of its shape"
    verdict = {"consistent": "none exchanged", "exchanged": "entries exchanged", "inconclusive": "cannot tell"}
    return f"{since}: correlation {movement.correlation:.2f} with its own moments{against}; {verdict[movement.status]}"


def _groups(groups: tuple[GroupReport, ...]) -> Table:
    table = Table(box=None, padding=(0, 1), header_style="dim")
    others = list(dict.fromkeys(name for group in groups for name in group.others))
    for name in ("group", "tensors", "learning rate", "betas", "eps", "weight decay", *others):
        table.add_column(name.replace("_", " "), justify="right")
    for i, group in enumerate(groups):
        betas = "-" if group.betas is None else ", ".join(f"{beta:g}" for beta in group.betas)
        values = (group.learning_rate, group.eps, group.weight_decay, *(group.others.get(name) for name in others))
        rate, eps, decay, *more = ("-" if x is None else f"{x:g}" if isinstance(x, float) else str(x) for x in values)
        table.add_row(str(i), str(group.num_parameters), rate, betas, eps, decay, *more)
    return table
