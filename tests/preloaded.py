"""What processes of ``tests/processes.py`` find imported; nothing here computes, starts a thread or opens a file."""
# ruff: noqa: F401

import gc

import arviz_stats.base.array
import matplotlib.backends.backend_agg
import matplotlib.backends.backend_svg
import matplotlib.figure
import pandas
import peft
import pyarrow.dataset
import pyarrow.parquet
import torch
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.tensor
import transformers.models.auto.modeling_auto
import transformers.models.auto.tokenization_auto
import transformers.models.qwen2.modeling_qwen2

import entropy_probe.cli.config
import entropy_probe.cli.output
import entropy_probe.cli.ranks
import entropy_probe.integrations.trl
import entropy_probe.parallel.shards
import entropy_probe.probe
import entropy_probe.sampling.hf

torch.set_num_threads(1)
gc.collect()
gc.freeze()  # what is imported stays: no process looks through it again
