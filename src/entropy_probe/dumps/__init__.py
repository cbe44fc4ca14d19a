"""What trainers leave of their rollouts, read into batches: see ``docs/trainers.md``, "Rollouts from dumps"."""

from entropy_probe.dumps.dump import Converted, Dump, describe_batch, read_dump

__all__ = ["Converted", "Dump", "describe_batch", "read_dump"]
