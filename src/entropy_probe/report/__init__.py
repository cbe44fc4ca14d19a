"""Showing a result to people: the console table and the verdict in words. Needs neither torch nor a model."""

from __future__ import annotations

from entropy_probe.report.checkpoint import print_checkpoint
from entropy_probe.report.console import print_result
from entropy_probe.report.verdict import Verdict, verdict

__all__ = ["Verdict", "print_checkpoint", "print_result", "verdict"]
