"""``entropy-probe run``: checkpoint and config in, a run directory out."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from entropy_probe.cli.batches import collect_batches, end_ids, read_sources, required, resampler
from entropy_probe.cli.halves import saved_run, validate_run
from entropy_probe.cli.options import AllowCode, OutputDir, Overrides, Overwrite, TrustConfig
from entropy_probe.cli.output import Output, locked, open_output
from entropy_probe.results.probe import ProbeResult

if TYPE_CHECKING:
    from entropy_probe.analyses.attribution import Attribution
    from entropy_probe.analyses.provenance import Clock, Phase
    from entropy_probe.checkpoints import CheckpointState
    from entropy_probe.cli.at import RecordedStep
    from entropy_probe.cli.batches import Sources
    from entropy_probe.cli.config import RunConfig
    from entropy_probe.parallel.ranks import Ranks
    from entropy_probe.probe import EntropyProbe
    from entropy_probe.results.note import Note
    from entropy_probe.rollouts.batch import Rollouts


def run(
    config: Annotated[
        Path | None,
        typer.Argument(
            metavar="CONFIG.yaml", help="Settings; relative paths in it are relative to the current directory."
        ),
    ] = None,
    overrides: Overrides = None,
    output_dir: OutputDir = None,
    at: Annotated[
        str | None,
        typer.Option(
            metavar="RUN_DIR:STEP",
            help="Probe a recorded step of a training run on its own batch, from the nearest checkpoint before it; "
            "CONFIG.yaml may then be left out.",
        ),
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Instead of the checkpoint's learning rate.")] = None,
    overwrite: Overwrite = False,
    trust_config: TrustConfig = False,
    allow_code: AllowCode = False,
) -> None:
    """Probe a checkpoint: predict the next step's entropy change, and measure it."""
    from entropy_probe.cli.at import recorded_step
    from entropy_probe.cli.config import load_config
    from entropy_probe.cli.ranks import launched_ranks
    from entropy_probe.cli.report import run_report

    options = {"output_dir": output_dir, "overwrite": overwrite, "trust_config": trust_config}
    options["probe.learning_rate"] = learning_rate
    if config is None and at is None:
        raise ValueError("run: expected CONFIG.yaml, or --at RUN_DIR:STEP for a recorded step, got neither; give one")
    if config is not None and at is not None and "=" in str(config):
        config, overrides = None, [str(config), *(overrides or ())]
    step = None if at is None else recorded_step(at)
    if step is not None:
        options |= step.settings | ({"mode": "one_batch"} if config is None else {})
    with launched_ranks() as ranks:
        settings = load_config(config, overrides or (), options, allow_code=allow_code)
        result = probe_checkpoint(settings, ranks, step=step)
        if ranks.rank == 0:
            run_report(settings.output_dir, result).show()


def open_checkpoint(config: RunConfig) -> CheckpointState:
    """The checkpoint of a configuration, loaded as it says."""
    from entropy_probe.checkpoints import load_checkpoint

    return load_checkpoint(
        config.checkpoint,
        config.base_model,
        dtype=config.probe.dtype,
        device=config.device,
        adapter=config.adapter,
        quantization=config.quantization,
        mapping=config.mapping,
        shard=config.shard,
        weights=config.weights,
        policy=config.policy,
        any_trainer=config.trust_config,
        trainer_config=config.trainer_config,
    )


