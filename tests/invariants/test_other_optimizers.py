"""The probe with optimizers that have no closed form here: the step of a copy, and the jackknife."""

import copy

import pytest
import torch
from torch.func import functional_call

from entropy_probe import EntropyProbe, ProbeConfig, ProbeResult
from entropy_probe.estimators.jackknife import blocks_of, jackknife_standard_error
from entropy_probe.report import print_sections, run_sections
from entropy_probe.types import Clusters
from tests.invariants.problems import TABLE, batches, numbers, probe, same
from tests.invariants.traces import assert_same, state
from tests.notes import texts
from tests.reference.enumeration import TEMPERATURE, TinyPolicy, trained_optimizer
from tests.steps.optimizers import Lion

optim = torch.optim
OPTIMIZERS = {
    "sgd": (optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
    "nesterov": (optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "rmsprop": (optim.RMSprop, {}),
    "nadam": (optim.NAdam, {}),
    "adafactor": (optim.Adafactor, {}),
    "muon": (optim.Muon, {}),
    "lion": (Lion, {}),
}


def trained(name: str, lr: float = 1e-3) -> tuple[TinyPolicy, torch.optim.Optimizer]:
    cls, options = OPTIMIZERS[name]
    model = TinyPolicy(train_embedding=False)
    if name == "muon":  # takes matrices only
        model.inner.bias.requires_grad_(False)
        model.out.bias.requires_grad_(False)
    return model, trained_optimizer(model, lr=lr, cls=cls, **options)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_model_and_optimizer_are_bitwise_what_they_were(name):
    model, optimizer = trained(name)
    optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    model.out.weight.grad = torch.ones_like(model.out.weight)
    update, evaluation = batches(n=20)
    before = state(model, optimizer)
    result = probe(model, optimizer).run(update=update, evaluation=evaluation)
    assert_same(before, state(model, optimizer))
    assert result.components == {}
    assert result.predicted.se_update_method == "jackknife"
    assert any(
        "no components, and se_update is a jackknife over 9 blocks" in m for m in texts(result.diagnostics.notes)
    )
    assert result.optimizer_state.optimizer.endswith(OPTIMIZERS[name][0].__name__)
    assert (result.optimizer_state.coverage, result.optimizer_state.scale_max) == (1.0, None)


def real_step(model: TinyPolicy, optimizer: torch.optim.Optimizer, update) -> TinyPolicy:
    """The user's own training step on deep copies of model and optimizer together."""
    after, live = copy.deepcopy((model, optimizer))
    log_p = torch.log_softmax(after(update.input_ids, update.attention_mask.long()).logits / TEMPERATURE, -1)
    s = log_p[:, :-1].gather(-1, update.input_ids[:, 1:, None])[..., 0]
    weights = update.token_advantages / update.response_mask.sum()
    (-(weights[:, 1:] * s).sum()).backward()
    torch.nn.utils.clip_grad_norm_([p for p in after.parameters() if p.requires_grad], 1.0)
    live.step()
    return after


@pytest.mark.parametrize("name", ["sgd", "adafactor", "rmsprop"])
def test_prediction_and_measurement_against_the_exact_change(name):
    """The prediction against a finite difference of the enumerated entropy along the real step."""
    model, optimizer = trained(name, lr=3e-3)
    update, evaluation = batches(seed=4, n=10_000)
    result = probe(model, optimizer).run(update=update, evaluation=evaluation)
    after = real_step(model, optimizer, update)
    theta = {k: p.detach() for k, p in model.named_parameters()}
    delta = {k: p.detach() - theta[k] for k, p in after.named_parameters()}

    def entropy(t: float) -> float:
        moved = {k: theta[k] + t * delta[k] for k in theta}
        return TABLE.entropy(lambda *args: functional_call(model, moved, args), "token").item()

    slope = (entropy(1e-3) - entropy(-1e-3)) / 2e-3
    assert abs(result.predicted.value - slope) < 4 * result.predicted.se_evaluation
    assert abs(slope) > 8 * result.predicted.se_evaluation, "too noisy to tell"
    assert abs(result.realized.value - (entropy(1.0) - entropy(0.0))) < 4 * result.realized.standard_error
    norm = sum(d.square().sum() for d in delta.values()).sqrt().item()
    assert result.diagnostics.step_norm == pytest.approx(norm, rel=1e-9)


def test_a_linear_step_has_the_same_error_by_both_methods():
    """Plain SGD is the frozen geometry with P = 1; with one prompt per block the jackknife is then exact."""
    model = TinyPolicy()
    optimizer = optim.SGD(model.parameters(), lr=1e-2)
    update, evaluation = batches(groups=9)
    settings = {"loss_type": "grpo", "max_grad_norm": None}
    own = probe(model, optimizer, **settings).predict(update=update, evaluation=evaluation)
    frozen = probe(model, optimizer, geometry="frozen", identity_if_coverage_below=1.0, **settings)
    linear = frozen.predict(update=update, evaluation=evaluation)
    assert (linear.predicted.se_update_method, own.predicted.se_update_method) == ("linear", "jackknife")
    assert own.predicted.value == pytest.approx(linear.predicted.value, rel=1e-10)
    assert own.predicted.se_update == pytest.approx(linear.predicted.se_update, rel=1e-9)
    assert own.predicted.standard_error == pytest.approx(linear.predicted.standard_error, rel=1e-9)


@pytest.mark.parametrize("train_embedding", [True, False])
@pytest.mark.parametrize("cls", [optim.RMSprop, Lion])
def test_blocks_differentiated_again_equal_stored_ones(cls, train_embedding):
    """Without a history a rounding error in place of 0 would be a full step, as for embeddings of absent tokens."""
    model = TinyPolicy(train_embedding=train_embedding)
    optimizer = cls(model.parameters(), lr=1e-4)
    update, evaluation = batches(groups=21)
    stored = probe(model, optimizer).run(update=update, evaluation=evaluation)
    again = probe(model, optimizer, max_stored_gradient_gib=0).run(update=update, evaluation=evaluation)
    same(numbers(stored), numbers(again), rel=1e-8)
    assert any("jackknife over 16 blocks" in m for m in texts(stored.diagnostics.notes))


def reported_over_true(name: str, repeats: int, lr: float = 1e-3, **settings: object) -> float:
    """Mean reported variance from the update batch over the variance of the prediction, at one evaluation batch."""
    model, optimizer = trained(name, lr)
    generator = torch.Generator().manual_seed(0)
    evaluation = TABLE.rollouts.select(TABLE.sample(model, 60, generator))
    values, errors = [], []
    for _ in range(repeats):
        update = TABLE.update_batch(TABLE.sample_groups(model, 32, 4, generator), 4)
        predicted = probe(model, optimizer, **settings).predict(update=update, evaluation=evaluation).predicted
        values.append(predicted.value)
        errors.append(predicted.se_update)
    return (torch.tensor(errors).square().mean() / torch.tensor(values).var()).item()


@pytest.mark.parametrize("name", [pytest.param("rmsprop", marks=pytest.mark.slow), "adafactor"])
def test_the_jackknife_is_calibrated(name):
    assert 0.6 < reported_over_true(name, 60) < 1.7


def test_clipping_and_normalisation_are_done_again_without_a_block():
    """Against the whole story told by hand: drop a prompt, normalise, clip, step a copy, multiply."""
    model, optimizer = trained("rmsprop")
    update, evaluation = batches(groups=5)
    settings = {"max_grad_norm": 0.05, "normalization": "sequence"}
    result = probe(model, optimizer, **settings).predict(update=update, evaluation=evaluation)
    left_out = []
    for prompt in range(5):
        kept = update.select((update.prompt_ids != prompt).nonzero()[:, 0])
        left_out.append(probe(model, optimizer, **settings).predict(update=kept, evaluation=evaluation).predicted.value)
    values = torch.tensor(left_out, dtype=torch.float64)
    expected = (4 / 5 * (values - values.mean()).square().sum()).sqrt().item()
    assert result.diagnostics.clip_factor < 0.5
    assert result.predicted.se_update == pytest.approx(expected, rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings", "most"),
    [
        ("sgd", {}, 1.35),
        ("sgd", {"max_grad_norm": 0.02}, 1.8),
        ("rmsprop", {}, 1.35),
        ("nadam", {}, 1.35),
        ("adafactor", {}, 1.35),
        ("muon", {}, 10.0),
        ("lion", {}, 6.0),
    ],
)
def test_the_jackknife_is_calibrated_long(name, settings, most):
    """Never too small; steps that are not smooth in the gradient have their error overstated."""
    assert 0.8 < reported_over_true(name, 400, **settings) < most


def test_the_jackknife_of_a_mean_and_of_unequal_blocks():
    x = torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left_out = (x.sum() - x) / 11
    expected = x.std().item() / 12**0.5
    assert jackknife_standard_error(x.mean().item(), left_out, torch.ones(12)) == pytest.approx(expected, rel=1e-12)
    blocks = blocks_of(Clusters.sequences(21))
    sizes = blocks.index.bincount()
    assert (blocks.count, sizes.min(), sizes.max()) == (16, 1, 2)
    assert blocks_of(Clusters.sequences(5)).count == 5
    # a mean over units in blocks of unequal size: unbiased for the variance of the mean
    y = torch.randn(4_000, 21, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = []
    for row in y:
        totals = torch.zeros(16, dtype=torch.float64).index_add_(0, blocks.index, row)
        error = jackknife_standard_error(row.mean().item(), (row.sum() - totals) / (21 - sizes), sizes)
        found.append(error**2)
    assert torch.tensor(found).mean().item() * 21 == pytest.approx(1.0, rel=0.04)
    with pytest.raises(ValueError, match="at least 2 independent prompts"):
        jackknife_standard_error(1.0, torch.ones(1), torch.ones(1))


def test_a_wrapper_is_not_taken_for_what_it_wraps():
    class Lookahead(optim.Optimizer):
        def __init__(self, optimizer):
            super().__init__(optimizer.param_groups, {})
            self.optimizer = optimizer

        def step(self, closure=None):
            self.optimizer.step()

    model, optimizer = trained("sgd")
    with pytest.raises(ValueError, match="Lookahead is not supported: it keeps optimizer outside"):
        EntropyProbe(model, Lookahead(optimizer))
    from accelerate import Accelerator

    update, evaluation = batches(n=20)
    prepared = Accelerator(cpu=True).prepare(optimizer)
    found = EntropyProbe(model, prepared).predict(update=update, evaluation=evaluation)
    assert found.optimizer_state.optimizer == "torch.optim.SGD"


def test_one_batch_needs_adam_or_the_identity():
    model, optimizer = trained("sgd")
    update, _ = batches()
    with pytest.raises(ValueError, match=r"frozen geometry: expected torch\.optim\.AdamW or Adam"):
        probe(model, optimizer).cross_prompt(update)
    assert probe(model, optimizer, identity_if_coverage_below=0.5).cross_prompt(update).preconditioner.coverage == 0


def test_the_result_is_saved_and_printed(tmp_path, capsys):
    from rich.console import Console

    model, optimizer = trained("adafactor")
    update, evaluation = batches()
    result = EntropyProbe(model, optimizer, ProbeConfig(temperature=TEMPERATURE)).run(
        update=update, evaluation=evaluation
    )
    result.save(tmp_path)
    assert ProbeResult.load(tmp_path).predicted == result.predicted
    print_sections(run_sections(result), Console(width=80))
    out = " ".join(capsys.readouterr().out.split())
    assert "torch.optim.Adafactor: its own code takes the step on copies" in out
    assert ", jackknife" in out
    assert "momentum" not in out
