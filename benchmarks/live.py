"""The callback beside a live run of the demo: what it predicts against what then happens, and what that costs.

The demo's base policy is trained with TRL's GRPO on a LoRA adapter as the demo trains it. Every step is predicted from
the trainer's own ``.grad`` and measured after the optimizer's step, both on its own batch; some steps also on 1,024
fresh held-out responses, there also backwards and by halves, which tells the curvature from a wrong slope. CPU times
are those of one process, in training gradients: the forward and backward passes of the same step. Another run has the
callback with a budget of time and a policy of 4 layers, 256 wide. ``smollm2`` is the same on SmolLM2-135M-Instruct.

Run ``python benchmarks/live.py`` (ten minutes on an idle core), ``--quick`` at sizes that only show that it works, or
some ``--parts``; ``--parts smollm2 --minutes 20`` takes as many steps of it as fit.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

from entropy_probe import ProbeConfig
from entropy_probe.analyses.ahead import StepAhead
from entropy_probe.analyses.measure import difference, measure_taken
from entropy_probe.cli.demo import DEMOS, Model
from entropy_probe.demo.policy import build_model, build_tokenizer
from entropy_probe.demo.train import CPU_ARGUMENTS, LORA_TARGETS, MAX_COMPLETION_LENGTH, quiet_single_thread
from entropy_probe.integrations.held_out import HeldOut, HeldOutSampler
from entropy_probe.integrations.live import probe_actor
from entropy_probe.integrations.trl import EntropyProbeCallback
from entropy_probe.integrations.trl_batch import Watch, calling_trainer
from entropy_probe.parallel.ranks import ALONE
from entropy_probe.results.estimate import Estimate
from entropy_probe.results.probe import ProbeResult
from entropy_probe.sampling import PromptSource, load_prompts, load_rewards, score_responses
from entropy_probe.scoring.isolation import parameters_at

DEMO = Path(__file__).parents[1] / "examples" / "tiny"


@dataclass(eq=False)
class Seen:
    """What was found of a run.

    Attributes:
        own: results of every step on its own batch.
        held_out: results of some steps on held-out rollouts, by step.
        scaled: on the same rollouts by factor, the changes by so many times the step minus as many times the predicted.
        costs: CPU seconds by what they were spent on, step by step.
        logged: the entropy that the trainer logged.
    """

    own: list[ProbeResult] = field(default_factory=list)
    held_out: dict[int, ProbeResult] = field(default_factory=dict)
    scaled: dict[float, list[float]] = field(default_factory=dict)
    costs: dict[str, list[float]] = field(default_factory=dict)
    logged: list[float] = field(default_factory=list)


def watching(seen: Seen, held_out: tuple[HeldOut, HeldOut] | None, *, every: int, minutes: float = math.inf) -> Any:
    """A callback that probes every step on its own batch, and every few on held-out rollouts, once all and once few."""
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
            self.samplers = [HeldOutSampler(which, self.trainer, ALONE) for which in held_out or ()]
            self.begun = time.monotonic()
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
            if self.samplers and state.global_step % every == every - 1:
                whole, quarter = (sampler.rollouts(model, config)[0] for sampler in self.samplers)
                for sampler in self.samplers:
                    sampler.forget()
                self.held = ahead(None, whole)
                for factor, gap in scaled_gaps(self.held):
                    seen.scaled.setdefault(factor, []).append(gap)
                timed("held out, a quarter", lambda: ahead(None, quarter))

        def on_optimizer_step(self, args, state, control, **_):
            seen.own.append(timed("realized", self.own.taken))
            if self.held is not None:
                seen.held_out[state.global_step] = self.held.taken()
            control.should_training_stop |= time.monotonic() - self.begun > 60 * minutes

        def on_log(self, args, state, control, logs, **_):
            if "entropy" in logs:
                seen.logged.append(logs["entropy"])

    return Watching()


def scaled_gaps(held: StepAhead) -> Iterator[tuple[float, float]]:
    """The step backwards and its halves before it is taken: factors, and changes minus so many times the predicted."""
    plan = held.prediction.plan
    with plan.policy.isolated():
        for factor in (-1.0, -0.5, 0.5):
            moved = {name: p.detach() + factor * plan.step.delta[name] for name, p in plan.policy.parameters.items()}
            with parameters_at(plan.policy.parameters, moved):
                gap = difference(held.prediction, measure_taken(plan).measurement, factor)
            yield factor, math.nan if gap is None else gap.value


def curvature(seen: Seen) -> dict[str, float]:
    """What is left of the changes without the prediction, summed over the steps on held-out rollouts.

    The odd part of a step and its opposite is the slope and its third order, an eighth of it at the halves.
    """
    gaps = seen.scaled | {
        1.0: [math.nan if r.difference is None else r.difference.value for r in seen.held_out.values()]
    }
    steps = [k for k in range(len(gaps[1.0])) if not any(math.isnan(of[k]) for of in gaps.values())]
    total = {factor: sum(of[k] for k in steps) for factor, of in gaps.items()}
    predicted = [p.value for p in (r.predicted for r in seen.held_out.values()) if p]
    return {
        "steps": len(steps), "predicted": sum(predicted[k] for k in steps),
        "whole step": total[1.0], "half of it": total[0.5],
        "odd part, whole step": (total[1.0] - total[-1.0]) / 2, "half of it ": (total[0.5] - total[-0.5]) / 2,
    }  # fmt: skip


def train(
    callbacks: Sequence[Any], *, model: Any, tokenizer: Any, task: tuple[Any, Any] | None = None, **settings: Any
) -> Any:
    """A run as the demo's, from the start; the trainer.

    Args:
        callbacks: beside it.
        model: the base.
        tokenizer: its.
        task: records and reward; the demo's by default.
        settings: of ``GRPOConfig``.
    """
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PrinterCallback
    from trl import GRPOConfig, GRPOTrainer

    records, reward = task or (_prompts(), _exact)
    arguments = {
        "save_strategy": "no", "per_device_train_batch_size": 128, "num_generations": 8, "learning_rate": 3e-4,
        "max_completion_length": MAX_COMPLETION_LENGTH, "seed": 0,
    }  # fmt: skip
    with quiet_single_thread(), tempfile.TemporaryDirectory() as directory:
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=GRPOConfig(directory, **(CPU_ARGUMENTS | arguments | settings)),
            train_dataset=Dataset.from_list(records),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=LORA_TARGETS, task_type="CAUSAL_LM"),
            callbacks=[*callbacks],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer


def _prompts() -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DEMO / "prompts.jsonl").read_text().splitlines()]


def _exact(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    return [float(completion == expected) for completion, expected in zip(completions, answer, strict=True)]


def _odd(completions: list[str], **_: Any) -> list[float]:
    """A reward that random weights get some of, so that there is a step."""
    return [sum(character in "13579" for character in text) / max(1, len(text)) for text in completions]


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
        "correlation of the logged entropy's steps with the realized changes": correlation(
            [step for step, _ in both], [value for _, value in both]
        ),
        "largest loss distance": max(a.relative_distance or 0.0 for a in distances if a is not None),
    }


def correlation(x: Sequence[float], y: Sequence[float]) -> float:
    return statistics.correlation(x, y) if len(x) > 2 else math.nan


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of realized over predicted."""
    return statistics.linear_regression(x, y).slope if len(x) > 2 else math.nan


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
    train([callback], max_steps=steps, model=_wide(), tokenizer=build_tokenizer(), task=(_prompts(), _odd))
    whole = time.process_time() - start
    return {"budget": share, "steps": steps, "probes": probes, "share of the training time": spent / (whole - spent)}


