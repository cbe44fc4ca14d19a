"""Calling the model libraries: their errors as one line, their notices off, the random state as it was."""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from logging import CRITICAL
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from entropy_probe.checkpoints.errors import CheckpointError, first_line

# What the libraries raise about files with impossible contents, besides errors of their own.
_BAD_FILES = (
    *(OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, ArithmeticError),
    *(AssertionError, ImportError, MemoryError, re.error),
)


class WithoutInitialization(TorchFunctionMode):
    """Leave out the initialisation of weights, which are written later or never: it would take time and memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Return the tensor that an initialiser was to fill."""
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


@contextmanager
def one_line_errors(where: str) -> Iterator[None]:
    """Turn what the libraries raise about bad files into one line."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        # tokenizers has no class of its own for what it finds in a file
        if not (isinstance(error, (*_BAD_FILES, SafetensorError, StrictDataclassError)) or type(error) is Exception):
            raise
        said = first_line(error, 300)
        if "connect to" in said and "couldn't find" in said:  # of the hub's client, which has several classes for it
            raise CheckpointError(
                f"{where}: expected a directory or a model of the hub that is in the cache or can be fetched, got no "
                "connection; pass base_model with a local copy, or fetch it first"
            ) from error
        raise CheckpointError(f"{where}: could not be loaded: {said}; check the path and the files") from error


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bar, load report or notice: what matters in them becomes an error of ours."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # peft 0.21 reads an attribute that transformers 5.23 renamed
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Leave the random states of Python, numpy and torch (CPU and CUDA) as they were."""
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002
