"""A fixed set of runs, whose numbers a redesign must leave as they are.

``PYTHONPATH=TREE/src python tests/redesign/runs.py OUT [NAME ...]`` writes each run into ``OUT/NAME/`` with whatever
entropy_probe is on the path, through what survives a redesign: the command line and the classes at the package's top.
``compare.py`` finds what differs between two such directories.
"""

from __future__ import annotations

import argparse
import os
import runpy
import shutil
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import yaml

__all__ = ["API_RUNS", "COMMANDS", "main"]

TREE = Path(__file__).resolve().parents[2]
FIXED = {
    "PYTHONHASHSEED": "0",  # the order of sets, in which numbers may be summed
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}
"""What has to be in the environment when the interpreter starts for two sets to have the same bits."""
# Loaded once, before the processes of the runs are forked from this one; nothing of entropy_probe.
LIBRARIES = (
    "arviz_stats.base.array",
    "matplotlib.backends.backend_agg",
    "matplotlib.backends.backend_svg",
    "matplotlib.figure",
    "peft",
    "pyarrow.dataset",
    "pyarrow.parquet",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.qwen2.modeling_qwen2",
)
LORA = {"checkpoint": "{inputs}/checkpoint-20", "base_model": "{inputs}/base"}
EARLIER = {"checkpoint": "{inputs}/checkpoint-15", "base_model": "{inputs}/base"}
FULL, SGD = {"checkpoint": "{inputs}/full/checkpoint-3"}, {"checkpoint": "{inputs}/sgd/checkpoint-3"}
GIVEN = {"rollouts": {"update": "{inputs}/update.parquet", "evaluation": "{inputs}/evaluation.parquet"}}
ALONE = {"rollouts": {"update": "{inputs}/update.parquet"}}
DRAWN = {
    "prompts": {"jsonl": "{inputs}/prompts.jsonl"},
    "reward": "exact_match",
    "update": {"num_prompts": 8, "group_size": 4},
    "evaluation": {"total_sequences": 64},
}
BIG_STEP = 0.03


def _probe(**settings: Any) -> dict[str, Any]:
    return {"probe": {"max_completion_length": 32} | settings}


