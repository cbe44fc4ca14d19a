"""Shapes are checked at run time in every test; one torch thread, since tiny models only lose by more."""

import torch
from jaxtyping import install_import_hook

install_import_hook("entropy_probe", "beartype.beartype")
torch.set_num_threads(1)
