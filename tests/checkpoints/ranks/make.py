"""Makes the archives beside it: steps 2 and 3 of tiny policies on a few ranks, as verl and DeepSpeed leave them.

    python -m tests.checkpoints.ranks.make CASE...      from the repository's root; one process per case is enough

Cases beginning with ``fsdp`` need torch alone: the files are those of verl's FSDPCheckpointManager, by the same calls.
Cases beginning with ``zero`` need deepspeed 0.19. Each archive has ``base``, the checkpoints, and ``truth-K.pt``: by
parameter what the library itself gathers of weight, exp_avg and exp_avg_sq after step K, and of the gradient of step K.
"""

from __future__ import annotations

import json
import os
import sys
import tarfile
import tempfile
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from entropy_probe.demo.policy import build_model

HERE = Path(__file__).parent
SIZES = {"vocab_size": 31, "hidden_size": 12, "num_heads": 2, "num_key_value_heads": 1, "intermediate_size": 16}
LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]}
BOTH = ("exp_avg", "exp_avg_sq")
MOMENTS = {"fsdp1-original": ("exp_avg_sq",)}  # of which torch 2.13 gathers exp_avg_sq under both names on a CPU
RANKS = {"fsdp1-tied": 5, "fsdp2-copies": 4, "zero2-full": 4, "zero3-full": 4}
CASES = (
    *("fsdp2-full", "fsdp2-lora", "fsdp2-frozen", "fsdp2-copies"),
    *("fsdp1-full", "fsdp1-tied", "fsdp1-lora", "fsdp1-original", "fsdp1-shards"),
    *("zero1-full", "zero1-float", "zero2-full", "zero2-lora", "zero3-full", "zero3-lora"),
)


def policy(case: str) -> torch.nn.Module:
    model: Any = build_model("qwen2", initializer_range=0.2, tie_word_embeddings=case == "fsdp1-tied", **SIZES)
    if case == "fsdp2-frozen":
        for layer in model.model.layers[:1]:
            layer.requires_grad_(False)
    if case.endswith("lora"):
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", bias="none", **LORA))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    return model.train()


def loss(model: Any, rank: int, step: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(100 * step + rank)
    ids = torch.randint(2, SIZES["vocab_size"], (4, 9), generator=random)
    logits = model(input_ids=ids, use_cache=False).logits.float()
    chosen = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return -(torch.randn(4, 1, generator=random) * chosen).mean()


def fsdp(case: str, out: Path, rank: int, world: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    model = policy(case)
    two = case == "fsdp2-copies"
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ddp", "fsdp")) if two else init_device_mesh("cpu", (world,))
    wrapped, gradients = (one if case.startswith("fsdp1") else each)(case, model, mesh)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-3, weight_decay=0.01)
    for step in (1, 2, 3):
        optimizer.zero_grad()
        loss(wrapped, rank, step).backward()
        taken = gradients()
        optimizer.step()
        if step > 1:
            weights, state = gathered(case, wrapped, optimizer)
            save(out / f"global_step_{step}" / "actor", rank, world, wrapped, optimizer, case)
            if rank == 0:
                torch.save(
                    {
                        name: {"weight": weights[name], **{k: own[k].clone() for k in MOMENTS.get(case, BOTH)}}
                        | {"gradient": taken[name]}
                        for name, own in state.items()
                    },
                    out / f"truth-{step}.pt",
                )


def each(case: str, model: Any, mesh: Any):
    from torch.distributed.fsdp import fully_shard

    inner = model.base_model.model if case.endswith("lora") else model
    for layer in inner.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, lambda: {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}


def one(case: str, model: Any, mesh: Any):
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
    from torch.distributed.fsdp.wrap import _or_policy, lambda_auto_wrap_policy, transformer_auto_wrap_policy

    layers = partial(
        transformer_auto_wrap_policy,
        transformer_layer_cls={type(m) for m in model.modules() if type(m).__name__ == "Qwen2DecoderLayer"},
    )

    def trained_leaf(module: torch.nn.Module) -> bool:
        weight = getattr(module, "weight", None)
        return not list(module.named_children()) and weight is not None and weight.requires_grad

    adapter = partial(lambda_auto_wrap_policy, lambda_fn=trained_leaf)
    wrap = partial(_or_policy, policies=[adapter, layers]) if case.endswith("lora") else layers
    wrapped = FSDP(
        model,
        auto_wrap_policy=wrap,
        device_id=torch.device("cpu"),
        device_mesh=None if case == "fsdp1-shards" else mesh,
        use_orig_params=case == "fsdp1-original",
    )

    def gradients() -> dict[str, torch.Tensor]:
        if case == "fsdp1-original":
            with FSDP.summon_full_params(wrapped, with_grads=True):
                return {
                    n.replace("_fsdp_wrapped_module.", ""): p.grad.clone()
                    for n, p in wrapped.named_parameters()
                    if p.grad is not None
                }
        whole = {}
        for module in FSDP.fsdp_modules(wrapped):
            flat = module._flat_param
            if flat is None or flat.grad is None:
                continue
            prefix = next(n for n, p in wrapped.named_parameters() if p is flat)
            prefix = prefix.replace("_fsdp_wrapped_module.", "").replace("_flat_param", "")
            pieces = [torch.empty_like(flat.grad) for _ in range(dist.get_world_size())]
            dist.all_gather(pieces, flat.grad)
            at, joined = 0, torch.cat(pieces)
            for name, shape in zip(flat._fqns, flat._shapes, strict=True):
                whole[prefix + name] = joined[at : at + shape.numel()].view(shape).clone()
                at += shape.numel()
        return whole

    return wrapped, gradients


def gathered(case: str, model: Any, optimizer: Any):
    if case.startswith("fsdp1"):
        from torch.distributed.fsdp import FullOptimStateDictConfig, FullStateDictConfig, StateDictType
        from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

        with FSDP.state_dict_type(
            model,
            StateDictType.FULL_STATE_DICT,
            FullStateDictConfig(rank0_only=False),
            FullOptimStateDictConfig(rank0_only=False),
        ):
            return {k: v.clone() for k, v in model.state_dict().items()}, FSDP.optim_state_dict(model, optimizer)[
                "state"
            ]
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_optimizer_state_dict,
    )

    full = StateDictOptions(full_state_dict=True)
    return get_model_state_dict(model, options=full), get_optimizer_state_dict(model, optimizer, options=full)["state"]


