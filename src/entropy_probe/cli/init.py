"""``entropy-probe init``: a ``probe.yaml`` to start from, written from what a checkpoint's files tell."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from entropy_probe.cli.options import BaseModel, TrainerConfig

if TYPE_CHECKING:
    from entropy_probe.results.checkpoint import CheckpointReport

DEFAULT_PROMPTS, DEFAULT_GROUP = 16, 8
SHOWN = (
    *("loss_type", "loss_mode", "loss_agg_mode", "policy_loss_type", "type", "beta", "use_kl_loss", "kl_tau"),
    *("temperature", "max_grad_norm", "max_completion_length"),
)
"""Settings of the trainer that are named, by its own names."""
LINES = """\
# Probe of {checkpoint}: entropy-probe run {file}
# {found}
checkpoint: {checkpoint}
{base_model}output_dir: {output_dir}

# Where prompts come from: {{jsonl: FILE}}, {{parquet: FILE}}, {{dataset: NAME}}, {{callable: "module:function"}},
# {{reasoning_gym: TASK}}; chat: true puts them into the chat template.
prompts: {{jsonl: prompts.jsonl}}
# exact_match, gsm8k, math, reasoning_gym, or "module:function" as for TRL or verl (run with --allow-code)
reward: exact_match

update: {{num_prompts: {prompts}, group_size: {group}}}     # {sizes}
evaluation: {{total_sequences: 512}}            # more sequences, smaller errors; not needed with mode: one_batch
# mode: one_batch                             # predict and measure on the update batch alone
# attribution: true                           # which prompts, tokens and layers did it

# {settings}
# probe: {{}}
"""


def init(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint directory.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")] = Path("probe.yaml"),
    base_model: BaseModel = None,
    trainer_config: TrainerConfig = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    with_schema: Annotated[
        bool, typer.Option("--schema", help="Also write the JSON schema beside it, and name it for editors.")
    ] = False,
) -> None:
    """Write a commented probe.yaml from what a checkpoint's files tell."""
    from entropy_probe.checkpoints import inspect_checkpoint
    from entropy_probe.cli.schema import SCHEMA_FILE, schema_text
    from entropy_probe.report.text import printable
    from entropy_probe.results.record import write_atomically

    if output.exists() and not overwrite:
        raise ValueError(f"{output}: expected a file that is not there yet, found one; pass --overwrite or --output")
    report = inspect_checkpoint(checkpoint, base_model, trainer_config=trainer_config)
    text = config_of(report, checkpoint, output, base_model, trainer_config)
    if with_schema:
        write_atomically(output.parent / SCHEMA_FILE, schema_text().encode())
        text = f"# yaml-language-server: $schema={SCHEMA_FILE}\n{text}"
    write_atomically(output, text.encode())
    typer.echo(printable(f"Wrote {output}: set prompts and reward, then entropy-probe run {output}"))
    if report.verdict != "healthy":
        typer.echo(
            printable(f"note: the checkpoint is {report.verdict}; see entropy-probe inspect {checkpoint}"), err=True
        )


def config_of(
    report: CheckpointReport,
    checkpoint: Path,
    file: Path,
    base_model: str | None = None,
    trainer_config: Path | None = None,
) -> str:
    """The text of the file."""
    from entropy_probe.checkpoints.directory import named_step

    told = {setting.name: setting.value for setting in report.settings}
    group = told.get("num_generations")
    prompts, sizes = DEFAULT_PROMPTS, "of the trainer's batch, where its files say it"
    batch = [told.get(name) for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "num_processes")]
    sequences = math.prod(size for size in batch if isinstance(size, int))
    if isinstance(group, int) and all(isinstance(size, int) for size in batch):
        prompts, sizes = max(1, sequences // group), "as one step of training has"
    elif isinstance(told.get("ppo_mini_batch_size"), int):
        prompts, sizes = told["ppo_mini_batch_size"], "as one step of training has"
    step = named_step(checkpoint)
    of_step = None if step is None else f"step {step}"
    found = ", ".join(filter(None, [report.trainer, report.optimizer, of_step, report.verdict]))
    loss = ", ".join(f"{name} {told[name]}" for name in SHOWN if told.get(name) is not None)
    settings = "The trainer's files say nothing of loss, temperature, clipping and lengths: set them under probe."
    if loss:
        settings = f"Taken from the trainer's files unless set under probe: {loss}, ..."
    base = f"base_model: {_scalar(base_model)}\n" if base_model is not None else ""
    base += f"trainer_config: {_scalar(str(trainer_config))}\n" if trainer_config is not None else ""
    output_dir = "runs/probe" if step is None else f"runs/probe-{step}"
    return LINES.format(
        checkpoint=_scalar(str(checkpoint)), file=_scalar(str(file)), found=found, base_model=base,
        output_dir=_scalar(output_dir), prompts=prompts, group=group or DEFAULT_GROUP,
        sizes=sizes, settings=settings,
    )  # fmt: skip


def _scalar(text: str) -> str:
    """A text as YAML that reads as that text, on one line."""
    return text if re.fullmatch(r"[\w./-]*/[\w./-]*", text) and text[0] != "-" else json.dumps(text)