COMMANDS: dict[str, tuple[str, dict[str, Any]]] = {
    "demo": ("run", LORA | DRAWN | _probe() | {"attribution": True, "attribution_folds": 4}),
    "given": ("run", LORA | GIVEN | _probe() | {"attribution": True, "attribution_folds": 4}),
    "one_batch": ("run", LORA | ALONE | _probe(geometry="frozen") | {"mode": "one_batch"}),
    "one_batch_blocks": (
        "run",
        LORA | ALONE | _probe(geometry="frozen", one_batch_units="block", block_size=2) | {"mode": "one_batch"},
    ),
    "one_batch_surprisal": (
        "run",
        LORA | ALONE | _probe(geometry="frozen", entropy="surprisal", normalization="sequence") | {"mode": "one_batch"},
    ),
    "own_batch": ("run", LORA | ALONE | _probe() | {"mode": "one_batch"}),
    "both": ("run", LORA | GIVEN | _probe() | {"mode": "both", "attribution": True}),
    "snis": ("run", LORA | GIVEN | _probe(realized="snis", log_weight_clamp=2.0)),
    "clip": ("run", LORA | GIVEN | _probe(realized="snis", is_mode="clip", weight_clip=3.0)),
    "psis": ("run", LORA | GIVEN | _probe(realized="snis", is_mode="psis")),
    "low_ess": ("run", LORA | GIVEN | _probe(learning_rate=BIG_STEP)),
    "low_ess_psis": ("run", LORA | GIVEN | _probe(on_low_ess="psis", min_ess_fraction=0.9999)),
    "low_ess_psis_refused": ("run", LORA | GIVEN | _probe(learning_rate=BIG_STEP, on_low_ess="psis")),
    "low_ess_resample": ("run", LORA | DRAWN | _probe(learning_rate=BIG_STEP, on_low_ess="resample")),
    "surprisal": ("run", LORA | GIVEN | _probe(entropy="surprisal", loss_type="grpo")),
    "per_sequence": ("run", LORA | GIVEN | _probe(normalization="sequence", loss_type="dr_grpo", realized="snis")),
    "surprisal_per_sequence": (
        "run",
        LORA | GIVEN | _probe(entropy="surprisal", normalization="sequence", loss_type="bnpo"),
    ),
    "cispo": ("run", LORA | GIVEN | _probe(loss_type="cispo", max_grad_norm=0.1)),
    "per_prompt_max": ("run", LORA | GIVEN | _probe(loss_type="per_prompt_max", max_grad_norm=None)),
    "frozen": ("run", LORA | GIVEN | _probe(geometry="frozen", frozen_max_scale=1e4) | {"attribution": True}),
    "reweighted": ("run", EARLIER | GIVEN | _probe(on_mismatch="reweight")),
    "mismatched": ("run", EARLIER | GIVEN | _probe(temperature=0.7, max_mismatch=0.01) | {"mode": "both"}),
    "messages": (
        "run",
        LORA | {"rollouts": {**GIVEN["rollouts"], "update": "{inputs}/messages.parquet"}} | _probe() | {"mode": "both"},
    ),
    "turns": (
        "run",
        LORA
        | {"rollouts": {**GIVEN["rollouts"], "update": "{inputs}/turns.parquet"}}
        | _probe(update_selected=True)
        | {"attribution": True},
    ),
    "prompt_units": (
        "run",
        LORA
        | {"rollouts": dict.fromkeys(("update", "evaluation"), "{inputs}/update.parquet")}
        | _probe(evaluation_unit="auto"),
    ),
    "two_passes": (
        "run",
        LORA
        | GIVEN
        | _probe(max_stored_gradient_gib=0.0, max_tokens_per_microbatch=512)
        | {"mode": "both", "attribution": True, "attribution_folds": 2},
    ),
    "autocast": ("run", LORA | GIVEN | _probe(autocast="bfloat16") | {"mode": "both"}),
    "bfloat16": ("run", LORA | GIVEN | _probe(dtype="bfloat16")),
    "float64": ("run", LORA | GIVEN | _probe(dtype="float64") | {"mode": "both"}),
    "full_weights": ("run", FULL | DRAWN | _probe(temperature=1.2) | {"mode": "both", "attribution": True}),
    "sgd": ("run", SGD | DRAWN | _probe()),
    "sweep": (
        "sweep",
        LORA | GIVEN | _probe() | {"sweep": {"smallest": 1e-4, "largest": 1e-2, "num": 5, "direct_curvature": True}},
    ),
    "sweep_checkpoints": (
        "sweep",
        {"base_model": "{inputs}/base"}
        | DRAWN
        | _probe()
        | {
            "sweep": {
                "checkpoints": ["{inputs}/checkpoint-15", "{inputs}/checkpoint-20"],
                "learning_rates": [1e-4, 3e-4, 1e-3],
            }
        },
    ),
    "validate": ("validate --subsets 8", LORA | GIVEN | _probe()),
    "ranks": ("run", LORA | DRAWN | _probe() | {"mode": "both", "attribution": True, "attribution_folds": 2}),
    "ranks_sweep": ("sweep", LORA | GIVEN | _probe() | {"sweep": {"learning_rates": [1e-4, 1e-3]}}),
    "sharded": ("run", FULL | DRAWN | _probe() | {"mode": "both", "shard": True}),
    "sharded_lora": ("run", LORA | GIVEN | _probe(geometry="frozen") | {"mode": "both", "shard": True}),
}
"""Command line and settings by the run's name; its output directory and device are added."""
RANKS = {"ranks": 3, "ranks_sweep": 3, "sharded": 2, "sharded_lora": 2}
INSPECTED = {"inspect_lora": LORA["checkpoint"], "inspect_full": FULL["checkpoint"], "inspect_sgd": SGD["checkpoint"]}
API_RUNS: dict[str, Callable[[Sequence[torch.nn.Parameter]], torch.optim.Optimizer]] = {
    "live_sgd": partial(torch.optim.SGD, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "live_rmsprop": partial(torch.optim.RMSprop, lr=1e-4),
    "live_adam": partial(torch.optim.Adam, lr=1e-4, weight_decay=0.1),
}
"""Live optimizers over the demo's policy, probed through ``EntropyProbe``."""


def live(out: Path, inputs: Path, make: Callable[..., torch.optim.Optimizer]) -> None:
    """Probe with an optimizer that has taken one step, too small to matter to the policy."""
    from entropy_probe import EntropyProbe, ProbeConfig, Rollouts, load_checkpoint

    state = load_checkpoint(inputs / "checkpoint-20", str(inputs / "base"), device="cpu")
    parameters = [p for p in state.model.parameters() if p.requires_grad]
    optimizer = make(parameters)
    rates = [group["lr"] for group in optimizer.param_groups]
    for p in parameters:
        p.grad = p.detach().clone()
    for group in optimizer.param_groups:
        group["lr"] = 1e-8
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    batches = {name: Rollouts.from_parquet(inputs / f"{name}.parquet") for name in ("update", "evaluation")}
    probe = EntropyProbe(state.model, optimizer, ProbeConfig(max_completion_length=32))
    probe.run(**batches).save(out)


def command(line: Sequence[str]) -> None:
    """``python -m entropy_probe`` in this process."""
    sys.argv = ["entropy_probe", *line]
    runpy.run_module("entropy_probe", run_name="__main__")


def fork(log: Path, work: Callable[[], None], **environment: str) -> int:
    """Start work in a process of its own, which finds the libraries imported; its id."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        os.environ |= {"COLUMNS": "120"} | environment
        for descriptor, suffix in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(log.with_suffix(f".{suffix}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True)
        work()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def finish(processes: Sequence[int]) -> list[int]:
    """Wait for processes; their exit codes."""
    return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]


def launch(size: int, log: Path, work: Callable[[], None]) -> list[int]:
    """The work on several ranks, told of each other as ``torchrun`` does; exit codes."""
    if size == 1:
        return finish([fork(log, work)])
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    shared = {
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    ranks = [
        fork(log.with_name(f"{log.name}-{rank}"), work, RANK=str(rank), LOCAL_RANK=str(rank), **shared)
        for rank in range(size)
    ]
    return finish(ranks)


def works(out: Path, inputs: Path) -> dict[str, tuple[Callable[[], None], tuple[int, ...]]]:
    """What each run does, and the exit codes it may end with, by name."""
    every: dict[str, tuple[Callable[[], None], tuple[int, ...]]] = {}
    for name, (line, settings) in COMMANDS.items():
        file = out / f"{name}.yaml"
        settings = settings | {"output_dir": str(out / name), "device": "cpu"}
        file.write_text(yaml.safe_dump(settings, sort_keys=False).replace("{inputs}", str(inputs)))
        first, *options = line.split()
        every[name] = partial(command, [first, str(file), *options]), (0,)
    for name, checkpoint in INSPECTED.items():
        path = checkpoint.format(inputs=inputs)
        base = ["--base-model", str(inputs / "base")] if name == "inspect_lora" else []
        every[name] = partial(command, ["inspect", path, *base, "--json"]), (0, 1)
    for name, make in API_RUNS.items():
        every[name] = partial(live, out / name, inputs, make), (0,)
    return every


def main() -> int:
    """Write the set; the number of runs that failed."""
    if any(os.environ.get(name) != value for name, value in FIXED.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | FIXED)
    sys.path.append(str(TREE))
    from tests.redesign.inputs import make_inputs

    parser = argparse.ArgumentParser(description="Write the runs whose numbers a redesign leaves as they are.")
    parser.add_argument("out", type=Path, help="a new directory, or with names one that may hold other runs")
    parser.add_argument("names", nargs="*", help="these runs only")
    parser.add_argument("--demo", type=Path, default=TREE, help="where `entropy-probe demo` was run")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    inputs, logs = out / "inputs", out / "logs"
    for library in LIBRARIES:
        import_module(library)
    torch.set_num_threads(1)
    if not (inputs / "hashes.json").exists():
        shutil.rmtree(inputs, ignore_errors=True)
        inputs.mkdir(parents=True)
        # in a process of its own: this one must not compute before it forks
        if finish([fork(out / "inputs", partial(make_inputs, arguments.demo.resolve(), inputs))]) != [0]:
            sys.exit((out / "inputs.stderr").read_text())
    logs.mkdir(exist_ok=True)
    every = works(out, inputs)
    unknown = set(arguments.names) - every.keys()
    if unknown:
        parser.error(f"names: expected some of {', '.join(every)}, got {', '.join(sorted(unknown))}")
    failed = 0
    for name in arguments.names or every:
        work, may_end_with = every[name]
        shutil.rmtree(out / name, ignore_errors=True)
        started = time.monotonic()
        codes = launch(RANKS.get(name, 1), logs / name, work)
        good = all(code in may_end_with for code in codes)
        if name in INSPECTED:
            (out / name).mkdir()
            shutil.copy(logs / f"{name}.stdout", out / name / "inspect.json")
        failed += not good
        print(
            f"{name}: {time.monotonic() - started:.1f} s{'' if good else f', FAILED with {codes}: see {logs}'}",
            flush=True,
        )
    return failed


if __name__ == "__main__":
    sys.exit(min(main(), 1))
