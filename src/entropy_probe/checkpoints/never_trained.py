"""Parameters without an optimizer entry: accepted only if the weights show that the loss never reached them.

Adam makes a parameter's entry with its first gradient, and moves it by that step. So one that is exactly as training
began and has no entry never trained, provided that steps show in the weights at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from entropy_probe.checkpoints.optimizer_file import SavedOptimizer
from entropy_probe.checkpoints.weights import tensor_readers, unchanged, weight_files

__all__ = ["check_adapter_never_trained", "check_weights_never_trained"]


def check_weights_never_trained(
    saved: SavedOptimizer, names: tuple[str, ...], files: list[Path], start: Path | None
) -> None:
    """Check that full weights without an entry are as in the model that training started from.

    Args:
        saved: the optimizer's state.
        names: the parameter of each entry.
        files: the weight files.
        start: the directory of that model; None where it is not known.

    Raises:
        MappingError: if they are not, or if it would not show that they had trained.
    """
    lost = {names[index] for index in saved.never_trained}
    if not lost:
        return
    if start is None:
        raise _refusal(saved, ", and nothing to see by that they never trained; pass base_model")
    untouched = unchanged(files, weight_files(start, "model"))
    if lost - untouched:
        raise _refusal(saved, f", of which {min(lost - untouched)} is not as training began")
    # a step moves a norm's weight of 1 by about the learning rate, and bfloat16 has nothing between 1 and 1.0078
    _refuse_coarse(saved, lost, tensor_readers(files), (torch.float32, torch.float64))
    _refuse_still(saved, names, untouched)


def check_adapter_never_trained(
    saved: SavedOptimizer, names: tuple[str, ...], files: list[Path], inside: Mapping[str, str]
) -> None:
    """Check that a ``lora_A`` and ``lora_B`` both lack an entry, while ``lora_B`` is still 0, where it starts.

    Args:
        saved: the optimizer's state.
        names: the parameter of each entry.
        files: the adapter's files.
        inside: the parameters that start at 0, with their names in the files.

    Raises:
        MappingError: if that is not so, or if it would not show that they had trained.
    """
    lost = {names[index] for index in saved.never_trained}
    if not lost:
        return
    readers = tensor_readers(files)
    read = {name: readers[key] for name, key in inside.items() if key in readers}
    untouched = {name for name in read if not read[name]().any()}
    pairs = {name: name.replace(".lora_B.", ".lora_A.") for name in untouched & lost if ".lora_B." in name}
    explained = {name for pair in pairs.items() if lost.issuperset(pair) for name in pair}
    if lost - explained:
        name = min(lost - explained)
        raise _refusal(saved, f", of which {name} is not as training began, or is the only one of its pair")
    # away from 0 bfloat16 shows the smallest step too, float16 none below 6e-8
    _refuse_coarse(saved, set(pairs), read, (torch.float32, torch.float64, torch.bfloat16))
    _refuse_still(saved, names, untouched)


def _refusal(saved: SavedOptimizer, why: str) -> Exception:
    return saved.refusal_of(sorted(saved.never_trained), why)


def _refuse_coarse(
    saved: SavedOptimizer, lost: set[str], read: Mapping[str, Callable[[], Tensor]], fine: tuple[torch.dtype, ...]
) -> None:
    for name in sorted(lost):
        dtype = read[name]().dtype
        if dtype not in fine:
            raise _refusal(saved, f", and {name} is stored in {dtype}, where it may have trained without a change")


def _refuse_still(saved: SavedOptimizer, names: tuple[str, ...], untouched: set[str]) -> None:
    """Refuse if a parameter that did train is as training began too, as while a warm-up's rate is 0."""
    for index, name in enumerate(names):
        if name in untouched and index not in saved.never_trained and saved.state[index]["exp_avg"].any():
            raise _refusal(
                saved, f", and the weights do not show whether they trained: {name} did and is as training began"
            )
