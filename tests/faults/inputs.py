"""Faults of what else is read or given: settings, prompts, rollouts, paths, and models and optimizers in a program.

Each is refused in one line that says what was expected, what was there, and what helps.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml

from entropy_probe import EntropyProbe, ProbeConfig, ProbeResult, Rollouts, load_checkpoint
from entropy_probe.cli.config import load_config
from entropy_probe.dumps import read_dump
from entropy_probe.sampling import PromptSource, load_prompts
from entropy_probe.steps.moments import check_moments
from tests.report.results import make_result


@dataclass(frozen=True)
class InputFault:
    """A fault, and a pattern that the line about it has.

    Attributes:
        where: what is at fault.
        name: what is wrong.
        meet: makes it in an empty directory and meets it.
        line: the pattern.
    """

    where: str
    name: str
    meet: Callable[[Path], Any]
    line: str


SETTINGS: dict[str, Any] = {
    "checkpoint": "ck",
    "output_dir": "out",
    "prompts": {"jsonl": "prompts.jsonl"},
    "reward": "exact_match",
    "update": {"num_prompts": 4, "group_size": 2},
    "evaluation": {"total_sequences": 8},
}
TEXT = yaml.safe_dump(SETTINGS).encode()
INFINITY, NAN = float("inf"), float("nan")


def of_settings() -> Iterator[InputFault]:
    """Values and types of a config, at every depth."""

    def fault(name: str, line: str, **values: Any) -> InputFault:
        def meet(place: Path) -> None:
            file = place / "run.yaml"
            file.write_text(yaml.safe_dump(SETTINGS))
            load_config(
                file,
                [
                    f"{key.replace('__', '.')}={yaml.safe_dump(value, default_flow_style=True)}"
                    for key, value in values.items()
                ],
            )

        return InputFault("config", name, meet, line)

    most = "expected a number of at most"
    yield fault("bytes that are no text", "checkpoint: .*expected text in UTF-8", checkpoint="caf\udce9")
    yield fault("bytes that are no text, in a list", "stop: .*expected text in UTF-8", generation__stop=["\ud800"])
    yield fault("not a number", "probe.learning_rate: .*finite number, got nan", probe__learning_rate=NAN)
    yield fault("infinite number", "probe.max_grad_norm: .*finite number, got inf", probe__max_grad_norm=INFINITY)
    yield fault("negative number", "probe.temperature: .*greater than 0, got -1", probe__temperature=-1)
    yield fault("zero where it divides", "probe.temperature: .*greater than 0, got 0", probe__temperature=0)
    yield fault("true for a number", "probe.learning_rate: expected a number, got true", probe__learning_rate=True)
    yield fault("true for a count", "update.group_size: expected a number, got true", update__group_size=True)
    yield fault("true in a list of numbers", "reward_weights: expected a number, got true", reward_weights=[True])
    yield fault("true for a setting of the loss", "beta: expected a number, got true",
                probe__loss={"trainer": "trl", "beta": True})  # fmt: skip
    yield fault("true for an index", "mapping: expected a number, got false", mapping={"lora_A": False})
    yield fault("count beyond int64", f"probe.horizon: {most}", probe__horizon=10**30)
    yield fault("number beyond float32", f"probe.frozen_max_scale: {most}", probe__frozen_max_scale=1e300)
    yield fault("count of the loss beyond int64", f"num_items_in_batch: {most}",
                probe__loss={"trainer": "trl", "num_items_in_batch": 10**30})  # fmt: skip
    yield fault("fraction for a count", "update.num_prompts: .*integer", update__num_prompts=2.5)
    yield fault("text for a number", "probe.temperature: .*number", probe__temperature="warm")
    yield fault("list for a number", "probe.temperature: .*number", probe__temperature=[1])
    yield fault("mapping for a number", "update.seed: .*integer", update__seed={"a": 1})
    yield fault("null where there is no default", "update.group_size: .*got None", update__group_size=None)
    yield fault("number for a truth", "probe.autocast: .*got 1", probe__autocast=1)
    yield fault("text for a truth", "attribution: .*boolean", attribution="perhaps")
    yield fault("number for a path", "checkpoint: .*path", checkpoint=3)
    yield fault("list for a path", "output_dir: .*path", output_dir=["out"])
    yield fault("text for a section", "update: .*dictionary", update="large")
    yield fault("list for a section", "probe: .*dictionary", probe=[1])
    yield fault("number for the prompts", "prompts: .*dictionary", prompts=4)
    yield fault("number for a reward", "reward", reward=5)
    yield fault("mapping for rewards", "reward", reward={"name": "exact_match"})
    yield fault("number for the loss", "loss: expected settings with a trainer, got 3", probe__loss=3)
    yield fault("loss of no trainer", "trainer", probe__loss={"beta": 0.1})
    yield fault("loss of an unknown trainer", "trainer", probe__loss={"trainer": "nobody"})
    yield fault("unknown setting of the loss", "unknown|no setting|did you mean",
                probe__loss={"trainer": "trl", "bta": 0.1})  # fmt: skip
    yield fault("list for a mapping", "questions: .*dictionary", questions=[1])
    yield fault("unknown question", "questions", questions={"why": {}})
    yield fault("question without its settings", "questions.without_prompts", questions={"without_prompts": {}})
    yield fault("unknown key, deep", "generation.server.prt: unknown key", generation__server={"url": "u", "prt": 1})
    yield fault("server without an address", "generation.server", generation__server={"retries": 1})
    yield fault("number for a stop text", "generation.stop", generation__stop=[5])
    yield fault("key inside a number", "holds 3, which has no keys inside", mode=3, mode__x=1)
    yield fault("responses without end", "group_size: .*less than|at most 10000000 sequences", update__group_size=10**9)
    yield fault("draws without end", "total_sequences: .*less than or equal", evaluation__total_sequences=10**9)
    yield fault("draws of each prompt without end", "at most 10000000 sequences",
                evaluation={"num_prompts": 10**6, "draws_per_prompt": 10**6})  # fmt: skip
    yield fault("folds without end", "attribution_folds: expected at most the 8 clusters",
                attribution=True, attribution_folds=10**9)  # fmt: skip
    yield fault("wait without end", "reward_time_limit: .*less than or equal", reward_time_limit=1e30)
    yield fault("value of 50,000 characters", r"device: .{1,300}$", device="x" * 50_000)


def of_yaml() -> Iterator[InputFault]:
    """Texts of a config file."""

    def fault(name: str, text: bytes, line: str) -> InputFault:
        def meet(place: Path) -> None:
            file = place / "run.yaml"
            file.write_bytes(text)
            load_config(file)

        return InputFault("config file", name, meet, line)

    levels = [b"a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    levels += [b"a%d: &a%d [%s]" % (i, i, b", ".join([b"*a%d" % (i - 1)] * 9)) for i in range(1, 9)]
    yield fault("empty", b"", "expected `key: value` settings, got NoneType")
    yield fault("a list", b"- a\n", "expected `key: value` settings, got list")
    yield fault("not UTF-8", TEXT + b"# caf\xe9\n", "cannot be read as text")
    yield fault("UTF-16", TEXT.decode().encode("utf-16"), "cannot be read as text")
    yield fault("zero bytes", TEXT + bytes(3), "not valid YAML")
    yield fault("indented by a tab", TEXT + b"\tx: 1\n", "line [0-9]+: not valid YAML")
    yield fault("two documents", TEXT + b"---\na: 1\n", "not valid YAML")
    yield fault("key twice", TEXT + b"checkpoint: other\n", "duplicate key 'checkpoint'")
    yield fault("list as a key", TEXT + b"? [a]\n: 4\n", "a key must be plain text")
    yield fault("number as a key", TEXT + b"3: 4\n", "3: unknown key")
    yield fault("object of Python", b"a: !!python/object/apply:os.getcwd []\n", "not valid YAML")
    yield fault("tag that the value does not fit", TEXT + b"shard: !!bool maybe\n", "not valid YAML: KeyError: 'maybe'")
    yield fault("number of too many digits", TEXT + b"attribution_folds: " + b"9" * 5000, "not valid YAML: ValueError")
    yield fault("nested deeply", b"a: " + b"[" * 1000 + b"]" * 1000, "not valid YAML: RecursionError")
    yield fault("a value in itself", TEXT + b"quantization: &a {x: *a}\n", "at most 100000 values, 50 deep")
    yield fault("aliases of aliases", b"\n".join(levels), "at most 100000 values, 50 deep")
    yield fault("a megabyte and more", TEXT + b"# " + b"x" * 10**6, "at most 1000000 bytes, got 1000")


def of_prompts() -> Iterator[InputFault]:
    """Files of prompts."""

    def fault(name: str, text: bytes, line: str) -> InputFault:
        def meet(place: Path) -> None:
            (place / "prompts.jsonl").write_bytes(text)
            load_prompts(PromptSource(jsonl=place / "prompts.jsonl"))

        return InputFault("prompts", name, meet, line)

    row = b'{"prompt": "2+4=", "answer": "6"}\n'
    yield fault("empty", b"", "at least one prompt, got none")
    yield fault("blank lines", b"\n \n", "at least one prompt, got none")
    yield fault("not UTF-8", b'{"prompt": "caf\xe9"}\n', ":1: .*invalid JSON")
    yield fault("UTF-16", row.decode().encode("utf-16"), ":1: .*invalid JSON")
    yield fault("zero bytes", bytes(1000), "invalid JSON")
    yield fault("compressed, and cut", gzip.compress(row)[:-9], "expected an intact gzip file")
    yield fault("cut", row + b'{"prompt": "2+', ":2: .*invalid JSON")
    yield fault("ends of lines of another age", (row * 2).replace(b"\n", b"\r"), "invalid JSON")
    yield fault("nested deeply", b'{"a":' * 100_000, "invalid JSON")
    yield fault("number of too many digits", b'{"prompt": ' + b"9" * 5000 + b"}\n", "invalid JSON")
    yield fault("half of a surrogate pair", b'{"prompt": "\\ud800"}\n', "half of a pair of surrogates")
    yield fault("numbers", b"[1, 2]", "expected an object with field 'prompt', got int")
    yield fault("a text", b'"abc"\n', "expected an object with field 'prompt', got str")
    yield fault("null prompt", b'{"prompt": null}\n', "got null; drop the record")
    yield fault("empty prompt", b'{"prompt": ""}\n', "got empty text")
    yield fault("true for a prompt", b'{"prompt": true}\n', "text or a list of messages, got bool")
    yield fault("no messages", b'{"prompt": []}\n', "text or a list of messages")
    yield fault("number for a role", b'{"prompt": [{"role": 1, "content": "x"}]}\n', "'role' and 'content'")
    yield fault("number for a content", b'{"prompt": [{"role": "user", "content": 1}]}\n', "'role' and 'content'")
    wide = json.dumps({str(i): i for i in range(10_000)}).encode()
    yield fault("ten thousand other fields", wide, r"expected field 'prompt', got fields .{1,300}$")


def saved(place: Path, **changes: Any) -> Path:
    """A file of rollouts with some columns changed."""
    columns = {
        "prompt_id": [0, 0, 1, 1],
        "prompt_token_ids": [[2, 3]] * 4,
        "response_token_ids": [[4, 5]] * 4,
        "response_mask": [[True, True]] * 4,
        "advantage": [1.0, -1.0, 1.0, -1.0],
    }
    pq.write_table(pa.table(columns | changes), place / "saved.parquet")
    return place / "saved.parquet"


def of_rollouts() -> Iterator[InputFault]:
    """Files of rollouts, and tensors."""

    def file(name: str, line: str, **changes: Any) -> InputFault:
        return InputFault("rollouts", name, lambda place: Rollouts.from_parquet(saved(place, **changes)), line)

    def bytes_of(name: str, content: Callable[[bytes], bytes], line: str) -> InputFault:
        def meet(place: Path) -> None:
            path = saved(place)
            path.write_bytes(content(path.read_bytes()))
            Rollouts.from_parquet(path)

        return InputFault("rollouts", name, meet, line)

    def tensor(name: str, line: str, **changes: Any) -> InputFault:
        return InputFault("tensors", name, lambda place: replace(batch(), **changes), line)

    yield bytes_of("empty", lambda _: b"", "cannot be read")
    yield bytes_of("cut", lambda content: content[:-50], "cannot be read")
    yield bytes_of("garbage", lambda content: content[:4] + b"\x93" * 500 + content[-4:], "cannot be read")
    yield file("lists of unequal lengths", "expected 2 entries in row 0", response_mask=[[True]] * 4)
    yield file("texts for tokens", "column response_token_ids", response_token_ids=[["a", "b"]] * 4)
    yield file("fractions for tokens", "column response_token_ids", response_token_ids=[[0.5, 1.5]] * 4)
    yield file("nulls among tokens", "column response_token_ids", response_token_ids=[[None, 1]] * 4)
    yield file("a mask of twos", "expected 0 and 1", response_mask=[[2, 2]] * 4)
    yield file("no response", "false everywhere", response_mask=[[False, False]] * 4)
    yield file("null ids", "column prompt_id", prompt_id=[None, 0, 1, 1])
    yield file("numbers for lists", "expected lists", prompt_token_ids=[1, 2, 3, 4])
    yield file("advantages not finite", "not finite", advantage=[NAN, 1.0, INFINITY, 1.0])
    yield file("texts for advantages", "column advantage", advantage=["a"] * 4)
    yield file("a misspelt column", "no sampled_logprobs; rename", sampled_logprob=[[0.0, 0.0]] * 4)
    yield tensor("a list", "input_ids: expected a tensor, got list", input_ids=[[1, 2]])
    yield tensor("none", "response_mask: expected a tensor, got NoneType", response_mask=None)
    yield tensor("a text", "advantages: expected a tensor, got str", advantages="x")
    yield tensor("no ids", r"prompt_ids: expected \[N\]", prompt_ids=None)
    yield tensor(
        "of complex numbers", "advantages: expected real numbers", advantages=torch.ones(4, dtype=torch.cfloat)
    )
    yield tensor("sparse", "expected real numbers in a dense tensor", response_mask=batch().response_mask.to_sparse())
    yield tensor("without values", "on device meta", input_ids=batch().input_ids.to("meta"))
    yield tensor("floats for tokens", "input_ids: expected integers", input_ids=batch().input_ids.float())
    yield tensor("of too many dimensions", r"expected shape \[N, L\]", input_ids=batch().input_ids[None])
    yield tensor("too short", "advantages: expected shape", advantages=torch.ones(2))


def batch() -> Rollouts:
    """Four sequences of four tokens."""
    mask = torch.ones(4, 4, dtype=torch.bool)
    return Rollouts(
        input_ids=torch.arange(2, 18).view(4, 4),
        attention_mask=mask,
        response_mask=mask & (torch.arange(4) >= 2),
        prompt_ids=torch.tensor([0, 0, 1, 1]),
        advantages=torch.tensor([1.0, -1.0, 1.0, -1.0]),
    )


def of_programs() -> Iterator[InputFault]:
    """Models and optimizers that a program has."""

    def parts() -> tuple[torch.nn.Linear, torch.optim.AdamW]:
        model = torch.nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        return model, optimizer

    def group(name: str, line: str, **values: Any) -> InputFault:
        def meet(place: Path) -> None:
            model, optimizer = parts()
            optimizer.param_groups[0].update(values)
            EntropyProbe(model, optimizer)

        return InputFault("optimizer", name, meet, line)

    def moment(name: str, line: str, change: Callable[[torch.Tensor], Any]) -> InputFault:
        def meet(place: Path) -> None:
            model, optimizer = parts()
            state = optimizer.state[model.weight]
            state["exp_avg"] = change(state["exp_avg"])
            check_moments(dict(model.named_parameters()), optimizer)

        return InputFault("optimizer", name, meet, line)

    def without_eps(place: Path) -> None:
        model, optimizer = parts()
        del optimizer.param_groups[0]["eps"]
        EntropyProbe(model, optimizer)

    def without_state(place: Path) -> None:
        model, optimizer = parts()
        optimizer.state[model.weight] = None  # type: ignore[assignment]
        check_moments(dict(model.named_parameters()), optimizer)

    yield group("rate not a number", "finite learning rate >= 0, got nan", lr=NAN)
    yield group("text for a rate", "finite learning rate >= 0, got 'x'", lr="x")
    yield group("a single beta", "expected two betas", betas=(0.9,))
    yield group("true for a beta", r"expected betas in \[0, 1\)", betas=(True, 0.9))
    yield group("negative eps", "finite eps >= 0, got -1.0", eps=-1.0)
    yield group("infinite weight decay", "finite weight decay >= 0, got inf", weight_decay=INFINITY)
    yield InputFault("optimizer", "no eps", without_eps, "expected settings of AdamW, got no eps")
    yield InputFault("optimizer", "no state", without_state, "expected a mapping for weight, got NoneType")
    yield moment("moments in whole numbers", "got torch.int64", lambda x: x.long())
    yield moment("moments in float16", "got torch.float16 beside torch.float32", lambda x: x.half())
    yield moment("moments in a list", "got list", lambda x: x.tolist())
    yield moment("moments of another shape", r"got \[6\]", lambda x: x.reshape(-1))
    yield moment("sparse moments", "got torch.float32, torch.sparse_coo", lambda x: x.to_sparse())
    yield moment("moments without values", "on meta", lambda x: x.to("meta"))
    yield InputFault("probe", "no model", lambda _: EntropyProbe(None, parts()[1]), "model: expected a Module")  # type: ignore[arg-type]
    yield InputFault("probe", "settings as a dict", lambda _: EntropyProbe(*parts(), {"temperature": 1}),  # type: ignore[arg-type]
                     "config: expected a ProbeConfig, got dict")  # fmt: skip
    yield InputFault("probe", "another model's optimizer", lambda _: EntropyProbe(parts()[0], parts()[1]),
                     "are not parameters of the model")  # fmt: skip
    yield InputFault(
        "probe", "true for a rate", lambda _: ProbeConfig(learning_rate=True), "expected a number, got true"
    )


def loop(place: Path) -> Path:
    """A link to a link to it."""
    (place / "a").symlink_to("b")
    (place / "b").symlink_to("a")
    return place / "a"


def folder(place: Path) -> Path:
    (place / "folder").mkdir()
    return place / "folder"


def pipe(place: Path) -> Path:
    os.mkfifo(place / "pipe")
    return place / "pipe"


def below_file(place: Path) -> Path:
    (place / "file").write_text("x")
    return place / "file" / "below"


def long_name(place: Path) -> Path:
    return place / ("x" * 300)


WAYS = {
    "a link in a loop": loop,
    "a folder": folder,
    "a pipe": pipe,
    "below a file": below_file,
    "a name of 300 characters": long_name,
}
COMMANDS: dict[str, Callable[[Path], tuple[Any, ...]]] = {
    "config": lambda path: ("run", path),
    "checkpoint": lambda path: ("inspect", path),
    "result": lambda path: ("report", path),
    "training run": lambda path: ("timeline", path),
    "rollouts": lambda path: ("rollouts", path),
    "recorded step": lambda path: ("run", "--at", f"{path}:3"),
}
"""Commands that read what lies at a path."""

READERS: dict[str, Callable[[Path], Any]] = {
    "load_checkpoint": load_checkpoint,
    "Rollouts.from_parquet": Rollouts.from_parquet,
    "ProbeResult.load": ProbeResult.load,
    "load_prompts": lambda path: load_prompts(PromptSource(jsonl=path)),
    "read_dump": read_dump,
}
WRITERS: dict[str, Callable[[Path], Any]] = {
    "to_parquet": lambda path: batch().to_parquet(path / "file"),
    "save": lambda path: make_result().save(path),
}
"""What a program calls with a path, of a file to read or a directory to write into."""


def of_paths() -> Iterator[InputFault]:
    """Paths that a program gives."""

    def fault(name: str, way: str, call: Callable[[Path], Any]) -> InputFault:
        line = r"expected|the system says .*; (check|change|choose)"
        return InputFault(f"path for {name}", way, lambda place: call(WAYS[way](place)), line)

    yield from (fault(name, way, call) for name, call in READERS.items() for way in WAYS)
    yield from (fault(name, way, call) for name, call in WRITERS.items() for way in WAYS if way != "a folder")


INPUT_FAULTS = [
    fault for part in (of_settings, of_yaml, of_prompts, of_rollouts, of_programs, of_paths) for fault in part()
]
PATH_FAULTS = [(where, way) for where in COMMANDS for way in WAYS]
