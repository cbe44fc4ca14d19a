from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from entropy_probe.cli.config import RunConfig, load_config

FULL: dict[str, Any] = {
    "checkpoint": "ck",
    "output_dir": "out",
    "device": "cpu",
    "prompts": {"jsonl": "prompts.jsonl"},
    "reward": "exact_match",
    "update": {"num_prompts": 4, "group_size": 2},
    "evaluation": {"total_sequences": 8},
    "probe": {"max_completion_length": 8},
}


@pytest.fixture
def load(tmp_path):
    def load(settings: dict[str, Any] = FULL, overrides=(), options=None) -> RunConfig:
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(settings))
        return load_config(path, overrides, options, allow_code=True)

    return load


def test_overrides_then_options(load):
    config = load(FULL, ["probe.learning_rate=1e-5", "update.group_size=4", "probe.max_grad_norm=null"])
    assert config.probe.learning_rate == 1e-5
    assert config.update is not None
    assert config.update.group_size == 4
    assert config.probe.max_grad_norm is None
    options = {"probe.learning_rate": 2e-5, "output_dir": "a: [b]", "overwrite": None}
    config = load(FULL, ["probe.learning_rate=1e-5", "overwrite=true"], options)
    assert config.probe.learning_rate == 2e-5
    assert config.output_dir == Path("a: [b]")
    assert config.overwrite


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("probe.lerning_rate=1", "probe.lerning_rate: unknown key; did you mean probe.learning_rate?"),
        ("learning_rate=1", "learning_rate: unknown key; did you mean probe.learning_rate?"),
        ("generation.temperature=1", "generation.temperature: unknown key; did you mean probe.temperature?"),
        ("update.top_p=1", "update.top_p: unknown key; did you mean generation.top_p?"),
        ("updat.group_size=x", "updat: unknown key; did you mean update?"),
        ("promts.jsonl=x", "promts: unknown key; did you mean prompts?"),
        ("evaluation.rollouts=x", "evaluation.rollouts: unknown key; did you mean rollouts?"),
        (
            "generation.zzzz=1",
            "generation.zzzz: unknown key; known here are engine, top_p, top_k, batch_size, stop, server",
        ),
    ],
)
def test_unknown_keys_name_the_nearest(load, tmp_path, override, message):
    with pytest.raises(ValueError, match="unknown key") as caught:
        load(FULL, [override])
    assert str(caught.value) == f"{tmp_path / 'run.yaml'}: {message}"


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (["generation.top_p=0.9"], r"generation\.top_p: expected 1\.0, got 0\.9"),
        (["generation.top_k=50"], r"generation\.top_k: expected 0, got 50"),
        (["reward=[]"], "reward: expected at least one, got an empty list"),
        (["reward_weights=[1, 2]"], "reward_weights: expected one for each of the 1 rewards, got 2"),
        (["reward=[a:b, c:d]", "reward_weights=[1]"], "reward_weights: expected one for each of the 2 rewards, got 1"),
        (["reward_weights=[.nan]"], r"reward_weights\.0: input should be a finite number"),
        (["probe.learning_rate=0"], r"probe\.learning_rate: input should be greater than 0, got 0"),
        (["probe.learning_rate=.nan"], r"probe\.learning_rate: input should be"),
        (["probe.temperature=0"], r"probe\.temperature: input should be greater than 0, got 0"),
        (["probe.dtype=fp16"], r"probe\.dtype: input should be 'float32', .* got 'fp16'"),
        (["update.group_size=1"], r"update\.group_size: input should be greater than or equal to 2, got 1"),
        (["device=tpu"], r"device: input should be 'cpu', 'cuda' or 'auto', got 'tpu'"),
        (["checkpoint=null", "output_dir=[1]"], r"checkpoint: .* got None \(and 1 more\)$"),
        (["probe=3"], r"probe: input should be a valid dictionary"),
        (["prompts=null"], r"prompts: required to sample the update batch, but missing; .*rollouts\.update"),
        (["update=null"], r"update: required to sample the update batch"),
        (["evaluation=null"], r"evaluation: required to sample the evaluation batch"),
        (["reward=null"], r"reward: required to sample the update batch"),
        (
            ["attribution=true", "mode=one_batch", "attribution_folds=4"],
            r"attribution_folds: expected at most 2, half the prompts of the update batch, got 4",
        ),
        (["attribution=true", "mode=one_batch", "probe.geometry=frozen"], r"probe.geometry: .* got mode one_batch"),
        (["attribution_folds=4"], r"attribution_folds: expected attribution: true beside it, got false"),
        (["rollouts.update=u.parquet", "prompts=null"], r"prompts: required to sample the evaluation batch"),
        (
            ["prompts.dataset=gsm8k"],
            r"prompts: expected exactly one of jsonl, parquet, dataset, callable, reasoning_gym, got jsonl and dataset",
        ),
    ],
)
def test_bad_values_name_the_key_in_one_line(load, tmp_path, overrides, match):
    with pytest.raises(ValueError, match=rf"run\.yaml: {match}") as caught:
        load(FULL, overrides)
    assert "\n" not in str(caught.value)


