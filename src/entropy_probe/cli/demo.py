"""``entropy-probe demo``: train a policy, probe it, show the result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer


class Model(StrEnum):
    """The policies that there is a demo of."""

    tiny = "tiny"
    smollm2 = "smollm2"


@dataclass(frozen=True)
class Demo:
    """A policy, its task, and sizes.

    Attributes:
        directory: where it is trained.
        output_dir: where the results go.
        threads: torch threads; None for as many as torch takes by itself.
        train: trains it, into ``directory``, and gives the checkpoint to probe.
        settings: of the run that probes it, besides what all demos have.
    """

    directory: Path
    output_dir: Path
    threads: int | None
    train: Callable[[Demo, Callable[[str], None]], Path]
    settings: dict[str, Any]


def demo(
    model: Annotated[
        Model,
        typer.Option(help="A tiny policy that adds digits, or SmolLM2-135M-Instruct on products (30 minutes)."),
    ] = Model.tiny,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Probe again, where --model smollm2 would go on with what is there.")
    ] = False,
) -> None:
    """Train a policy, probe its next step, and show the result.

    Trains into examples/tiny in about a minute, or finds it there, and writes the results to runs/demo. SmolLM2 goes to
    examples/smollm2 and runs/demo-smollm2, and a run that was ended goes on where it was.
    """
    import torch

    from entropy_probe.cli.config import RunConfig
    from entropy_probe.cli.report import run_report
    from entropy_probe.cli.run import probe_checkpoint
    from entropy_probe.cli.timeline import read_timelines, show_timelines
    from entropy_probe.demo.train import quiet
    from entropy_probe.parallel.ranks import ALONE

    chosen = DEMOS[model]()
    with quiet(chosen.threads or torch.get_num_threads()):
        checkpoint = chosen.train(chosen, lambda line: typer.echo(line, err=True))
        config = RunConfig.model_validate(
            {
                "checkpoint": checkpoint,
                "base_model": str(chosen.directory / "base"),
                "output_dir": chosen.output_dir,
                "overwrite": overwrite or model is Model.tiny,
                "device": "cpu",
                "attribution": True,
                **chosen.settings,
            }
        )
        run_report(chosen.output_dir, probe_checkpoint(config, ALONE)).show()
        show_timelines(read_timelines([chosen.directory]), chosen.output_dir)


def _tiny() -> Demo:
    from entropy_probe.demo.train import MAX_COMPLETION_LENGTH, train_demo

    def train(demo: Demo, say: Callable[[str], None]) -> Path:
        from entropy_probe.integrations.trl import EntropyProbeCallback

        probes = EntropyProbeCallback(every=1, record="all")
        return train_demo(demo.directory, on_progress=say, callbacks=[probes])

    directory = Path("examples/tiny")
    settings = {
        "prompts": {"jsonl": directory / "prompts.jsonl"},
        "reward": "exact_match",
        "update": {"num_prompts": 16, "group_size": 8},
        "generation": {"batch_size": 512},
        "evaluation": {"total_sequences": 2048},
        "probe": {"max_completion_length": MAX_COMPLETION_LENGTH},
    }
    return Demo(directory, Path("runs/demo"), 1, train, settings)


def _smollm2() -> Demo:
    from entropy_probe.demo.smollm2 import MAX_COMPLETION_LENGTH

    one_digit = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    settings = {
        "prompts": {"reasoning_gym": "products", "size": 256, "seed": 1, "config": one_digit, "chat": True},
        "reward": "reasoning_gym",
        "update": {"num_prompts": 8, "group_size": 8},
        "evaluation": {"total_sequences": 192},
        "probe": {"max_completion_length": MAX_COMPLETION_LENGTH},
    }
    return Demo(Path("examples/smollm2"), Path("runs/demo-smollm2"), None, _train_smollm2, settings)


DEMOS = {Model.tiny: _tiny, Model.smollm2: _smollm2}


def _train_smollm2(demo: Demo, say: Callable[[str], None]) -> Path:
    """Train on the prompts and with the reward of the run that probes."""
    from entropy_probe.cli.output import locked
    from entropy_probe.demo.smollm2 import train_smollm2
    from entropy_probe.sampling import PromptSource, load_prompts, load_rewards, score_responses

    prompts, rewards = load_prompts(PromptSource(**demo.settings["prompts"])), load_rewards(demo.settings["reward"])

    def reward(completions: list[Any], number: list[int], **_: Any) -> list[float | None]:
        texts = [completion[0]["content"] for completion in completions]
        return score_responses(rewards, [prompts[k] for k in number], texts).tolist()

    records = [{"prompt": list(prompt.prompt), "number": prompt.id} for prompt in prompts]
    with locked(demo.directory):
        return train_smollm2(demo.directory, records, reward, on_progress=say)
