"""``entropy-probe rollouts``: what a trainer left of its rollouts, held against a checkpoint, as a batch of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from entropy_probe.cli.dumps import TrainersBatch
from entropy_probe.cli.options import BaseModel, TrainerConfig
from entropy_probe.results.note import Note, NoteKind

if TYPE_CHECKING:
    from entropy_probe.dumps import Dump
    from entropy_probe.rollouts.batch import Rollouts

UNLIKELY = -12.0
"""Log-probability, in nats, that a policy's own tokens hardly ever fall below."""
NOT_THE_POLICYS = NoteKind(
    "not_the_policys",
    "surprisal is {excess:+.3g} nats per token off the entropy (z = {z:+.1f}): the tokens are not this policy's at "
    "temperature {temperature:g}",
    "Give the checkpoint that sampled them (dump N + 1 is checkpoint N's) and its temperature. Texts that are "
    "tokenized again may have other tokens.",
)
OTHER_LOGPROBS = NoteKind(
    "other_logprobs",
    "the dump's log-probabilities are {mean:.2g} nats per token from the policy's on average",
    "Right where the sampler was an older policy; else the temperature, or the checkpoint, is another.",
)
MAX_MISMATCH = 0.05
"""Nats per token, as ``ProbeConfig.max_mismatch``."""
MAX_TOKENS = 8192
"""Padded tokens of one forward pass."""


def rollouts(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="A trainer's dump, a folder of one, or a file of ours.")],
    step: Annotated[int | None, typer.Option(help="Which step, where there are several.")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="The checkpoint whose next batch it is: checked, and the tokenizer for texts.")
    ] = None,
    base_model: BaseModel = None,
    trainer_config: TrainerConfig = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write it as Parquet, for a config.")] = None,
    max_completion_length: Annotated[
        int | None, typer.Option(help="The trainer's limit on response tokens, where the checkpoint does not say it.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Of sampling, where the checkpoint does not say it.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what it holds as JSON.")] = False,
) -> None:
    """Show what a trainer's dump of rollouts holds, check it against a checkpoint, convert it.

    Exit code 0 when all is well, 1 when something speaks against it.
    """
    from entropy_probe.dumps import describe_batch, read_dump
    from entropy_probe.rollouts.batch import Rollouts

    if output is not None and output.exists() and not overwrite:
        raise ValueError(f"{output}: expected a file that is not there yet, found one; pass --overwrite or --output")
    told = TrainersBatch() if checkpoint is None else TrainersBatch.of(checkpoint, trainer_config)
    dump = read_dump(path, step, told.after)
    batch, facts, notes = (
        (dump, {"layout": "entropy-probe's own"}, []) if isinstance(dump, Rollouts) else (None, {}, [])
    )
    if not isinstance(dump, Rollouts):
        facts, notes = _facts(dump), told.notes(dump) if checkpoint is not None else []
        tokenizer = _tokenizer(checkpoint, base_model) if dump.needs_tokenizer else None
        if not dump.needs_tokenizer or tokenizer is not None or output is not None:
            converted = told.convert(dump, tokenizer, max_completion_length)
            batch, notes = converted.rollouts, [*notes, *converted.notes]
            facts["advantages"] = converted.advantages
        else:
            facts["token ids"] = "none: texts, for which --checkpoint or --base-model has the tokenizer"
    if batch is not None:
        facts |= describe_batch(batch)
        if checkpoint is not None:
            more, said = _against(batch, checkpoint, base_model, trainer_config, temperature)
            facts, notes = facts | more, [*notes, *said]
        if output is not None:
            batch.to_parquet(output)
            facts["written"] = str(output)
    _print(path, facts, notes, as_json=as_json)
    raise typer.Exit(int(any(note.code in _AGAINST for note in notes)))


_AGAINST = ("other_step", "other_size", NOT_THE_POLICYS.code, OTHER_LOGPROBS.code)


def _facts(dump: Dump) -> dict[str, str]:
    facts = {"layout": dump.layout.name, "rollouts": str(len(dump.samples))}
    if dump.step is not None:
        facts["step"] = f"{dump.step}, sampled by checkpoint {dump.step - 1}"
    return facts


def _tokenizer(checkpoint: Path | None, base_model: str | None) -> Any:
    from entropy_probe.checkpoints.tokenizer import load_tokenizer, tokenizer_of

    if checkpoint is not None:
        return tokenizer_of(checkpoint, base_model)
    return None if base_model is None else load_tokenizer(Path(base_model), None)


def _against(
    batch: Rollouts,
    checkpoint: Path,
    base_model: str | None,
    trainer_config: Path | None,
    temperature: float | None,
) -> tuple[dict[str, str], list[Note]]:
    """How the batch's tokens and log-probabilities fit the policy of a checkpoint."""
    from entropy_probe.checkpoints import load_checkpoint
    from entropy_probe.estimators.policy_fit import excess_sums, policy_fit
    from entropy_probe.report.numbers import format_percent
    from entropy_probe.scoring.forward import Scorer

    state = load_checkpoint(checkpoint, base_model, any_trainer=True, trainer_config=trainer_config)
    temperature = float(temperature or state.settings.get("temperature") or 1.0)
    scorer = Scorer(state.model, temperature, MAX_TOKENS)
    scorer.prepare(batch)
    scores, mask = scorer.score(batch), batch.response_mask
    fit, logprobs = policy_fit(excess_sums(scores)), scores.logprobs[mask].double()
    unlikely, entropy = (logprobs < UNLIKELY).double().mean().item(), scores.entropies[mask].double().mean().item()
    surprisal = f"{-logprobs.mean().item():.4g} nats per token, entropy {entropy:.4g} (z = {fit.z:+.1f})"
    facts = {"surprisal": surprisal, f"log p < {UNLIKELY:g}": f"{format_percent(unlikely)} of the tokens"}
    notes = [] if fit.holds else [NOT_THE_POLICYS(excess=fit.excess, z=fit.z, temperature=temperature)]
    if logged := state.report.logged.get("entropy"):
        facts["entropy logged"] = f"{logged[-1]:.4g}, last by the checkpoint"
    for name in ("sampled_logprobs", "old_logprobs"):
        theirs = getattr(batch, name)
        if theirs is not None:
            gap = (theirs[mask].double() - logprobs).abs().mean().item()
            facts[name.replace("_logprobs", " log-probabilities")] = f"{gap:.2g} nats per token from the policy's"
            notes += [OTHER_LOGPROBS(mean=gap).about(name)] if gap > MAX_MISMATCH else []
    return facts, notes


def _print(path: Path, facts: dict[str, str], notes: list[Note], *, as_json: bool) -> None:
    from rich.console import Console

    from entropy_probe.report import Section, Verdict, print_sections
    from entropy_probe.report.sections.base import Row, Rows, Verbatim

    if as_json:
        said = [note.model_dump(mode="json") for note in notes]
        typer.echo(json.dumps({"path": str(path), "holds": facts, "notes": said}, indent=2))
        return
    against = any(note.code in _AGAINST for note in notes)
    rows = Rows(tuple(Row(label, Verbatim(value)) for label, value in facts.items()))
    verdict = Verdict("verdict: suspicious", state="look") if against else None
    title = Verbatim(str(path))
    print_sections([Section(title, "rollouts", verdict=verdict, blocks=(rows,), notes=tuple(notes))], Console())
