"""Showing a result to people: the console table and the verdict in words. Needs neither torch nor a model."""

from __future__ import annotations

from entropy_probe.report.checkpoint import print_checkpoint
from entropy_probe.report.console import print_result
from entropy_probe.report.plots import figure_files
from entropy_probe.report.sweep import print_sweeps
from entropy_probe.report.verdict import Verdict, verdict

__all__ = ["Verdict", "figure_files", "print_checkpoint", "print_result", "print_sweeps", "verdict"]
