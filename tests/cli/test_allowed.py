"""A config is data: what it names is imported only where the user allows it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import yaml

from entropy_probe.cli.allowed import allowed_file, check_code, forget_current_directory
from entropy_probe.cli.config import ValidateConfig, load_config
from entropy_probe.cli.sweep_config import SweepConfig
from entropy_probe.sampling import load_reward
from tests.cli.conftest import command_line
from tests.processes import Process

MINE = """
import os, pathlib
pathlib.Path({ran!r}).mkdir()
def reward(prompts, responses): return [float(len(text)) for text in responses]
"""
SETTINGS = {
    "checkpoint": "nowhere",
    "output_dir": "out",
    "prompts": {"jsonl": "prompts.jsonl"},
    "reward": "exact_match",
    "update": {"num_prompts": 4, "group_size": 2},
    "evaluation": {"total_sequences": 8},
}


@pytest.fixture
def ran(tmp_path, monkeypatch) -> Path:
    """A directory that module ``theirs``, which can be imported, makes; nobody has allowed it."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "theirs.py").write_text(MINE.format(ran=str(tmp_path / "ran")))
    monkeypatch.syspath_prepend(tmp_path / "lib")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "user"))
    for name in ("theirs", "mine"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path / "ran"


def write(place: Path, **settings) -> Path:
    path = place / "run.yaml"
    path.write_text(yaml.safe_dump(SETTINGS | settings))
    return path


def allow(*lines: str) -> None:
    allowed_file().parent.mkdir(parents=True, exist_ok=True)
    allowed_file().write_text("\n".join(lines))


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"reward": "theirs:reward"}, "reward"),
        ({"reward": ["exact_match", "theirs:reward"]}, "reward"),
        ({"prompts": {"callable": "theirs:reward"}}, "prompts.callable"),
        ({"prompts": {"callable": "theirs:reward"}, "rollouts": {"update": "u.parquet"}}, "prompts.callable"),
        ({"reward": "theirs:reward", "rollouts": {"evaluation": "e.parquet"}}, "reward"),
    ],
)
@pytest.mark.parametrize("command", ["run", "validate", "sweep"])
def test_code_is_not_imported_unasked(ran, tmp_path, refused, command, settings, key):
    sweep = {"sweep": {"learning_rates": [1e-5, 1e-4]}} if command == "sweep" else {}
    path = write(tmp_path, **settings, **sweep)
    line = refused(command, path)
    assert line.startswith(f"{path}: {key}: expected code that you allow, theirs:reward would be imported from ")
    assert f"{tmp_path}/lib/theirs.py, and importing runs it; pass --allow-code if you trust this config" in line
    assert line.endswith(f"with a line 'theirs' in {tmp_path}/user/entropy-probe/allowed")
    assert not ran.exists()


def test_with_the_option_or_once_allowed_it_is(ran, tmp_path, refused):
    path = write(tmp_path, reward="theirs:reward")
    assert "nowhere: expected a checkpoint directory" in refused("run", path, "--allow-code")  # the config got by
    assert load_config(path, allow_code=True).reward == "theirs:reward"
    assert not ran.exists()
    allow("# mine", "", "theirs  # since 2026")
    assert load_config(path).reward == "theirs:reward"
    assert ran.exists()


def test_what_rollouts_take_the_place_of_is_not_imported(ran, tmp_path):
    both = {"update": "u.parquet", "evaluation": "e.parquet"}
    theirs = {"reward": "theirs:reward", "prompts": {"callable": "theirs:reward"}}
    assert load_config(write(tmp_path, rollouts=both, **theirs))
    assert load_config(write(tmp_path, rollouts={"update": "u.parquet"}, mode="one_batch", **theirs))
    assert not ran.exists()


