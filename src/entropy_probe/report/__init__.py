"""Showing a result to people: console tables, words, figures and a page. Needs neither torch nor a model."""

from __future__ import annotations

from entropy_probe.report.attribution_console import print_validation
from entropy_probe.report.checkpoint import print_checkpoint
from entropy_probe.report.console import print_files, print_result
from entropy_probe.report.page import run_page, sweep_page
from entropy_probe.report.plots import figure_files, result_figures
from entropy_probe.report.sweep import print_sweeps
from entropy_probe.report.tables import Tables, read_tables
from entropy_probe.report.verdict import Verdict, verdict
from entropy_probe.report.wording import REPORT_FILE

__all__ = [
    "REPORT_FILE",
    "Tables",
    "Verdict",
    "figure_files",
    "print_checkpoint",
    "print_files",
    "print_result",
    "print_sweeps",
    "print_validation",
    "read_tables",
    "result_figures",
    "run_page",
    "sweep_page",
    "verdict",
]