@contextmanager
def sharded_state(case: str, model: Any):
    """verl's ``get_fsdp_state_ctx`` with ``SHARDED_STATE_DICT``."""
    if not case.startswith("fsdp1"):
        yield
        return
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
    from torch.distributed.fsdp import ShardedOptimStateDictConfig, ShardedStateDictConfig, StateDictType

    with FSDP.state_dict_type(
        model, StateDictType.SHARDED_STATE_DICT, ShardedStateDictConfig(), ShardedOptimStateDictConfig()
    ):
        yield


def save(place: Path, rank: int, world: int, model: Any, optimizer: Any, case: str) -> None:
    place.mkdir(parents=True, exist_ok=True)
    with sharded_state(case, model):
        torch.save(model.state_dict(), place / f"model_world_size_{world}_rank_{rank}.pt")
    torch.save(optimizer.state_dict(), place / f"optim_world_size_{world}_rank_{rank}.pt")
    if rank == 0:
        version = int(case[4])
        (place / "fsdp_config.json").write_text(json.dumps({"FSDP_version": version, "world_size": world}))
        policy("plain" if case != "fsdp1-tied" else case).config.save_pretrained(place / "huggingface")
        if case.endswith("lora"):
            meta = {"r": LORA["r"], "lora_alpha": LORA["lora_alpha"], "task_type": "CAUSAL_LM"}
            (place / "lora_train_meta.json").write_text(json.dumps(meta))


def zero(case: str, out: Path, rank: int, world: int) -> None:
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad, safe_get_full_optimizer_state

    settings: dict[str, Any] = {"stage": int(case[4]), "reduce_bucket_size": 500000, "contiguous_gradients": True}
    if settings["stage"] == 3:
        settings |= {"stage3_param_persistence_threshold": 0, "sub_group_size": 1500}
    model = policy(case)
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    rest = [n for n, _ in trained if any(x in n for x in ("bias", "layernorm.weight", "norm.weight"))]
    groups = [
        {"params": [p for n, p in trained if n not in rest], "weight_decay": 0.01},
        {"params": [p for n, p in trained if n in rest], "weight_decay": 0.0},
    ]
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": settings,
        "gradient_clipping": 1e9,  # 0 is taken for the default, 1
        "bf16": {"enabled": case != "zero1-float"},
        "data_types": {"grad_accum_dtype": "fp32" if case == "zero1-full" else None},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "torch_adam": True}},
    }
    engine, optimizer, _, _ = deepspeed.initialize(
        model=model, model_parameters=[g for g in groups if g["params"]], config=config
    )
    for step in (1, 2, 3):
        engine.backward(loss(engine, rank, step))
        gradients = {
            n: safe_get_full_grad(p).float().clone() for n, p in engine.module.named_parameters() if p.requires_grad
        }
        engine.step()
        if step == 1 and hasattr(optimizer, "_hp_optimizer_states_linked"):  # 0.19.8 links only the first group's
            optimizer._hp_optimizer_states_linked = False
            optimizer._lazy_init_hp_params_optimizer_state()
        if step > 1:
            engine.save_checkpoint(str(out), tag=f"global_step{step}", client_state={"episode": 0}, save_latest=True)
        truth = {
            n: {
                "weight": safe_get_full_fp32_param(p).clone(),
                **{k: safe_get_full_optimizer_state(p, k).clone() for k in ("exp_avg", "exp_avg_sq")},
                "gradient": gradients[n],
            }
            for n, p in engine.module.named_parameters()
            if p.requires_grad
        }
        if step > 1 and rank == 0:
            torch.save(truth, out / f"truth-{step}.pt")


def of_rank(case: str, out: Path, rank: int, world: int, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu"}
    torch.set_num_threads(1)
    if case.startswith("zero"):
        import deepspeed

        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # an optional kernel that would be compiled
        deepspeed.init_distributed("gloo")
    else:
        dist.init_process_group("gloo")
    (zero if case.startswith("zero") else fsdp)(case, out, rank, world)
    dist.barrier()


def make(case: str) -> None:
    world = RANKS.get(case, 2)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / case
        policy("fsdp1-tied" if case == "fsdp1-tied" else "plain").save_pretrained(out / "base")
        start = torch.multiprocessing.start_processes
        start(_started, (case, out, world, 29500 + os.getpid() % 400), nprocs=world, start_method="spawn")
        with tarfile.open(HERE / f"{case}.tar.xz", "w:xz", preset=9) as archive:
            for file in sorted(out.rglob("*")):
                if file.is_file() and file.suffix != ".py" and file.name != "generation_config.json":
                    archive.add(file, file.relative_to(out))
    sys.stdout.write(f"{case}: {(HERE / f'{case}.tar.xz').stat().st_size:,} bytes\n")


def _started(rank: int, case: str, out: Path, world: int, port: int) -> None:
    of_rank(case, out, rank, world, port)


if __name__ == "__main__":
    for name in sys.argv[1:] or CASES:
        make(name)