@pytest.mark.parametrize("kind", [ValidateConfig, SweepConfig])
def test_commands_with_more_settings_ask_too(ran, tmp_path, kind):
    sweep = {"sweep": {"learning_rates": [1e-5, 1e-4]}} if kind is SweepConfig else {}
    path = write(tmp_path, reward="theirs:reward", **sweep)
    with pytest.raises(ValueError, match="expected code that you allow"):
        load_config(path, kind=kind)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("os:system", "os:system would be imported from Python itself"),
        ("posix:system", "from Python itself"),
        ("theirs_too:reward", "from nowhere"),
        ("theirs.inner:reward", "from nowhere"),
        ("json:loads", f"from {os.path.dirname(os.__file__)}/json/__init__.py"),
        # through what allowed modules import
        ("mine:os.system", "mine:os.system is a function of posix"),
        ("mine:call", "mine:call is a function of subprocess"),
        ("mine:environment.get", "is a function of collections.abc"),
        ("mine:calls", "is a function of subprocess"),
        ("mine:Path.unlink", "is a function of pathlib"),
        ("mine_not:reward", "from nowhere"),
        # of this package
        ("entropy_probe.cli.demo:demo", "entropy_probe/cli/demo.py, and"),
        ("entropy_probe.sampling.rewards:import_function", "is a function of entropy_probe.sampling.foreign"),
        ("entropy_probe.sampling.rewards:torch.load", "is a function of torch.serialization"),
    ],
)
def test_nothing_else_is_reached(ran, tmp_path, path, said):
    (tmp_path / "lib" / "mine.py").write_text(
        "import os, subprocess, functools\nfrom os import environ as environment\nfrom pathlib import Path\n"
        "from subprocess import call\ncalls = functools.partial(call, 'true')\n"
    )
    allow("mine")
    with pytest.raises(ValueError, match="expected code that you allow") as caught:
        check_code([("reward", path)], tmp_path / "run.yaml")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_own_functions_however_wrapped_are(ran, tmp_path):
    (tmp_path / "lib" / "mine.py").write_text(
        "from functools import cache, partial, wraps\n"
        "def reward(completions): return [1.0]\n"
        "def log(f):\n @wraps(f)\n def inner(*a, **k): return f(*a, **k)\n return inner\n"
        "class Judge:\n def __call__(self, completions): return [1.0]\n def score(self, completions): return [1.0]\n"
        "logged, cached, part, judge = log(reward), cache(reward), partial(reward), Judge()\n"
    )
    allow("mine")
    names = ("reward", "logged", "cached", "part", "judge", "judge.score")
    check_code([("reward", f"mine:{name}") for name in names], tmp_path)
    check_code([("reward", "entropy_probe.sampling.rewards:gsm8k")], tmp_path)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"my rewards", "allowed: expected names of packages, one a line, got 'my rewards'; correct it"),
        (b"*", "got '\\*'"),
        (b"../lib", "got '../lib'"),
        (b"\xff", "cannot read it"),
    ],
)
def test_a_list_that_is_none(ran, tmp_path, content, match):
    allow()
    allowed_file().write_bytes(content)
    with pytest.raises(ValueError, match=match):
        check_code([("reward", "theirs:reward")], tmp_path)
    check_code([], tmp_path)


def test_where_the_list_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "here"):  # a relative one would be the config's
        monkeypatch.setenv("XDG_CONFIG_HOME", value)
        assert allowed_file() == tmp_path / ".config" / "entropy-probe" / "allowed"


@pytest.mark.parametrize("value", [True, "true", 1, [0]])
def test_only_the_command_line_overwrites(tmp_path, refused, value):
    path = write(tmp_path, overwrite=value)
    (tmp_path / "out").mkdir()
    line = refused("run", path, "--output-dir", tmp_path / "out")
    assert line.startswith(f"{path}: overwrite: counts on the command line only")
    assert load_config(write(tmp_path, overwrite=False), ["overwrite=true"]).overwrite


def test_only_the_command_line_names_the_key_that_a_server_gets(tmp_path, refused):
    server = {"url": "http://localhost:8000", "model": "m"}
    path = write(tmp_path, generation={"engine": "vllm", "server": {**server, "api_key_env": "HOME"}})
    line = refused("run", path, "--output-dir", tmp_path / "out")
    assert line.startswith(f"{path}: generation.server.api_key_env: counts on the command line only")
    path = write(tmp_path, generation={"engine": "vllm", "server": server})
    config = load_config(path, ["generation.server.api_key_env=A_KEY"])
    assert config.generation.server.api_key_env == "A_KEY"
    assert "A_KEY" not in config.to_yaml()


def test_values_of_objects_are_not_printed(monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    for name, got in {
        "os:environ": "an object of type _Environ",
        "os:environ.SECRET": "None",
        "os:sep": "of type str",
    }.items():
        with pytest.raises(ValueError, match=f"in module os, got .*{got}; correct it") as caught:
            load_reward(name)
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("path", ["{here}", "", "{other}:"])
def test_the_current_directory_is_searched_only_where_asked(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), "/elsewhere", str(tmp_path), *sys.path, "", "/installed"])
    monkeypatch.setenv("PYTHONPATH", path.format(here=tmp_path, other="/elsewhere"))
    forget_current_directory()
    assert (str(tmp_path) in sys.path) == (path == "{here}")
    assert "" not in sys.path
    assert "/elsewhere" in sys.path
    assert "/installed" in sys.path


def as_module(place: str, *args: str) -> None:
    """As ``python -m entropy_probe`` in a directory, which Python puts first on its import path."""
    os.chdir(place)
    sys.path.insert(0, place)
    command_line(*args)


def test_what_lies_beside_a_config_is_not_run(trained, tmp_path):
    (tmp_path / "theirs.py").write_text(MINE.format(ran=str(tmp_path / "ran")))
    write(tmp_path, checkpoint=str(trained.checkpoint), prompts={"callable": "theirs:reward"})
    for path, said in (("/elsewhere:", "cannot import 'theirs:reward'"), (".", "callable theirs:reward: raised")):
        process = Process(as_module, str(tmp_path), "run", "run.yaml", "--allow-code", PYTHONPATH=path)
        _, stderr = process.communicate()
        assert said in stderr
        assert (tmp_path / "ran").exists() == (path == ".")
