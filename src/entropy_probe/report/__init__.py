"""Showing a record to people: sections of rows, sentences and charts, on the console, as a page and as figures.

Needs neither torch nor a model. A record shows itself everywhere by a function that makes a
:class:`~entropy_probe.report.sections.base.Section` of it.
"""

from __future__ import annotations

from entropy_probe.report.console import print_files, print_sections
from entropy_probe.report.figures import figure_files
from entropy_probe.report.page import page
from entropy_probe.report.sections.base import Section, Verdict
from entropy_probe.report.sections.checkpoint import checkpoint_section
from entropy_probe.report.sections.run import run_sections
from entropy_probe.report.sections.sweep import sweep_sections
from entropy_probe.report.sections.timeline import timeline_sections
from entropy_probe.report.tables import Tables, read_tables
from entropy_probe.report.verdict import verdict
from entropy_probe.report.wording import REPORT_FILE

__all__ = [
    "REPORT_FILE",
    "Section",
    "Tables",
    "Verdict",
    "checkpoint_section",
    "figure_files",
    "page",
    "print_files",
    "print_sections",
    "read_tables",
    "run_sections",
    "sweep_sections",
    "timeline_sections",
    "verdict",
]
