"""What processes of ``tests/processes.py`` find imported; nothing here computes, starts a thread or opens a file."""

import matplotlib.figure  # noqa: F401
import peft  # noqa: F401
import pyarrow.parquet  # noqa: F401
import torch
import transformers  # noqa: F401

import entropy_probe.cli.run
import entropy_probe.cli.sweep  # noqa: F401

torch.set_num_threads(1)
