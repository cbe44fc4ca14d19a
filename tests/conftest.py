"""Shapes are checked at run time in tests of functions; one torch thread, since tiny models only lose by more."""

import gc
import os
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import jaxtyping
import pytest
import torch

# Processes that tests start import this source tree and the tests, whatever is installed.
ROOT = Path(__file__).parents[1]
PATHS = [str(ROOT / "src"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
os.environ["PYTHONPATH"] = os.pathsep.join(PATHS)

# The user of these tests allows configs to name their functions.
USER = tempfile.TemporaryDirectory()
ALLOWED = Path(USER.name) / "entropy-probe" / "allowed"
ALLOWED.parent.mkdir()
ALLOWED.write_text("tests\n")
os.environ["XDG_CONFIG_HOME"] = USER.name


def jaxtyped(typechecker, decorate=jaxtyping.jaxtyped):
    """As the import hook uses it, but only where annotations have shapes, which are the strings in them.

    Making a check takes milliseconds, so none is made anew for functions within functions.
    """

    def decorated(f):
        shapes = any("'" in str(annotation) for annotation in f.__annotations__.values())
        return decorate(f, typechecker=typechecker) if shapes and "<locals>" not in f.__qualname__ else f

    return decorated


jaxtyping.jaxtyped = jaxtyped
jaxtyping.install_import_hook("entropy_probe", "beartype.beartype")
torch.set_num_threads(1)
os.fsync = lambda descriptor: None  # no test takes the power away, and the disk takes its time

pytest_plugins = ["tests.trained"]

UNCHECKED = [Path(__file__).parent / name for name in ("invariants", "cli", "demo")]
"""Whole probes, many of them: the check would take 40% of their time and see what unit tests have shown it. The marker
``checked`` is for those that alone reach a function, ``unchecked`` for what takes long elsewhere.
"""


@pytest.hookimpl(trylast=True)
def pytest_collection_finish():
    """The libraries and the tests stay: the collector of garbage need not look through them again and again."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item):
    checked = not any(place in item.path.parents for place in UNCHECKED)
    if item.get_closest_marker("checked" if not checked else "unchecked"):
        checked = not checked
    jaxtyping.config.update("jaxtyping_disable", not checked)
    return (yield)
