"""What a checkpoint holds, and whether the next step can be computed from it."""

from __future__ import annotations

from typing import Any

from entropy_probe.report.numbers import format_number, format_percent
from entropy_probe.report.sections.base import Row, Rows, Section, State, Table, Verbatim, Verdict
from entropy_probe.results.checkpoint import CheckpointReport, GroupReport, MovementReport, SettingReport
from entropy_probe.results.probe import OptimizerStateReport

MANIFESTS = {"training": "during training", "inspection": "by inspection, after training"}
BELONGS = {"sapo_": "sapo", "vespo_": "vespo"}
"""Settings that only losses of this type have, by how they begin."""
NEEDS = {"vllm_": "use_vllm", "entropy_target": "use_adaptive_entropy", "ref_model_": "sync_ref_model"}
"""Settings that do nothing where another is off."""
STATES: dict[str, State] = {"healthy": "ok", "suspicious": "look", "unusable": "bad"}


def checkpoint_section(report: CheckpointReport) -> Section:
    """Parameter groups, what the optimizer state covers, the verdict and the notes that it comes from."""
    facts = Rows(tuple(Row(label, Verbatim(value)) for label, value in _facts(report)))
    notes = report.notes
    if report.verdict == "unusable":  # the reason says what to do
        notes = tuple(note.model_copy(update={"remedy": ""}) for note in notes)
    return Section(
        title=Verbatim(report.path),
        key="checkpoint",
        short="Checkpoint",
        verdict=Verdict(f"verdict: {report.verdict}", state=STATES[report.verdict]),
        blocks=(facts, *([_groups(report.groups)] if report.groups else []), *_settings(report.settings)),
        notes=notes,
        not_modelled=report.not_modelled,
    )


def _facts(report: CheckpointReport) -> list[tuple[str, str]]:
    kind = "LoRA adapter" if report.kind == "lora" else "full weights"
    facts = [("weights", kind + (f" on {report.base_model}" if report.base_model else ""))]
    if report.trainer is not None:
        facts.append(("trainer", report.trainer))
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
    (low, high), total = state.steps, state.num_parameters
    at = f"all at {low}" if low == high else f"{low} to {high}"
    steps, covered = ("step", f"{report.num_with_step} of {total} tensors, {at}"), format_percent(state.coverage)
    facts = [("parameters", f"{total} tensors, {state.num_elements:,} elements"), ("mapping", state.mapping)]
    if state.optimizer is not None:
        return [*facts, ("state", f"covers {covered} of elements"), *([steps] if report.num_with_step else [])]
    scale = "no usable second moment"
    if state.scale_min is not None and state.scale_max is not None:
        scale = f"{format_number(state.scale_min)} to {format_number(state.scale_max)}"
    present = f"{report.num_with_exp_avg_sq} of {total} tensors, {covered} of elements"
    zero = f"{report.num_zero_elements:,} elements"
    return [*facts, ("exp_avg_sq", present), ("zero exp_avg_sq", zero), steps, ("Adam scale", scale)]


def _movement(movement: MovementReport) -> str:
    since = f"from {movement.reference}, {movement.num_parameters} tensors"
    if movement.correlation is None:
        return f"{since}: none has moved, cannot tell the order of equal shapes"
    others = movement.correlation_of_others
    against = "" if others is None else f", {others:.2f} with others of its shape"
    verdict = {"consistent": "none exchanged", "exchanged": "entries exchanged", "inconclusive": "cannot tell"}
    return f"{since}: correlation {movement.correlation:.2f} with its own moments{against}; {verdict[movement.status]}"


def _groups(groups: tuple[GroupReport, ...]) -> Table:
    others = list(dict.fromkeys(name for group in groups for name in group.others))
    columns = ("group", "tensors", "learning rate", "betas", "eps", "weight decay")
    rows = []
    for i, group in enumerate(groups):
        betas = "-" if group.betas is None else ", ".join(f"{beta:g}" for beta in group.betas)
        values = (group.learning_rate, group.eps, group.weight_decay, *(group.others.get(name) for name in others))
        rate, eps, decay, *more = ("-" if x is None else f"{x:g}" if isinstance(x, float) else str(x) for x in values)
        rows.append((str(i), str(group.num_parameters), rate, betas, eps, decay, *more))
    return Table("Parameter groups", (*columns, *(name.replace("_", " ") for name in others)), tuple(rows))


def _settings(settings: tuple[SettingReport, ...]) -> list[Table]:
    """The trainer's settings that do something, with where each stands."""
    values = {setting.name: setting.value for setting in settings}

    def acts(name: str) -> bool:
        loss = next((loss for begin, loss in BELONGS.items() if name.startswith(begin)), None)
        switch = next((switch for begin, switch in NEEDS.items() if name.startswith(begin)), None)
        return (loss is None or values.get("loss_type") == loss) and (switch is None or bool(values.get(switch)))

    shown = [setting for setting in settings if setting.value is not None and acts(setting.name)]
    rows = tuple((setting.name, _value(setting.value), setting.source) for setting in shown)
    return [Table("Settings of the trainer", ("setting", "value", "from"), rows)] if rows else []


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