def _wide() -> Any:
    return build_model(num_layers=4, hidden_size=256, num_heads=4, intermediate_size=1024, initializer_range=0.05)


def smollm2_task() -> tuple[Any, Any]:
    """Records and reward of ``make demo-real``."""
    settings = DEMOS[Model.smollm2]().settings
    prompts, rewards = load_prompts(PromptSource(**settings["prompts"])), load_rewards(settings["reward"])

    def reward(completions: list[Any], number: list[int], **_: Any) -> list[float | None]:
        texts = [completion[0]["content"] for completion in completions]
        return score_responses(rewards, [prompts[k] for k in number], texts).tolist()

    return [{"prompt": list(prompt.prompt), "number": prompt.id} for prompt in prompts], reward


def show(**figures: Any) -> None:
    print(json.dumps(figures, indent=2), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--parts", nargs="+", choices=("cost", "demo", "budget", "smollm2"))
    parser.add_argument("--base", type=Path, default=DEMO.parent / "smollm2" / "base")
    parser.add_argument("--minutes", type=float, default=math.inf)
    given = parser.parse_args()
    quick, parts = given.quick, given.parts or ("cost", "demo", "budget")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, few = AutoTokenizer.from_pretrained(DEMO / "base"), HeldOut(size=32, min_ess=1.0)
    if "cost" in parts:
        seen = Seen()
        watcher = watching(seen, (few, few), every=2)
        train([watcher], max_steps=4 if quick else 12, model=_wide(), tokenizer=tokenizer, task=(_prompts(), _odd))
        show(cost_of_4_layers_256_wide=costs(seen))
    if "demo" in parts:
        seen = Seen()
        watcher = watching(seen, (HeldOut(size=128 if quick else 1024, min_ess=1.0), few), every=3)
        model = AutoModelForCausalLM.from_pretrained(DEMO / "base")
        train([watcher], max_steps=6 if quick else 60, model=model, tokenizer=tokenizer)
        show(own_batch=agreement(seen.own) | beside_the_log(seen), held_out=agreement([*seen.held_out.values()]))
        show(curvature=curvature(seen))
        show(own_batch_against_held_out=against_held_out(seen), cost_of_the_demo=costs(seen))
    if "budget" in parts:
        show(with_a_budget=with_budget(0.05, 10 if quick else 120))
    if "smollm2" in parts:
        seen = Seen()
        model, tokenizer = (kind.from_pretrained(given.base) for kind in (AutoModelForCausalLM, AutoTokenizer))
        train(
            [watching(seen, None, every=1, minutes=given.minutes)], model=model, tokenizer=tokenizer,
            task=smollm2_task(), max_steps=2 if quick else 20, per_device_train_batch_size=16,
            gradient_accumulation_steps=2, learning_rate=3e-5, max_completion_length=40,
        )  # fmt: skip
        show(smollm2=agreement(seen.own) | beside_the_log(seen), cost_of_smollm2=costs(seen))


if __name__ == "__main__":
    main()
