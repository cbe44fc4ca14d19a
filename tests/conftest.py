"""Shapes are checked at run time in every test; one torch thread, since tiny models only lose by more."""

import os
from pathlib import Path

import torch
from jaxtyping import install_import_hook

# Processes that tests start import this source tree, whatever is installed.
PATHS = [str(Path(__file__).parents[1] / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
os.environ["PYTHONPATH"] = os.pathsep.join(PATHS)

install_import_hook("entropy_probe", "beartype.beartype")
torch.set_num_threads(1)
