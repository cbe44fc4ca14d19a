"""Where a dump's records are: one file, the files of all ranks, or a folder with a file or a folder for every step."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from entropy_probe.dumps.layouts import Layout, Record, recognised
from entropy_probe.dumps.pickled import archived_record, batch_record
from entropy_probe.dumps.samples import Sample, read_sample
from entropy_probe.sampling.records import jsonl_records, parquet_records

_KINDS = (".jsonl", ".jsonl.gz", ".parquet", ".pt", ".pkl")
_STEP = re.compile(r"(?:global_)?step_(\d+)")
_RANK = re.compile(r"rank_\d+\.jsonl")


def files_of(path: Path, step: int | None) -> list[Path]:
    """The files with the rollouts of a step.

    A file of one of several ranks stands for all; a folder has those of one step, one for every step, or several that
    say in each record of which step it is (open-instruct).

    Raises:
        ValueError: if there are none, those of several steps and none is asked for, or ranks still write.
    """
    if path.is_file():
        return files_of(path.parent, step) if _RANK.fullmatch(path.name) else [path]
    if not path.is_dir():
        raise ValueError(f"{path}: expected a dump of rollouts, found no such file; check the path")
    ranks = sorted(file for file in path.iterdir() if _RANK.fullmatch(file.name))
    tasks = sorted(path.glob("*.jsonl")) if path.name.isdigit() and not ranks else []
    if tasks:  # AReaL: a folder for each version of the policy, a file for each task
        return tasks
    files = [file for file in sorted(path.iterdir()) if file.name.endswith(_KINDS)]
    if files and not ranks and all("_rollouts_" in file.name or _STEP.fullmatch(path.name) for file in files):
        return files
    if ranks:
        if not (path / "STABLE").is_file():
            raise ValueError(
                f"{path}: expected the file STABLE, which prime-rl writes once every rank is done, found none; wait, "
                "or copy the whole folder"
            )
        return ranks
    steps: dict[int, Path] = {}
    for place in sorted(path.iterdir()):
        match = re.search(r"(\d+)$", Path(place.name.removesuffix(".gz")).stem)
        version = place.is_dir() and place.name.isdigit()
        folder = version or (place.is_dir() and _STEP.fullmatch(place.name))
        if match is None or not (place.name.endswith(_KINDS) or folder):
            continue
        number = int(match[1]) + version  # what the policy after so many updates sampled is for the next one
        if number in steps:
            raise ValueError(f"{path}: expected one file for each step, got two of {match[1]}; pass a file")
        steps[number] = place
    if not steps and (path / "completions").is_dir():  # TRL's, in the folder of a run
        return files_of(path / "completions", step)
    if not steps:
        raise ValueError(f"{path}: expected files of rollouts ({', '.join(_KINDS)}), found none; pass a dump")
    if step is None and len(steps) == 1:
        step = next(iter(steps))
    if step not in steps:
        wanted = "one step" if step is None else f"step {step}"
        raise ValueError(f"{path}: expected {wanted}, got those of {_listed(steps)}; {_CHOOSE}")
    return files_of(steps[step], None)


_CHOOSE = "pass a file of one step (--step N with entropy-probe rollouts)"


def _listed(steps: dict[int, Path] | set[int]) -> str:
    shown = sorted(steps)
    return ", ".join(map(str, shown if len(shown) < 8 else (*shown[:3], "...", *shown[-3:])))


def read_samples(files: list[Path], step: int | None, after: int | None) -> tuple[Layout, int | None, list[Sample]]:
    """The layout of files, the step, and the rollouts of that step; as in ``read_dump`` where there are several.

    Raises:
        ValueError: if the layout is not known, a record is not of it, or the step is not there or not known.
    """
    layout: Layout | None = None
    samples: dict[int | None, list[Sample]] = {}
    for file in files:
        named = None
        for where, record in _records(file):
            if not isinstance(record, dict):
                raise ValueError(f"{where}: expected a record with names of fields, got {type(record).__name__}")
            try:
                if layout is None:
                    layout = recognised(record)
                elif not layout.needs <= record.keys():
                    raise ValueError(f"expected the fields of {layout}, got {', '.join(map(str, record))[:200]}")
                rows = list(layout.prepare(record)) if layout.prepare else [record]
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
            match = re.search(layout.step_in_name, file.name) if layout.step_in_name else None
            match = match or _STEP.fullmatch(file.parent.name)
            named = int(match[1]) if match else None
            for row in rows:
                sample = read_sample(layout, row, where)
                samples.setdefault(named if sample.step is None else sample.step, []).append(sample)
    if layout is None:
        raise ValueError(f"{files[0]}: expected at least one rollout, got an empty file; dump again")
    return layout, *_of_step(files[0], samples, step, after)


def _of_step(
    file: Path, samples: dict[int | None, list[Sample]], step: int | None, after: int | None
) -> tuple[int | None, list[Sample]]:
    steps = {known for known in samples if known is not None}
    if step is None and len(samples) > 1 and after is not None:
        step = after + 1
    if step is None and len(samples) == 1:
        return next(iter(samples.items()))
    if step not in steps:
        got = f"those of {_listed(steps)}" if steps else "rollouts that do not say their step"
        raise ValueError(
            f"{file}: expected {'one step' if step is None else f'rollouts of step {step}'}, got {got}; {_CHOOSE}"
        )
    return step, samples[step]


def _records(file: Path) -> Iterator[tuple[str, Record]]:
    with file.open("rb") as opened:
        head = opened.read(4)
    if head == b"PAR1":
        yield from parquet_records(file, "rollouts")
    elif head.startswith(b"PK"):
        yield str(file), archived_record(file)
    elif head.startswith(b"\x80"):
        yield str(file), batch_record(file)
    else:
        yield from jsonl_records(file, "rollouts")
