"""The probe's step against the one that TRL took: the same batch, the same moments, setting by setting.

A tiny Qwen2 is trained with TRL's own trainers on the CPU in float32. Before the optimizer's step, the microbatches
that the trainer computed its loss on are made into rollouts, and the probe is asked for the clipped gradient and the
parameter change of this step; both are compared with what the trainer has in ``.grad`` and with what it then writes.
The errors are relative, norm over norm. vLLM is not run: its log-probabilities are the policy's with noise.

Run ``python benchmarks/trl_steps.py`` (some minutes); it prints the table of ``benchmarks/RESULTS.md``.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from entropy_probe import EntropyProbe, ProbeConfig, Rollouts
from entropy_probe.analyses.batches import admit_batches
from entropy_probe.analyses.plan import plan
from entropy_probe.demo.policy import build_model, build_tokenizer
from entropy_probe.demo.train import CPU_ARGUMENTS, LORA_TARGETS, quiet_single_thread
from entropy_probe.integrations.trl_batch import Watch
from entropy_probe.parallel.ranks import ALONE

TARGET = 1e-4
STEP = 4
"""The step that is compared; with two iterations the second one on its rollouts."""
SHORT = {"epsilon": 0.05, "num_iterations": 2}
"""A narrow clip range, so that many tokens of a small model reach its ends in the second step on the same rollouts."""
VLLM = {"vllm": True, "vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": 1.05}
LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo")

SETTINGS: dict[str, dict[str, Any]] = {
    **{f"{name}": {"loss_type": name} for name in LOSSES},
    **{f"{name}, 2 iterations": {"loss_type": name} | SHORT for name in LOSSES},
    **{f"{name}, accumulation 4": {"loss_type": name, "gradient_accumulation_steps": 4} for name in LOSSES},
    "dapo, ε_high 0.28, KL 0.04": {"epsilon_high": 0.28, "beta": 0.04},
    "dapo, ε_high 0.28, KL 0.04, 2 iterations": {"epsilon_high": 0.28, "beta": 0.04} | SHORT,
    "GSPO": {"importance_sampling_level": "sequence"},
    "GSPO, 2 iterations": {"importance_sampling_level": "sequence", "epsilon": 0.1, "num_iterations": 2},
    "GSPO, grpo, KL 0.1, 2 iterations": {
        "loss_type": "grpo", "importance_sampling_level": "sequence", "beta": 0.1, "num_iterations": 2,
    },
    "luspo by sequence, 2 iterations": {"loss_type": "luspo", "importance_sampling_level": "sequence"} | SHORT,
    "cispo, ε_high 5": {"loss_type": "cispo", "epsilon_high": 5.0, "num_iterations": 2},
    "cispo, ε_high 1.02": {"loss_type": "cispo", "epsilon_high": 1.02, "num_iterations": 2},
    "cispo by sequence": {"loss_type": "cispo", "importance_sampling_level": "sequence", "num_iterations": 2},
    "sapo, temperatures 2 and 0.5": {
        "loss_type": "sapo", "sapo_temperature_pos": 2.0, "sapo_temperature_neg": 0.5, "num_iterations": 2,
    },
    "sapo by sequence": {"loss_type": "sapo", "importance_sampling_level": "sequence", "num_iterations": 2},
    "vespo, own shape": {"loss_type": "vespo", "vespo_k_pos": 1.0, "vespo_lambda_neg": 4.0, "num_iterations": 2},
    "δ 1.02": {"delta": 1.02} | SHORT,
    "ε 0.01, ε_high 0.03": SHORT | {"epsilon_high": 0.03},
    "4 iterations": {"num_iterations": 4, "epsilon": 0.01},
    "KL 0.04": {"beta": 0.04},
    "KL 0.5": {"beta": 0.5},
    "KL 0.5, grpo": {"beta": 0.5, "loss_type": "grpo"},
    "KL 0.5, dr_grpo": {"beta": 0.5, "loss_type": "dr_grpo"},
    "KL 0.5 without bias correction": {"beta": 0.5, "use_bias_correction_kl": False},
    "KL 0.5, 2 iterations": {"beta": 0.5} | SHORT,
    "KL 0.5 without bias correction, 2 iterations": {"beta": 0.5, "use_bias_correction_kl": False} | SHORT,
    "KL 0.5, LoRA": {"beta": 0.5, "lora": True},
    "entropy bonus 0.01": {"entropy_coef": 0.01},
    "entropy bonus 0.1": {"entropy_coef": 0.1},
    "entropy bonus 0.1, grpo": {"entropy_coef": 0.1, "loss_type": "grpo"},
    "entropy bonus 0.1, accumulation 4": {"entropy_coef": 0.1, "gradient_accumulation_steps": 4},
    "entropy bonus 0.1, top 20% of entropy": {"entropy_coef": 0.1, "top_entropy_quantile": 0.2},
    "adaptive entropy bonus, on": {"entropy_coef": 0.1, "use_adaptive_entropy": True, "entropy_target": 9.0},
    "adaptive entropy bonus, off": {"entropy_coef": 0.1, "use_adaptive_entropy": True, "entropy_target": 0.1},
    "top 20% of entropy": {"top_entropy_quantile": 0.2},
    "top 50% of entropy, accumulation 4": {"top_entropy_quantile": 0.5, "gradient_accumulation_steps": 4},
    "top 50% of entropy, GSPO, 2 iterations": {
        "top_entropy_quantile": 0.5, "importance_sampling_level": "sequence", "num_iterations": 2,
    },
    "off-policy mask": {"off_policy_mask_threshold": 1e-3, "num_iterations": 2},
    "truncated masked": {"mask_truncated_completions": True},
    "truncated masked, grpo": {"mask_truncated_completions": True, "loss_type": "grpo"},
    "truncated masked, dr_grpo": {"mask_truncated_completions": True, "loss_type": "dr_grpo"},
    "truncated masked, bnpo, accumulation 4": {
        "mask_truncated_completions": True, "loss_type": "bnpo", "gradient_accumulation_steps": 4,
    },
    "accumulation 4, 2 steps per generation": {"gradient_accumulation_steps": 4, "steps_per_generation": 2},
    "accumulation 4, 8 steps per generation": {"gradient_accumulation_steps": 4, "steps_per_generation": 8},
    "accumulation 2, 8 steps per generation, grpo": {
        "gradient_accumulation_steps": 2, "steps_per_generation": 8, "loss_type": "grpo",
    },
    "accumulation 2, 4 steps per generation, KL, bonus": {
        "gradient_accumulation_steps": 2, "steps_per_generation": 4, "beta": 0.1, "entropy_coef": 0.05,
    },
    "accumulation 4, 2 iterations, bnpo": {"gradient_accumulation_steps": 4, "loss_type": "bnpo"} | SHORT,
    "vLLM, token_truncate": VLLM,
    "vLLM, token_mask": VLLM | {"vllm_importance_sampling_mode": "token_mask"},
    "vLLM, sequence_truncate": VLLM | {"vllm_importance_sampling_mode": "sequence_truncate"},
    "vLLM, sequence_mask": VLLM | {"vllm_importance_sampling_mode": "sequence_mask"},
    "vLLM, vespo, 2 iterations": VLLM | {"loss_type": "vespo", "num_iterations": 2},
    "vLLM, off-policy mask, 2 iterations": VLLM | {"off_policy_mask_threshold": 1e-3, "num_iterations": 2},
    "vLLM, no correction": VLLM | {"vllm_importance_sampling_correction": False},
    "temperature 0.7, entropy bonus 0.1": {"temperature": 0.7, "entropy_coef": 0.1},
    "LoRA": {"lora": True},
    "LoRA, 2 iterations": {"lora": True} | SHORT,
    "GMPO": {"trainer": "gmpo"},
    "GMPO, 2 iterations, KL, top 50% of entropy": {
        "trainer": "gmpo", "num_iterations": 2, "beta": 0.1, "top_entropy_quantile": 0.5, "epsilon": 0.01,
    },
    "RLOO": {"trainer": "rloo"},
    "RLOO, 2 iterations": {"trainer": "rloo", "num_iterations": 2, "epsilon": 0.9, "epsilon_high": 20.0},
    "RLOO, accumulation 4, KL 0.1": {"trainer": "rloo", "gradient_accumulation_steps": 4, "beta": 0.1},
}  # fmt: skip

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "2 iterations, rollouts without old_logprobs": (SHORT, "old_logprobs"),
    "2 steps per generation, rollouts without old_logprobs": ({"steps_per_generation": 2}, "old_logprobs"),
    "KL term, full weights, no reference": ({"beta": 0.1}, "reference_logprobs"),
    "vLLM, rollouts without sampled_logprobs": (VLLM, "sampled_logprobs"),
}
"""What the probe refuses: settings, and a column that the batch then lacks."""


def compare(setting: Mapping[str, Any], without: str = "") -> dict[str, float]:
    """The relative errors of the probe's clipped gradient and parameter change at one step of a run.

    Args:
        setting: arguments of the trainer, and ``trainer``, ``lora``, ``vllm``.
        without: a column that the batch is to lack.

    Raises:
        ValueError: if the probe refuses.
    """
    setting = dict(setting)
    kind, lora, vllm = setting.pop("trainer", "grpo"), setting.pop("lora", False), setting.pop("vllm", False)
    with quiet_single_thread(), tempfile.TemporaryDirectory() as directory:
        trainer = _trainer(kind, Path(directory), setting, lora=lora, vllm=vllm)
        seen = _Watch(trainer, kind, without=without)
        trainer.add_callback(seen.callback())
        trainer.train()
    if seen.refusal is not None:
        raise seen.refusal
    assert seen.planned is not None
    gradient, step = seen.planned.step.gradient, seen.planned.step.delta
    written = {name: seen.after[name] - x for name, x in seen.before.items()}
    return {
        "gradient": _distance(gradient.values, seen.gradient),
        "step": _distance(step, written),
        "clip_factor": gradient.factor,
        "tokens": float(seen.rollouts.response_mask.sum()),
        "ratio": seen.largest_log_ratio(),
    }


def _distance(ours: Mapping[str, Any], theirs: Mapping[str, torch.Tensor]) -> float:
    missing = (name for name, x in theirs.items() if ours.get(name) is None and bool(x.any()))
    assert next(missing, None) is None
    pairs = [(ours[name].double(), x.double()) for name, x in theirs.items() if ours.get(name) is not None]
    off = sum(float((a - b).square().sum()) for a, b in pairs)
    return (off / sum(float(b.square().sum()) for _, b in pairs)) ** 0.5


def _reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """The share of odd token ids, and less for long responses."""
    return [sum(i % 2 for i in ids) / len(ids) - 0.01 * len(ids) for ids in completion_ids]


def _trainer(kind: str, directory: Path, setting: Mapping[str, Any], *, lora: bool, vllm: bool) -> Any:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PrinterCallback
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
    from trl.experimental.gmpo import GMPOConfig, GMPOTrainer

    of_kind: dict[str, Any] = {
        "grpo": (GRPOConfig, GRPOTrainer),
        "gmpo": (GMPOConfig, GMPOTrainer),
        "rloo": (RLOOConfig, RLOOTrainer),
    }
    settings, trainer = of_kind[kind]
    common = {k: v for k, v in CPU_ARGUMENTS.items() if kind == "grpo" or k not in ("loss_type", "beta")}
    arguments = {
        "max_steps": STEP, "save_strategy": "no", "per_device_train_batch_size": 8, "num_generations": 4,
        "max_completion_length": 40, "learning_rate": 5e-4, "seed": 0,
    }  # fmt: skip
    model = build_model(initializer_range=0.2)
    model.save_pretrained(directory / "base")  # where the trainer takes a reference from
    model.name_or_path = model.config._name_or_path = str(directory / "base")
    found = trainer(
        model=model,
        reward_funcs=_reward,
        args=settings(str(directory), **(common | arguments | dict(setting))),
        train_dataset=Dataset.from_list([{"prompt": f"{a}+{b}="} for a in range(10) for b in range(10)]),
        processing_class=build_tokenizer(),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=LORA_TARGETS) if lora else None,
    )
    found.remove_callback(PrinterCallback)
    if vllm:
        _with_sampler(found)
    return found


def _with_sampler(trainer: Any) -> None:
    """Log-probabilities of a sampler that is not quite the policy, as vLLM has them."""
    generate = trainer._generate_single_turn

    def with_logprobs(prompt_ids: Any, *args: Any) -> tuple[Any, Any]:
        trainer.use_vllm = False
        completion_ids, _ = generate(prompt_ids, *args)
        trainer.use_vllm = True
        source = torch.Generator().manual_seed(trainer._step)
        found = []
        for prompt, response in zip(prompt_ids, completion_ids, strict=True):
            ids = torch.tensor([[*prompt, *response]])
            with torch.no_grad():
                logits = trainer.model(input_ids=ids).logits[0, len(prompt) - 1 : -1] / trainer.temperature
            own = logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0]
            found.append((own + 0.05 * torch.randn(own.shape, generator=source)).tolist())
        return completion_ids, found

    trainer._generate_single_turn, trainer.use_vllm = with_logprobs, True


class _Watch:
    """What the trainer computes its loss on, and what the probe makes of it before the step."""

    def __init__(self, trainer: Any, kind: str, *, without: str) -> None:
        self.trainer, self.kind, self.without = trainer, kind, without
        self.watch = Watch(trainer)
        self.planned: Any = None
        self.refusal: ValueError | None = None
        self.before: dict[str, torch.Tensor] = {}
        self.after: dict[str, torch.Tensor] = {}
        self.gradient: dict[str, torch.Tensor] = {}

    def callback(self) -> Any:
        from transformers import TrainerCallback

        watch = self

        class Callback(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                watch.watch.clear()

            def on_pre_optimizer_step(
                self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **_: Any
            ) -> None:
                if state.global_step == STEP - 1:
                    watch.look(model, optimizer)

            def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
                if state.global_step == STEP:
                    watch.after = {n: p.detach().clone() for n, p in model.named_parameters() if n in watch.before}

        return Callback()

    def look(self, model: Any, optimizer: Any) -> None:
        """The trainer's gradient, and the probe's step on its batch."""
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.gradient = {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}
        self.before = {name: p.detach().clone() for name, p in trained.items()}
        batch = self.watch.batch(ALONE)
        self.rollouts = replace(batch.rollouts, **{self.without: None}) if self.without else batch.rollouts
        args = self.trainer.args
        config = ProbeConfig(
            loss=batch.loss, temperature=args.temperature, max_completion_length=args.max_completion_length,
            max_grad_norm=args.max_grad_norm, merge_equal_prompts=False, measure_noise_floor=False,
        )  # fmt: skip
        probe = EntropyProbe(model, optimizer, config)
        try:
            with probe._opened() as policy:
                self.planned = plan(policy, *admit_batches(policy, self.rollouts, _any_rollouts()), shares=False)
        except ValueError as error:
            self.refusal = error

    def largest_log_ratio(self) -> float:
        """How far the policy has moved from the old one on this batch."""
        if self.rollouts.old_logprobs is None or self.planned.batch.scores is None:
            return 0.0
        gap = (self.planned.batch.scores.logprobs - self.rollouts.old_logprobs).masked_fill(
            ~self.rollouts.response_mask, 0.0
        )
        return float((gap.sum(1) if self.kind == "rloo" else gap).abs().max())


def _any_rollouts() -> Rollouts:
    """An evaluation batch, which the step does not depend on."""
    ids = torch.randint(2, 90, (4, 6), generator=torch.Generator().manual_seed(0))
    return Rollouts(ids, torch.ones_like(ids), torch.arange(6).expand(4, 6) > 2, torch.arange(4))


def table(figures: Mapping[str, Mapping[str, float]], refusals: Mapping[str, str]) -> str:
    """The figures as a table in Markdown, and what is refused below it."""
    lines = ["| setting | gradient | step | clip factor | largest log ratio |", "|---|---|---|---|---|"]
    for name, x in figures.items():
        lines.append(f"| {name} | {x['gradient']:.1e} | {x['step']:.1e} | {x['clip_factor']:.2f} | {x['ratio']:.3f} |")
    lines += ["", "Refused:", "", *(f"- {name}: `{text}`" for name, text in refusals.items())]
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    wanted = {name: x for name, x in SETTINGS.items() if not arguments or any(a in name for a in arguments)}
    figures, refusals = {}, {}
    for name, setting in wanted.items():
        figures[name] = compare(setting)
        print(name, json.dumps(figures[name]), file=sys.stderr, flush=True)
    for name, (setting, column) in REFUSED.items():
        try:
            compare(setting, column)
        except ValueError as error:
            refusals[name] = str(error)
    print(table(figures, refusals))
    worst = max(x["step"] for x in figures.values())
    print(f"\n{len(figures)} settings, largest error of a step {worst:.1e} (target {TARGET:.0e})")


if __name__ == "__main__":
    main(sys.argv[1:])
