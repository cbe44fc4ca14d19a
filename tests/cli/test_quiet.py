"""What libraries say does not reach the console of a normal run, and all of it does on request."""

from __future__ import annotations

import pytest

from tests.cli.conftest import execute

SPEAK = """
import logging, warnings
from entropy_probe.cli.quiet import quiet_libraries
quiet_libraries()
from transformers.utils import logging as with_a_handler_of_its_own
warnings.warn("a name is deprecated", FutureWarning)
logging.getLogger("peft.tuners").warning("a setting is ignored")
with_a_handler_of_its_own.get_logger("transformers.models").warning("an argument is deprecated")
logging.getLogger("peft.tuners").error("a file is broken")
"""


@pytest.mark.parametrize(("debug", "warned"), [("", False), ("1", True)])
def test_libraries_speak_of_errors_only_unless_asked(debug, warned):
    said = execute(command=("-c", SPEAK), ENTROPY_PROBE_DEBUG=debug).stderr
    assert "a file is broken" in said
    for text in ("a name is deprecated", "a setting is ignored", "an argument is deprecated"):
        assert (text in said) == warned, said
    assert warned or said == "a file is broken\n"
