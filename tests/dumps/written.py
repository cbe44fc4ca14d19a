"""One batch as each trainer dumps it: two prompts with two responses each, the fourth cut off and masked by some."""

from __future__ import annotations

import io
import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import torch

PROMPTS = ([5, 6, 7], [5, 6, 7], [8, 9], [8, 9])
RESPONSES = ([10, 11, 1], [12, 1], [13, 14, 15, 1], [16, 17])
REWARDS = (1.0, 0.0, 0.5, 0.25)
STD = (0.5**0.5, 0.25 * 0.5**0.5)
ADVANTAGES = tuple(
    x / (s + 1e-6) for x, s in zip((0.5, -0.5, 0.125, -0.125), (STD[0], STD[0], STD[1], STD[1]), strict=True)
)
SAMPLED = tuple([-0.1 * (i + 1) - j for j in range(len(r))] for i, r in enumerate(RESPONSES))
OLD = tuple([x - 0.01 for x in own] for own in SAMPLED)
STEP = 7


def jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def rows(**columns: Any) -> list[dict[str, Any]]:
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def open_instruct(folder: Path) -> Path:
    records = rows(
        step=[STEP] * 4, prompt_idx=[0, 0, 1, 1], prompt_tokens=PROMPTS, response_tokens=RESPONSES, reward=REWARDS,
        advantage=ADVANTAGES, logprobs=SAMPLED, finish_reason=["stop", "stop", "stop", "length"],
    )  # fmt: skip
    return jsonl(folder / "run_rollouts_000000.jsonl", records)


def nemo_rl(folder: Path) -> Path:
    length = 8

    def padded(prompt: list[int], values: list, fill: Any = 0) -> list:
        return [fill] * len(prompt) + values + [fill] * (length - len(prompt) - len(values))

    pairs = list(zip(PROMPTS, RESPONSES, strict=True))
    records = rows(
        content=["?"] * 4, rewards=REWARDS, input_lengths=[len(p) + len(r) for p, r in pairs],
        token_ids=[p + r + [0] * (length - len(p) - len(r)) for p, r in pairs],
        token_loss_mask=[padded(p, [1] * len(r)) for p, r in pairs], sample_loss_mask=[1.0] * 4,
        advantages=[[a] * length for a in ADVANTAGES],
        generation_logprobs=[padded(p, s, 0.0) for (p, _), s in zip(pairs, SAMPLED, strict=True)],
        prev_logprobs=[padded(p, s, 0.0) for (p, _), s in zip(pairs, OLD, strict=True)],
    )  # fmt: skip
    return jsonl(folder / f"train_data_step{STEP}.jsonl", records)


def prime_rl(folder: Path) -> Path:
    """Two ranks, prompts told apart by the mask alone."""
    folder = folder / "token_exports" / f"step_{STEP}"
    folder.mkdir(parents=True)
    for rank in range(2):
        own = range(2 * rank, 2 * rank + 2)
        records = [
            {
                "step": STEP, "rank": rank, "micro_step": i - 2 * rank, "token_ids": PROMPTS[i] + RESPONSES[i],
                "loss_mask": [False] * len(PROMPTS[i]) + [True] * len(RESPONSES[i]),
                "advantages": [None] * len(PROMPTS[i]) + [ADVANTAGES[i]] * len(RESPONSES[i]),
                "inference_logprobs": [0.0] * len(PROMPTS[i]) + SAMPLED[i], "trainer_logprobs": [0.0],
            }
            for i in own
        ]  # fmt: skip
        jsonl(folder / f"rank_{rank}.jsonl", records)
    (folder / "STABLE").touch()
    return folder


def slime(folder: Path) -> Path:
    samples = [
        {
            "group_index": i // 2, "index": i, "prompt": "?", "tokens": PROMPTS[i] + RESPONSES[i], "response": "?",
            "response_length": len(RESPONSES[i]), "reward": {"score": REWARDS[i]}, "loss_mask": None,
            "rollout_log_probs": SAMPLED[i], "status": "completed", "remove_sample": False,
            "metadata": {"n": np.float64(1)},
        }
        for i in range(4)
    ]  # fmt: skip
    path = folder / f"rollout_{STEP}.pt"
    torch.save({"rollout_id": STEP, "samples": samples}, path)
    return path


def serialised(tensor: torch.Tensor) -> dict[str, Any]:
    """As SkyRL's batch puts a tensor into a pickle."""
    if tensor.dtype == torch.bfloat16:
        buffer = io.BytesIO()
        torch.save(tensor, buffer)
        return {"format": "torch", "data": buffer.getvalue()}
    array = tensor.numpy()
    return {"format": "numpy", "data": array.tobytes(), "shape": array.shape, "dtype": str(array.dtype)}


