"""A pytest plugin for `make test-latest`: deprecations fail, whether they are warnings or lines in a library's log."""

import logging

import pytest


def pytest_configure(config):
    """Deprecations as errors, except those that pyproject.toml ignores."""
    ignored = [line for line in config.getini("filterwarnings") if line.startswith("ignore")]
    for category in ("DeprecationWarning", "FutureWarning", "PendingDeprecationWarning"):
        config.addinivalue_line("filterwarnings", f"error::{category}")
    for line in ignored:
        config.addinivalue_line("filterwarnings", line)


class Deprecations(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        message = record.getMessage()
        if "deprecated" in message.lower():
            self.messages.append(f"{record.name}: {message}")


@pytest.fixture(autouse=True)
def no_deprecation_in_the_logs():
    """transformers logs most of its deprecations, through a logger that does not propagate."""
    handler = Deprecations()
    loggers = [logging.getLogger(name) for name in ("", "transformers")]
    for logger in loggers:
        logger.addHandler(handler)
    yield
    for logger in loggers:
        logger.removeHandler(handler)
    assert not handler.messages
