"""The callback beside a live run of the demo: what it predicts against what then happens, and what that costs.

The demo's base policy is trained with TRL's GRPO on a LoRA adapter as the demo trains it. Every step is predicted from
the trainer's own ``.grad`` and measured after the optimizer's step, both on its own batch; some steps also on 1,024
fresh held-out responses. CPU times are those of one process, in training gradients: the forward and backward passes of
the same step. A second run has the callback with a budget of time and a policy of 4 layers, 256 wide.

Run ``python benchmarks/live.py`` (half an hour), or with ``--quick`` at sizes that only show that it works.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from entropy_probe import ProbeConfig
from entropy_probe.analyses.ahead import StepAhead
from entropy_probe.demo.policy import build_model, build_tokenizer
from entropy_probe.demo.train import CPU_ARGUMENTS, LORA_TARGETS, MAX_COMPLETION_LENGTH, quiet_single_thread
from entropy_probe.integrations.held_out import HeldOut, HeldOutSampler
from entropy_probe.integrations.live import probe_actor
from entropy_probe.integrations.trl import EntropyProbeCallback
from entropy_probe.integrations.trl_batch import Watch, calling_trainer
from entropy_probe.parallel.ranks import ALONE
from entropy_probe.results.estimate import Estimate
from entropy_probe.results.probe import ProbeResult

DEMO = Path(__file__).parents[1] / "examples" / "tiny"


@dataclass(eq=False)
class Seen:
    """What was found of a run.

    Attributes:
        own: results of every step on its own batch.
        held_out: results of some steps on held-out rollouts, by step.
        costs: CPU seconds by what they were spent on, step by step.
        logged: the entropy that the trainer logged.
    """

    own: list[ProbeResult] = field(default_factory=list)
    held_out: dict[int, ProbeResult] = field(default_factory=dict)
    costs: dict[str, list[float]] = field(default_factory=dict)
    logged: list[float] = field(default_factory=list)


def watching(seen: Seen, held_out: HeldOut, *, every: int, quarter: HeldOut) -> Any:
    """A callback that probes every step on its own batch, and every few on held-out rollouts."""
    from transformers import TrainerCallback

    def timed(name: str, work: Callable[[], Any]) -> Any:
        start = time.process_time()
        value = work()
        seen.costs.setdefault(name, []).append(time.process_time() - start)
        return value

    class Watching(TrainerCallback):
        def on_train_begin(self, args, state, control, **_):
            self.trainer = calling_trainer(self)
            self.watch = Watch(self.trainer)
            self.samplers = [HeldOutSampler(which, self.trainer, ALONE) for which in (held_out, quarter)]
            step, prepare = self.trainer.training_step, self.trainer._prepare_inputs
            self.trainer.training_step = lambda *args, **kwargs: timed("step", lambda: step(*args, **kwargs))
            self.trainer._prepare_inputs = lambda *args: timed("sampling", lambda: prepare(*args))

        def on_step_begin(self, args, state, control, **_):
            self.watch.clear()

        def on_pre_optimizer_step(self, args, state, control, model, optimizer, **_):
            batch = self.watch.batch(ALONE)
            config = ProbeConfig(
                loss=batch.loss, temperature=args.temperature, max_completion_length=args.max_completion_length,
                max_grad_norm=args.max_grad_norm, measure_noise_floor=False, horizon=None,
            )  # fmt: skip

            def ahead(rollouts: Any, evaluation: Any) -> StepAhead:
                return probe_actor(model, optimizer, rollouts, config, evaluation=evaluation)

            self.own = timed("predicted", lambda: ahead(batch.rollouts, None))
            self.held = None
            if state.global_step % every == every - 1:
                whole, quarter = (sampler.rollouts(model, config)[0] for sampler in self.samplers)
                for sampler in self.samplers:
                    sampler.forget()
                self.held = ahead(None, whole)
                timed("held out, a quarter", lambda: ahead(None, quarter))

        def on_optimizer_step(self, args, state, control, **_):
            seen.own.append(timed("realized", self.own.taken))
            if self.held is not None:
                seen.held_out[state.global_step] = self.held.taken()

        def on_log(self, args, state, control, logs, **_):
            if "entropy" in logs:
                seen.logged.append(logs["entropy"])

    return Watching()


def train(callbacks: Sequence[Any], *, steps: int, prompts: int, model: Any, tokenizer: Any) -> Any:
    """A run as the demo's, from the start; the trainer."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PrinterCallback
    from trl import GRPOConfig, GRPOTrainer

    records = [json.loads(line) for line in (DEMO / "prompts.jsonl").read_text().splitlines()]
    arguments = {
        "max_steps": steps, "save_strategy": "no", "per_device_train_batch_size": prompts * 8, "num_generations": 8,
        "learning_rate": 3e-4, "max_completion_length": MAX_COMPLETION_LENGTH, "seed": 0,
    }  # fmt: skip
    with quiet_single_thread(), tempfile.TemporaryDirectory() as directory:
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=_exact,
            args=GRPOConfig(directory, **(CPU_ARGUMENTS | arguments)),
            train_dataset=Dataset.from_list(records),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=LORA_TARGETS, task_type="CAUSAL_LM"),
            callbacks=[*callbacks],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer


