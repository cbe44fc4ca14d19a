"""What a result is computed from, by content: ``inputs.json``."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from entropy_probe.results.note import Note
from entropy_probe.results.record import Kept, Record, SavedRecord

if TYPE_CHECKING:
    from entropy_probe.cli.batches import Sources
    from entropy_probe.cli.config import RunConfig

INPUTS_FILE = "inputs.json"
Batch = Literal["update", "evaluation"]
Command = Literal["run", "validate", "sweep"]

# what is compared by content; the others say where things go and how long to wait
_PATHS: dict[str, Any] = {
    **dict.fromkeys(("overwrite", "output_dir", "checkpoint", "base_model", "rollouts", "trainer_config"), True),
    "reward_time_limit": True,
    "prompts": {"jsonl", "parquet"},
    "generation": {"server": {"url", "api_key_env", "timeout", "retries"}},
}


class Recorded(Record):
    """A sampled batch on disk: the SHA-256 of its file, and notes on how it was sampled."""

    sha256: str
    notes: tuple[Note, ...] = ()


class Pilot(Record):
    """How much to draw of the evaluation batch, as a pilot said, and notes on that.

    Attributes:
        sequences: in all.
        draws: of each prompt; null for single draws.
        notes: what the pilot said.
    """

    sequences: int
    draws: int | None
    notes: tuple[Note, ...]


class Inputs(SavedRecord):
    """What a result is computed from, saved in ``inputs.json``.

    Attributes:
        command: what computes it.
        config: the resolved settings, without paths, and those of the command line.
        checkpoint: SHA-256 over the checkpoint's files.
        base_model: the same for the base model's directory, or its name on the hub; null for full weights.
        given: SHA-256 of saved rollouts that the config names.
        prompts: SHA-256 over the prompts that are sampled from; null where none are.
        reward: SHA-256 over the files that the reward functions are defined in; null where none is called.
        versions: of the libraries whose code the numbers depend on.
        rollouts: the sampled batches that are on disk.
        pilot: what a pilot said of the evaluation batch; null where none was needed.
    """

    kept: ClassVar = Kept(INPUTS_FILE, "record of inputs", "run", "choose another output_dir")
    schema_version: Literal[2] = 2
    command: Command
    config: dict[str, Any]
    checkpoint: str
    base_model: str | None
    given: dict[Batch, str]
    prompts: str | None
    reward: str | None
    versions: dict[str, str]
    rollouts: dict[Batch, Recorded] = Field(default_factory=dict)
    pilot: Pilot | None = None

    def difference(self, other: Inputs) -> str | None:
        """What the two, of one command, do not share, in words; None if they agree."""
        labels = {"checkpoint": "checkpoint files", "base_model": "base model", "versions": "versions"}
        labels |= {"prompts": "prompts", "reward": "reward code"}
        for name, label in labels.items():
            if getattr(self, name) != getattr(other, name):
                return f"other {label}"
        for batch in ("update", "evaluation"):
            if self.given.get(batch) != other.given.get(batch):
                return f"other {batch} rollouts"
        changed = next(_changed(self.config, other.config), None)
        return None if changed is None else f"another {changed}"


def inputs_of(config: RunConfig, command: Command, sources: Sources, options: Mapping[str, Any]) -> Inputs:
    """What a command would compute from; ``options`` are its settings that are not in the config.

    Raises:
        ValueError: if the checkpoint is not a directory.
    """
    from entropy_probe.analyses.provenance import library_versions
    from entropy_probe.checkpoints.load import base_model_of

    base = base_model_of(config.checkpoint, config.base_model, adapter=config.adapter, quantization=config.quantization)
    base = base or config.base_model
    versions = library_versions()
    rewards = () if sources.reward is None else sources.reward.functions
    return Inputs(
        command=command,
        config={**config.model_dump(mode="json", exclude=_PATHS), **options},
        checkpoint=hash_directory(config.checkpoint),
        base_model=hash_directory(Path(base)) if base is not None and Path(base).is_dir() else base,
        given={batch: _hash_files(files) for batch, files in sources.files.items()},
        prompts=_hash(repr(sources.prompts)) if sources.prompts else None,
        reward=_hash(json.dumps([_source(reward.function) for reward in rewards])) if rewards else None,
        versions={name: versions[name] for name in ("entropy-probe", "torch", "transformers")},
    )


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_files(files: tuple[Path, ...]) -> str:
    """The hash of a file, or over those of several."""
    hashes = [hash_file(file) for file in files]
    return hashes[0] if len(hashes) == 1 else _hash(json.dumps(hashes))


def hash_directory(directory: Path) -> str:
    """SHA-256 over names and contents of the files in a directory and its folders of adapters and shards, no others."""
    from entropy_probe.checkpoints.directory import adapters_of
    from entropy_probe.checkpoints.formats import folders

    places = {directory, *adapters_of(directory).values(), *folders(directory)}
    files = sorted(path for place in places for path in place.iterdir() if path.is_file())
    with ThreadPoolExecutor() as pool:
        hashes = list(pool.map(hash_file, files))
    names = [path.relative_to(directory).as_posix() for path in files]
    return _hash(json.dumps(list(zip(names, hashes, strict=True))))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def _source(function: Callable[..., Any]) -> str | None:
    """The hash of the file that a function, or an object that can be called, is defined in, if there is one."""
    plain = inspect.unwrap(function)
    try:
        file = inspect.getsourcefile(plain if inspect.isroutine(plain) else type(plain))
    except TypeError:
        return None
    return None if file is None else hash_file(Path(file))


def _changed(a: Any, b: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in sorted(a.keys() | b.keys()):
            yield from _changed(a.get(key), b.get(key), f"{prefix}.{key}" if prefix else key)
    elif a != b:
        yield prefix
