"""What the libraries say: nothing on the console of a normal run, everything on request."""

from __future__ import annotations

import logging
import os

from entropy_probe.cli.errors import DEBUG_VARIABLE

_ENVIRONMENT = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # transformers follows it
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TQDM_DISABLE": "1",
}


def quiet_libraries() -> None:
    """Hide warnings, log records below ERROR and progress bars of everything but this program.

    For the process of the command line, before the libraries are imported: none of it is undone. What is meant for the
    user is in the result's messages, in errors and in lines written to stderr, and uses neither ``warnings`` nor
    ``logging``. Nothing is hidden if ``ENTROPY_PROBE_DEBUG`` is set.
    """
    if os.environ.get(DEBUG_VARIABLE):
        return
    logging.captureWarnings(True)
    logging.disable(logging.WARNING)
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
