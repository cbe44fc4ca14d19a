"""``optimizer.pt`` of the Hugging Face Trainer and TRL: one file of ``torch.save``, parameters by number."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from entropy_probe.checkpoints.formats.base import CheckpointFormat, doubts_about_files
from entropy_probe.results.note import Note


class Trainer(CheckpointFormat):
    """Weights and adapters are safetensors, as everywhere; a log and the schedule lie beside them."""

    def optimizer_at(self, path: Path) -> Path | None:
        """The file."""
        file = path / "optimizer.pt"
        return file if file.is_file() else None

    def doubts(self, path: Path) -> Iterator[Note]:
        """What the Trainer writes beside the state and is missing."""
        yield from doubts_about_files(path)


FORMAT = Trainer()
