"""The validation of a saved run: step by step into its directory, and on from there after an interruption."""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING

from entropy_probe.cli.output import HALVES, Output
from entropy_probe.results.probe import RESULTS_FILE, ProbeResult
from entropy_probe.results.validation import MeasuredStep

if TYPE_CHECKING:
    from entropy_probe.analyses.attribution import Contributions
    from entropy_probe.parallel.ranks import Ranks
    from entropy_probe.probe import EntropyProbe
    from entropy_probe.rollouts.batch import Rollouts


def saved_run(
    output: Output, update: Rollouts, evaluation: Rollouts | None, ranks: Ranks
) -> tuple[ProbeResult, Contributions] | None:
    """The run that an interrupted validation was of, with its attribution; None if it was not complete.

    Raises:
        ValueError: if its tables are missing or of another run.
    """
    saved = []
    with ranks.agreeing():
        if output.writes:
            saved.append(_read_run(output, update, evaluation))
    return ranks.broadcast(saved)[0]


def _read_run(
    output: Output, update: Rollouts, evaluation: Rollouts | None
) -> tuple[ProbeResult, Contributions] | None:
    import torch

    from entropy_probe.analyses.attribution import Contributions
    from entropy_probe.analyses.overlap import Contents
    from entropy_probe.report import read_tables
    from entropy_probe.report.tables import check_tables

    if not (output.path / RESULTS_FILE).is_file():
        return None
    result, tables = ProbeResult.load(output.path), read_tables(output.path)
    if tables is None or result.attribution is None:
        raise ValueError(
            f"{output.path}: expected the attribution of the run that is validated, found none; pass --overwrite to "
            "run and validate afresh"
        )
    check_tables(tables, result)
    tokens = torch.zeros(update.response_mask.shape, dtype=torch.float64)
    tokens[update.response_mask] = torch.from_numpy(tables.tokens["contribution"])
    prompts, horizon = torch.from_numpy(tables.prompts["contribution"]), result.attribution.horizon
    return result, Contributions(
        update, Contents.of(update if evaluation is None else evaluation), horizon, tokens, prompts
    )


def validate_run(
    probe: EntropyProbe,
    output: Output,
    run: tuple[ProbeResult, Contributions],
    evaluation: Rollouts | None,
    halves: tuple[int, int],
    ranks: Ranks,
) -> None:
    """Take the steps that are missing, and save what all of them say; every one is kept as soon as it is there.

    An error leaves the run as it is, with its report. ``halves`` are how many, and the seed they are drawn with.
    """
    from entropy_probe.cli.report import run_report

    (result, contributions), folder = run, output.path / HALVES
    with ranks.agreeing():
        kept = [MeasuredStep.load(file) for file in sorted(folder.glob("[0-9]*.json"))] if output.writes else []
    numbers = count(len(kept) + 1)

    def save(step: MeasuredStep) -> None:
        folder.mkdir(exist_ok=True)
        step.save(folder / f"{next(numbers):03d}.json")

    try:
        validation = probe.validate(
            contributions,
            evaluation=evaluation,
            subsets=halves[0],
            seed=halves[1],
            finished=ranks.broadcast(kept),
            on_step=save if output.writes else None,
        )
    except BaseException:
        if output.writes:
            run_report(output.path, result).write()
        raise
    if output.writes:
        validation.save(output.path)
