"""``entropy-probe validate``: do a run's contributions forecast real steps?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from entropy_probe.cli.options import AllowCode, OutputDir, Overrides, Overwrite, TrustConfig


def validate(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="A run's settings; relative paths as for run.")],
    overrides: Overrides = None,
    subsets: Annotated[int, typer.Option(min=4, help="How many random halves of the update prompts.")] = 40,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the random halves.")] = 0,
    output_dir: OutputDir = None,
    overwrite: Overwrite = False,
    trust_config: TrustConfig = False,
    allow_code: AllowCode = False,
) -> None:
    """Run with attribution, then take real steps on random halves of the update prompts and compare.

    Writes what a run writes, then validation.json beside it.
    """
    from entropy_probe.cli.config import ValidateConfig, load_config
    from entropy_probe.cli.ranks import launched_ranks
    from entropy_probe.cli.report import run_report
    from entropy_probe.cli.run import probe_checkpoint

    options = {"output_dir": output_dir, "overwrite": overwrite, "trust_config": trust_config}
    with launched_ranks() as ranks:
        settings = load_config(config, overrides or (), options, ValidateConfig, allow_code=allow_code)
        result = probe_checkpoint(settings, ranks, (subsets, seed))
        if ranks.rank == 0:
            run_report(settings.output_dir, result).show()
