"""What a run took and what it ran on: time by phase, peak memory, library versions."""

from __future__ import annotations

import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version

import torch

Phase = Callable[[str, int, int], None]
"""Progress: the name of the phase, sequences done, sequences in all."""


@dataclass(eq=False)
class Clock:
    """Seconds by phase, and where progress is reported."""

    progress: Phase | None
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[Callable[[int, int], None]]:
        """Time a phase; gives the callback that reports sequences done and in all within it."""
        start = time.perf_counter()
        yield lambda done, total: self.progress(name, done, total) if self.progress else None
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def peak_memory(device: torch.device) -> dict[str, int]:
    """Peak memory of the process so far, in bytes."""
    peak = {"host_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)}
    if device.type == "cuda":
        peak["device_peak"] = torch.cuda.max_memory_allocated(device)
    return peak


def library_versions() -> dict[str, str]:
    """Versions of Python and of the installed libraries that a number may depend on."""
    versions = {"python": platform.python_version()}
    for package in ("entropy-probe", "torch", "transformers", "peft", "trl"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