def _exact(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    return [float(completion == expected) for completion, expected in zip(completions, answer, strict=True)]


def agreement(results: Sequence[ProbeResult]) -> dict[str, float]:
    """Predicted against realized, where the latter is given."""
    told = [(r.predicted, r.realized, r.difference) for r in results if r.predicted and r.realized and r.difference]
    x, y = [p.value for p, _, _ in told], [float(r.value or 0.0) for _, r, _ in told]
    gaps = [d for _, _, d in told]
    return {
        "steps": len(results),
        "realized given": len(told),
        "correlation": correlation(x, y),
        "slope": slope(x, y),
        "sum predicted": sum(x),
        "sum realized": sum(y),
        "paired difference of the sums": sum(d.value for d in gaps),
        "its error": math.sqrt(sum(d.standard_error**2 for d in gaps)),
    }


def beside_the_log(seen: Seen) -> dict[str, float]:
    """The entropy that the trainer logs, step by step, against what was measured; and the loss against ``.grad``."""
    steps = [b - a for a, b in zip(seen.logged, seen.logged[1:], strict=False)]
    realized = [r.realized and r.realized.value for r in seen.own]
    both = [(step, value) for step, value in zip(steps, realized, strict=False) if value is not None]
    distances = [r.diagnostics.gradient_agreement for r in seen.own]
    return {
        "correlation of the logged entropy's steps with the realized changes": correlation(*zip(*both, strict=True)),
        "largest loss distance": max(a.relative_distance or 0.0 for a in distances if a is not None),
    }


def correlation(x: Sequence[float], y: Sequence[float]) -> float:
    mx, my = fmean(x), fmean(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / ((len(x) - 1) * stdev(x) * stdev(y))


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of realized over predicted."""
    return correlation(x, y) * stdev(y) / stdev(x)


def against_held_out(seen: Seen) -> dict[str, dict[str, float]]:
    """Z of own batch minus held-out rollouts, quantity by quantity."""

    def of(result: ProbeResult, name: str) -> Estimate | None:
        if name == "predicted":
            p = result.predicted
            return p and Estimate(
                value=p.value, standard_error=p.se_evaluation, num_clusters=p.num_clusters, unit=p.unit
            )
        if name == "realized":
            return result.realized and result.realized.estimate
        return result.components.get(name) if name != "entropy" else result.entropy

    table = {}
    for name in ("entropy", "predicted", "gradient", "momentum", "realized"):
        pairs = [(of(seen.own[step], name), of(held, name)) for step, held in seen.held_out.items()]
        z = [(a.value - b.value) / math.hypot(a.standard_error, b.standard_error) for a, b in pairs if a and b]
        table[name] = {
            "steps": len(z), "mean z": fmean(z) * math.sqrt(len(z)), "rms z": math.sqrt(fmean(v * v for v in z)),
            "largest": max(map(abs, z)),
        }  # fmt: skip
    return table


def costs(seen: Seen) -> dict[str, float]:
    """Medians in training gradients."""
    gradients = [a - b for a, b in zip(seen.costs["step"], seen.costs["sampling"], strict=True)]
    unit = median(gradients[1:])
    named = {name: median(values[1:]) / unit for name, values in seen.costs.items() if name not in ("step", "sampling")}
    return {"training gradient, CPU s": unit, "sampling": median(seen.costs["sampling"][1:]) / unit} | named


def with_budget(share: float, steps: int) -> dict[str, float]:
    """What the callback takes of the CPU time of training, with a budget, on 4 layers 256 wide."""
    callback = EntropyProbeCallback(every=1, budget=share, record=None)
    spent, probes = 0.0, 0
    for event in ("on_step_begin", "on_pre_optimizer_step", "on_optimizer_step"):
        original = getattr(callback, event)

        def counted(*args: Any, original: Any = original, event: str = event, **kwargs: Any) -> None:
            nonlocal spent, probes
            start = time.process_time()
            original(*args, **kwargs)
            seconds = time.process_time() - start
            spent, probes = spent + seconds, probes + (event == "on_optimizer_step" and seconds > 1e-3)

        setattr(callback, event, counted)
    start = time.process_time()
    train([callback], steps=steps, prompts=16, model=_wide(), tokenizer=build_tokenizer())
    whole = time.process_time() - start
    return {"budget": share, "steps": steps, "probes": probes, "share of the training time": spent / (whole - spent)}


def _wide() -> Any:
    return build_model(num_layers=4, hidden_size=256, num_heads=4, intermediate_size=1024, initializer_range=0.05)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(DEMO / "base"), AutoTokenizer.from_pretrained(DEMO / "base")

    def show(**figures: Any) -> None:
        print(json.dumps(figures, indent=2), flush=True)

    wide, of_32 = Seen(), HeldOut(size=32, min_ess=1.0)
    watcher = watching(wide, of_32, every=2, quarter=of_32)
    train([watcher], steps=4 if quick else 12, prompts=16, model=_wide(), tokenizer=tokenizer)
    show(cost_of_4_layers_256_wide=costs(wide))
    seen = Seen()
    watcher = watching(seen, HeldOut(size=128 if quick else 1024, min_ess=1.0), every=3, quarter=of_32)
    train([watcher], steps=6 if quick else 60, prompts=16, model=model, tokenizer=tokenizer)
    show(own_batch=agreement(seen.own) | beside_the_log(seen), held_out=agreement([*seen.held_out.values()]))
    show(own_batch_against_held_out=against_held_out(seen), cost_of_the_demo=costs(seen))
    show(with_a_budget=with_budget(0.05, 10 if quick else 120))


if __name__ == "__main__":
    main()