def test_missing_keys_are_named(load):
    with pytest.raises(ValueError, match=r"checkpoint: required, but missing \(and 1 more\)"):
        load({"rollouts": {"update": "u", "evaluation": "e"}})


def test_saved_rollouts_need_no_sampling_settings(load):
    saved = {"update": "u.parquet", "evaluation": "e.parquet"}
    config = load({"checkpoint": "ck", "output_dir": "out", "rollouts": saved})
    assert config.rollouts.update == Path("u.parquet")
    assert config.resolved().probe.evaluation_unit == "auto"


def test_resolved_depends_on_nothing_around_it(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    config = load(FULL, ["rollouts.update=u.parquet", "base_model=base", "device=auto"]).resolved()
    assert config.checkpoint == tmp_path / "ck"
    assert config.output_dir == tmp_path / "out"
    assert config.base_model == str(tmp_path / "base")
    assert config.rollouts.update == tmp_path / "u.parquet"
    assert config.prompts is not None
    assert config.prompts.jsonl == tmp_path / "prompts.jsonl"
    assert config.device in ("cpu", "cuda")
    # the saved batch was used, so settings for sampling it are not part of the run
    assert config.update is None
    assert config.evaluation is not None
    # one response per draw with replacement
    assert config.probe.evaluation_unit == "sequence"
    assert load(FULL, ["probe.evaluation_unit=prompt"]).resolved().probe.evaluation_unit == "prompt"


def test_an_update_batch_that_is_filtered_here_is_known_to_be_selected(load):
    assert not load(FULL).resolved().probe.update_selected
    filtered = ["update.filter_zero_advantage=true"]
    assert load(FULL, filtered).resolved().probe.update_selected
    # a saved batch comes from elsewhere: what was done to it is the user's to say
    assert not load(FULL, [*filtered, "rollouts.update=u.parquet"]).resolved().probe.update_selected
    assert load(FULL, ["rollouts.update=u.parquet", "probe.update_selected=true"]).resolved().probe.update_selected


def test_a_hub_name_stays_a_name(load):
    assert load(FULL, ["base_model=org/model"]).resolved().base_model == "org/model"


def test_the_written_config_reads_back_as_the_same_run(load, tmp_path):
    config = load(FULL, ["probe.learning_rate=8e-7", "probe.max_grad_norm=null", "overwrite=true"]).resolved()
    path = tmp_path / "again.yaml"
    path.write_text(config.to_yaml())
    assert load_config(path) == config.model_copy(update={"overwrite": False})


def test_rewards_and_prompts_survive_being_written(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prompts = {
        "parquet": "p.parquet",
        "tools": [{"name": "add"}],
        "chat_template_kwargs": {"enable_thinking": False},
        "ignore": ["images"],
    }
    settings = FULL | {
        "prompts": prompts,
        "reward": ["a:b", "exact_match"],
        "reward_weights": [1, 0.5],
        "generation": {"stop": ["</answer>", "\n"]},
    }
    config = load(settings).resolved()
    assert config.prompts is not None
    assert config.prompts.parquet == tmp_path / "p.parquet"
    assert load(yaml.safe_load(config.to_yaml())) == config