def skyrl(folder: Path, module: str = "skyrl.backends.skyrl_train.training_batch") -> Path:
    """Left-padded, tensors of the response in line with the last columns, one row of padding behind."""
    width, length = 5, 8

    def left(values: list, size: int) -> list:
        return [0] * (size - len(values)) + values

    order = [0, 1, 2, 3, 0]
    tensors = {
        "sequences": torch.tensor([left(PROMPTS[i] + RESPONSES[i], length) for i in order]),
        "attention_mask": torch.tensor([left([1] * len(PROMPTS[i] + RESPONSES[i]), length) for i in order]),
        "response_mask": torch.tensor([left([1] * len(RESPONSES[i]), width) for i in order]),
        "loss_mask": torch.tensor([left([1.0] * len(RESPONSES[i]), width) for i in order[:4]] + [[0.0] * width]),
        "advantages": torch.tensor([left([ADVANTAGES[i]] * len(RESPONSES[i]), width) for i in order]),
        "rollout_logprobs": torch.tensor([left(SAMPLED[i], width) for i in order]),
        "action_log_probs": torch.tensor([left(OLD[i], width) for i in order]),
        "values": torch.zeros(5, width, dtype=torch.bfloat16),
    }
    state = {
        "batch_dict": {name: serialised(x) for name, x in tensors.items()} | {"pixel_values": None},
        "batch_size": 5, "device": torch.device("cpu"),
        "metadata": {"uids": ["a", "a", "b", "b", "pad0"], "pad_size": 1, "avg_response_length": np.float64(3)},
    }  # fmt: skip
    path = folder / f"global_step_{STEP}_training_input.pkl"
    path.write_bytes(pickled_batch(module, state))
    return path


def pickled_batch(module: str, state: Any) -> bytes:
    """A pickle that rebuilds a batch of a module that is not installed."""
    stand_in = ModuleType(module)
    kind = type("TrainingInputBatch", (dict,), {"__module__": module})

    def rebuild(cls: type, state: Any) -> None: ...

    rebuild.__module__, rebuild.__name__, rebuild.__qualname__ = module, *(("_rebuild_tensor_batch",) * 2)
    kind.__reduce__ = lambda self: (rebuild, (kind, state))  # type: ignore[method-assign]
    vars(stand_in).update(TrainingInputBatch=kind, _rebuild_tensor_batch=rebuild)
    parents = [module.rsplit(".", n)[0] for n in range(1, module.count(".") + 1)]
    put = {name: ModuleType(name) for name in parents} | {module: stand_in}
    sys.modules.update(put)
    try:
        return pickle.dumps(kind())
    finally:
        for name in put:
            del sys.modules[name]


WITH_IDS: dict[str, Callable[[Path], Path]] = {
    "open-instruct": open_instruct,
    "NeMo-RL": nemo_rl,
    "prime-rl": prime_rl,
    "slime": slime,
    "SkyRL": skyrl,
}

TEXTS = ("12", "345", "6", "78901234")
ASKED = ("1+1=", "1+1=", "2+2=", "2+2=")


def trl(folder: Path, **more: Any) -> Path:
    columns = {
        "step": [STEP] * 4, "prompt": ASKED, "completion": TEXTS, "correct": REWARDS, "advantage": ADVANTAGES, **more,
    }  # fmt: skip
    path = folder / "completions" / f"completions_{STEP:05d}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(columns).to_parquet(path)
    return path


def ms_swift(folder: Path) -> Path:
    table = {
        "step": [str(STEP)] * 4, "prompt": ASKED, "completion": TEXTS, "Accuracy": REWARDS, "advantages": ADVANTAGES,
        "solution": ["2", "2", "4", "4"], "entropy": [0.5] * 4,
    }  # fmt: skip
    return jsonl(folder / "completions.jsonl", [table | {"step": [str(STEP - 1)] * 4}, table])


def verl(folder: Path) -> Path:
    records = rows(input=ASKED, output=TEXTS, gts=["2", "2", "4", "4"], score=REWARDS, step=[STEP] * 4, acc=REWARDS)
    return jsonl(folder / f"{STEP}.jsonl", records)


def verifiers(folder: Path) -> Path:
    records = rows(
        example_id=[3, 3, 9, 9], prompt=ASKED, completion=[[{"role": "assistant", "content": text}] for text in TEXTS],
        reward=REWARDS, is_truncated=[False, False, False, True],
    )  # fmt: skip
    return jsonl(folder / "results.jsonl", records)


OF_TEXT: dict[str, Callable[[Path], Path]] = {
    "TRL": trl, "ms-swift": ms_swift, "verl": verl, "verifiers": verifiers,
}  # fmt: skip