def open_probe(config: RunConfig, sources: Sources, ranks: Ranks, clock: Clock) -> tuple[EntropyProbe, CheckpointState]:
    """A probe of the checkpoint of a configuration, of which its optimizer and loss have what they take."""
    from entropy_probe.analyses.attribute import check_divides
    from entropy_probe.analyses.reference import check_reference
    from entropy_probe.checkpoints import load_reference
    from entropy_probe.checkpoints.adapters import reference_copy
    from entropy_probe.cli.origins import recorded_gradients
    from entropy_probe.probe import EntropyProbe
    from entropy_probe.steps.adamw import optimizer_parameters

    loss, update = config.probe.loss, sources.update
    if update is not None:
        loss.check(update)
    with clock.phase("load checkpoint") as step:
        state, reference = open_checkpoint(config), None
        if config.reference is not None:
            reference = load_reference(config.reference, dtype=config.probe.dtype, device=config.device)
        step(1, 1)
    # all of it before sampling
    loss.check_model(getattr(state.model, "config", None))
    check_reference(loss, update, state.model, reference)
    if loss.needs_reference and reference is None and (update is None or update.reference_logprobs is None):
        copied = reference_copy(config.checkpoint)
        if copied is not None:
            raise ValueError(
                f"{config.checkpoint}: expected reference_logprobs in the update batch, since the reference is its "
                f"adapter {copied!r}, which is not loaded; record them in training"
            )
    if config.attribution:
        check_divides(state.optimizer, config.probe)
    assert state.report.optimizer_state is not None
    past = (
        recorded_gradients(config.checkpoint, [*optimizer_parameters(state.model, state.optimizer)])
        if config.origins
        else ()
    )
    probe = EntropyProbe(
        state.model,
        state.optimizer,
        config.probe,
        mapping=state.report.optimizer_state.mapping,
        progress=clock.progress,
        resample=resampler(config, state, ranks),
        reference=reference,
        distributed=ranks.size > 1 and not config.shard,
        end_token_ids=end_ids(state),
        stop_texts=bool(config.generation.stop),
        past_gradients=past,
    )
    return probe, state


def probe_checkpoint(
    config: RunConfig, ranks: Ranks, halves: tuple[int, int] | None = None, step: RecordedStep | None = None
) -> ProbeResult:
    """Probe as configured in the output directory: resume what is there, or start; show what is finished.

    See :mod:`entropy_probe.cli.output` for what rank 0 writes.

    Args:
        config: the settings.
        ranks: the processes that share the work.
        halves: validate the attribution on this many random halves, drawn with this seed, into ``validation.json``.
            That comes after the run is written, which an error in it leaves as it is.
        step: a recorded step of the checkpoint's run that is probed, if not the next one.

    Raises:
        ValueError: if the output directory, the checkpoint, the prompts or the rollouts cannot be used.
    """
    from entropy_probe.analyses.validate import check_halves
    from entropy_probe.cli.from_checkpoint import with_trainer_settings
    from entropy_probe.cli.progress import show_progress
    from entropy_probe.cli.report import run_report

    config, of_config = with_trainer_settings(config)
    writing = ranks.rank == 0
    with locked(config.output_dir) if writing else nullcontext(), show_progress(visible=writing) as progress:
        sources = read_sources(config)
        options = {}
        if halves is not None:
            given = sources.update
            check_halves(required(config.update).num_prompts if given is None else given.num_prompts, halves[0])
            options = {"subsets": halves[0], "seed": halves[1]}
        elif step is not None:
            options = {"step": step.record.step}
        output = open_output(config, "run" if halves is None else "validate", sources, ranks, options)
        if output.finished:
            (result,) = ranks.broadcast([ProbeResult.load(output.path)] if writing else [])
        else:
            sources = replace(sources, notes=(*of_config, *sources.notes))
            result = _probe_into(output, sources, ranks, progress, halves, step)
        output.finish(lambda: run_report(output.path, result).write())
    return result


def _probe_into(
    output: Output,
    sources: Sources,
    ranks: Ranks,
    progress: Phase,
    halves: tuple[int, int] | None,
    step: RecordedStep | None,
) -> ProbeResult:
    """Load, sample, probe and validate; rank 0 writes what comes of it."""
    from entropy_probe.analyses.log_check import against_log
    from entropy_probe.analyses.provenance import Clock

    config, clock = output.config, Clock(progress)
    if config.origins and step is not None and step.between:
        raise ValueError(
            f"origins: expected the step right after a checkpoint, got step {step.record.step}, before which others "
            "are taken again; set origins to false"
        )
    probe, state = open_probe(config, sources, ranks, clock)
    gone_on: tuple[Note, ...] = ()
    if step is not None:
        with clock.phase("replay"):
            gone_on = tuple(step.go_there(state, config))
    with output.writing(ranks):
        with clock.phase("sample"):
            batches = collect_batches(config, output, sources, state, probe, ranks, progress)
        update, evaluation = batches.update, batches.evaluation
        saved = None if halves is None else saved_run(output, update, evaluation, ranks)
        if saved is not None:
            result, contributions = saved
        else:
            result, attribution = _run_mode(probe, config, update, evaluation)
            of_log = against_log(state.report.logged, result, update, selected=config.probe.update_selected)
            of_step = () if step is None else step.compare(result)
            notes = (*state.report.notes, *gone_on, *sources.notes, *batches.notes, *of_log, *of_step)
            seconds, left_out = clock.seconds | batches.seconds, beyond_loss(config, update, state.report.not_modelled)
            result, contributions = (
                _annotate(result, notes, left_out, seconds),
                attribution and attribution.contributions,
            )
            if output.writes:
                _save(output, sources, result, attribution, state.tokenizer)
        if halves is not None:
            validate_run(probe, output, (result, required(contributions)), evaluation, halves, ranks)
    return result


