"""What the runs of ``runs.py`` read: checkpoints and rollouts, made by plain torch from the demo's, the same each time.

Nothing here imports entropy_probe, whose code on either side of a redesign is what is compared.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

__all__ = ["DEMO_FILES", "make_inputs"]

DEMO_FILES = ("examples/tiny/checkpoint-20", "runs/demo/update.parquet", "runs/demo/evaluation.parquet")
"""What ``make demo`` leaves in a source tree and the set is built from."""
EVALUATION_SEQUENCES = 128


def make_inputs(tree: Path, directory: Path) -> None:
    """Fill a directory from the demo in a source tree.

    ``base``, ``checkpoint-20`` and ``checkpoint-15`` are the demo's; ``full/checkpoint-3`` and ``sgd/checkpoint-3``
    hold all weights of its base model after three steps of AdamW and SGD. ``update.parquet`` and
    ``evaluation.parquet`` are the demo's batches; ``messages.parquet`` and ``turns.parquet`` are update batches that
    results have something to say about. ``hashes.json`` says whether two sets of inputs are the same.

    Raises:
        FileNotFoundError: without the demo.
    """
    for name in DEMO_FILES:
        if not (tree / name).exists():
            raise FileNotFoundError(
                f"{tree / name}: expected the demo's files, found none; run `make demo` there first"
            )
    tiny, demo = tree / "examples" / "tiny", tree / "runs" / "demo"
    for name in ("base", "checkpoint-15", "checkpoint-20"):
        # the set asks for other settings than training had, which training_args.bin would contradict
        shutil.copytree(tiny / name, directory / name, ignore=shutil.ignore_patterns("training_args.bin"))
    for adapter in directory.glob("checkpoint-*/adapter_config.json"):
        settings = json.loads(adapter.read_text()) | {"base_model_name_or_path": str(directory / "base")}
        adapter.write_text(json.dumps(settings))
    lines = (tiny / "prompts.jsonl").read_text().splitlines(keepends=True)
    (directory / "prompts.jsonl").write_text("".join(lines))
    update = pq.read_table(demo / "update.parquet")
    evaluation = pq.read_table(demo / "evaluation.parquet").slice(0, EVALUATION_SEQUENCES)
    pq.write_table(update, directory / "update.parquet")
    pq.write_table(evaluation, directory / "evaluation.parquet")
    pq.write_table(_with_messages(update), directory / "messages.parquet")
    pq.write_table(_of_turns(update), directory / "turns.parquet")
    for optimizer in ("full", "sgd"):
        _train(directory, optimizer, evaluation)
    _write_hashes(directory)


def _with_messages(update: pa.Table) -> pa.Table:
    """Prompts under two ids each, a response that the trainer masks out, and rewards that are all equal in a group."""
    ids = update["prompt_id"].to_numpy()
    halves = pa.array(np.where(np.arange(len(ids)) % 8 < 4, ids, ids + 1000))
    masks = update["response_mask"].to_pylist()
    masks[3] = [False] * len(masks[3])
    advantage = update["advantage"].to_numpy().copy()
    advantage[8:16] = 0
    table = update.set_column(0, "prompt_id", halves)
    for name, values in (("response_mask", pa.array(masks)), ("advantage", pa.array(advantage))):
        table = table.set_column(table.column_names.index(name), name, values)
    return table


def _of_turns(update: pa.Table) -> pa.Table:
    """Pairs of rows are turns of one trajectory, with advantages per token and no recorded log-probabilities."""
    lengths = pc.list_value_length(update["response_token_ids"]).to_pylist()
    per_token = [
        [advantage * (1 - 0.01 * k) for k in range(length)]
        for advantage, length in zip(update["advantage"].to_pylist(), lengths, strict=True)
    ]
    table = update.drop_columns(["advantage", "sampled_logprobs"])
    table = table.append_column("advantage", pa.array(per_token, pa.list_(pa.float32())))
    return table.append_column("trajectory_id", pa.array(np.arange(len(lengths)) // 2))


def _train(directory: Path, name: str, rollouts: pa.Table) -> None:
    """Three steps of language modelling on the rollouts; saved as transformers' Trainer lays a checkpoint out."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory / "base", dtype=torch.float32)
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for n, p in named.items() if "norm" not in n and "bias" not in n], "weight_decay": 0.1},
        {"params": [p for n, p in named.items() if "norm" in n or "bias" in n], "weight_decay": 0.0},
    ]
    if name == "full":
        optimizer = torch.optim.AdamW(groups, lr=1e-4)
    else:
        optimizer = torch.optim.SGD(groups, lr=1e-4, momentum=0.9)
    for row in rollouts.slice(0, 3).to_pylist():
        ids = torch.tensor([row["prompt_token_ids"] + row["response_token_ids"]])
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    checkpoint = directory / name / "checkpoint-3"
    model.save_pretrained(checkpoint)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(directory / "base" / file, checkpoint)
    torch.save(optimizer.state_dict(), checkpoint / "optimizer.pt")
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": 3, "log_history": []}))


def _write_hashes(directory: Path) -> None:
    files = sorted(path for kind in ("*.safetensors", "*.parquet", "*.jsonl") for path in directory.rglob(kind))
    hashes = {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    (directory / "hashes.json").write_text(json.dumps(hashes, indent=1))
