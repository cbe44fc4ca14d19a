"""A trainer's loss in a config file, and what it takes, checked before anything is sampled."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from entropy_probe import Rollouts
from entropy_probe.sampling import HFGenerator
from tests.cli.conftest import invoke

KL = "probe.loss={trainer: trl, beta: 0.5}"


@pytest.fixture
def config(config):
    """Of other losses than the checkpoint was trained with."""
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | {"trust_config": True}))
    return config


def run(*args):
    done = invoke("run", *args)
    assert done.exit_code == 0, (done.output, done.exception)
    return " ".join(done.stdout.split())


def gradient_norm(directory) -> float:
    return json.loads((directory / "results.json").read_text())["diagnostics"]["gradient_norm"]


def test_a_loss_with_all_its_settings_is_kept_and_repeated(config, tmp_path):
    out = run(config, "probe.loss={trainer: trl, loss_type: grpo, beta: 0.5, entropy_coef: 0.2, epsilon_high: 0.28}")
    assert "clip range inert: every ratio is 1 on this step (epsilon_high)" in out
    assert "its adapter switched off" in out
    saved = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["probe"]
    assert saved["loss"]["trainer"] == "trl"
    assert saved["loss"]["beta"] == 0.5
    assert "loss_type" not in saved
    run(tmp_path / "out" / "config.yaml", "--output-dir", tmp_path / "again", "probe.max_completion_length=8")
    assert gradient_norm(tmp_path / "again") == gradient_norm(tmp_path / "out")
    run(tmp_path / "out" / "config.yaml", "--output-dir", tmp_path / "other", "probe.loss.entropy_coef=0.0")
    assert gradient_norm(tmp_path / "other") != pytest.approx(gradient_norm(tmp_path / "out"), rel=1e-3)


def test_fresh_rollouts_are_their_own_old_policys(config, tmp_path):
    run(config, "probe.loss={trainer: trl, num_iterations: 2}")
    run(config, "--output-dir", tmp_path / "once")
    assert gradient_norm(tmp_path / "once") == pytest.approx(gradient_norm(tmp_path / "out"), rel=1e-4)
    assert Rollouts.from_parquet(tmp_path / "out" / "update.parquet").old_logprobs is not None


@pytest.fixture
def _nothing_sampled(monkeypatch, tmp_path):
    monkeypatch.setattr(HFGenerator, "generate", lambda *_: pytest.fail("sampled"))
    yield
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*.parquet"))


@pytest.mark.usefixtures("_nothing_sampled")
def test_a_kl_term_without_a_reference_is_refused_before_sampling(config, runs, refused, tmp_path):
    full = runs("full")
    line = refused("run", config, KL, f"checkpoint={full.directory / 'checkpoint-2'}")
    assert "reference_logprobs: expected [N, L] on an update batch of a loss with a KL term, got None" in line
    assert "give its model (reference)" in line


@pytest.mark.usefixtures("_nothing_sampled")
@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "probe.loss={trainer: trl, epsilon_hihg: 0.3}",
            "loss.epsilon_hihg: not a setting of trl's losses; did",
        ),
        ("probe.loss={trainer: tlr}", "loss.trainer: expected one of "),
        ("probe.lossy=1", "probe.lossy: unknown key; did you mean probe.loss"),
        ("reference=base", "reference: expected a loss with a KL term beside it"),
    ],
)
def test_settings_that_do_not_fit_are_refused(config, refused, override, said):
    assert said in refused("run", config, override)


@pytest.mark.usefixtures("_nothing_sampled")
def test_a_batch_that_lacks_what_the_loss_takes_is_refused_before_sampling(trained, config, refused, tmp_path):
    ids = torch.randint(2, 50, (8, 8), generator=torch.Generator().manual_seed(0))
    batch = Rollouts(ids, torch.ones_like(ids), torch.arange(8).expand(8, 8) > 2, torch.arange(8) // 2,
                     advantages=torch.tensor([1.0, -1.0] * 4))  # fmt: skip
    batch.to_parquet(tmp_path / "u.parquet")
    line = refused(
        "run", config, "probe.loss={trainer: trl, num_iterations: 2}", f"rollouts.update={tmp_path}/u.parquet"
    )
    assert "old_logprobs: expected [N, L] on an update batch" in line


def test_the_reference_of_full_weights_is_a_directory(config, runs, tmp_path):
    full = runs("full")
    given = (config, KL, f"checkpoint={full.directory / 'checkpoint-2'}", "mode=one_batch")
    base = full.directory / "base"
    run(*given, f"reference={base}")
    run(*given, f"reference={full.directory / 'checkpoint-2'}", "--output-dir", tmp_path / "itself")
    run(config, f"checkpoint={full.directory / 'checkpoint-2'}", "mode=one_batch", "--output-dir", tmp_path / "plain")
    assert gradient_norm(tmp_path / "itself") == pytest.approx(gradient_norm(tmp_path / "plain"), rel=1e-5)
    assert gradient_norm(tmp_path / "out") != pytest.approx(gradient_norm(tmp_path / "plain"), rel=1e-4)


def test_a_reference_copy_in_the_checkpoint_is_asked_for(checkpoint, config, refused):
    (checkpoint / "ref").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (checkpoint / "ref" / name).write_bytes((checkpoint / name).read_bytes())
    line = refused("run", config, KL, f"checkpoint={checkpoint}")
    assert "since the reference is its adapter 'ref', which is not loaded; record them in training" in line


def test_truncated_responses_are_masked_as_the_trainer_does(config, tmp_path):
    run(config, "update.mask_truncated_completions=true", "probe.max_completion_length=40")
    update = Rollouts.from_parquet(tmp_path / "out" / "update.parquet")
    assert 0 < int(update.response_mask.any(1).sum()) < len(update)
    assert bool((update.response_lengths < 40)[update.response_mask.any(1)].any())