def _save(
    output: Output, sources: Sources, result: ProbeResult, attribution: Attribution | None, tokenizer: Any
) -> None:
    """Write what a run comes to, last the result."""
    if attribution is not None:
        attribution.save_tables(output.path, tokenizer, _names(sources))
    output.add_given(sources)
    for answer in result.answers.values():
        answer.save(output.path)
    result.save(output.path)


def _run_mode(
    probe: EntropyProbe, config: RunConfig, update: Rollouts, evaluation: Rollouts | None
) -> tuple[ProbeResult, Attribution | None]:
    """The probe's result in the configured mode, the one-batch prediction beside if asked for, and its attribution."""
    from entropy_probe.analyses.misfit import beside_two_batches
    from entropy_probe.results.note import distinct

    attribution = None
    if config.mode == "one_batch":
        if not config.attribution:
            return probe.one_batch(update), None
        attribution = probe.attribute(update=update, folds=config.attribution_folds, measure=True)
        return attribution.result, attribution
    if config.attribution:
        attribution = probe.attribute(
            update=update,
            evaluation=required(evaluation),
            folds=config.attribution_folds,
            measure=True,
            questions=config.questions,
            pool=config.mode == "pooled",
        )
        result = attribution.result
    else:
        given = {"update": update, "evaluation": required(evaluation), "questions": config.questions}
        result = probe.run(**given, pool=config.mode == "pooled")
    if config.mode != "both":
        return result, attribution
    one = probe.one_batch(update, geometry="frozen")
    result = result.model_copy(update={"cross_prompt": one.cross_prompt})

    said, known = one.diagnostics, result.diagnostics
    beside = (beside_two_batches(note, said.policy_fit.update) for note in said.notes)
    notes = (note.about("one batch") for note in distinct(filter(None, beside), known.notes))
    left_out = (f"one batch: {line}" for line in said.not_modelled if line not in known.not_modelled)
    return _annotate(result, tuple(notes), tuple(left_out), one.timing), attribution


def _names(sources: Sources) -> dict[int, str]:
    """What sampled update prompts are called: conversations by their last user message."""
    from entropy_probe.sampling import last_user_message

    prompts = sources.prompts if sources.update is None else []
    return {prompt.id: message for prompt in prompts if (message := last_user_message(prompt)) is not None}


def beyond_loss(config: RunConfig, update: Rollouts, not_modelled: tuple[str, ...]) -> tuple[str, ...]:
    """What a trainer's log shows of its loss, without what the configured loss models on this batch."""
    models = (*config.probe.loss.models, *(("importance ratios",) if update.old_logprobs is not None else ()))
    return tuple(line for line in not_modelled if not line.startswith(models))


def _annotate(
    result: ProbeResult, notes: tuple[Note, ...], not_modelled: tuple[str, ...], seconds: dict[str, float]
) -> ProbeResult:
    """The result with what is known from elsewhere."""
    from entropy_probe.results.note import distinct

    said = result.diagnostics
    more = {"notes": (*said.notes, *distinct(notes, said.notes)), "not_modelled": (*said.not_modelled, *not_modelled)}
    diagnostics = said.model_copy(update=more)
    return result.model_copy(update={"diagnostics": diagnostics, "timing": seconds | result.timing})
