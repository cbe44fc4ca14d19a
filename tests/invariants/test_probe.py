"""The probe as a whole, on the enumerable policy in float64: exactness, sums, signs, invariances."""

import copy

import pytest
import torch
from torch.func import functional_call, jvp

from entropy_probe import ProbeResult, Rollouts, TokenScores
from entropy_probe.analyses.before import chosen_sequences
from entropy_probe.estimators import uncertainty
from entropy_probe.gradients.per_sample import SampleGradients
from entropy_probe.steps import plan as step
from entropy_probe.steps.adamw import adamw_step, clip_gradient
from entropy_probe.types import Clusters
from tests.invariants.problems import TABLE, batches, numbers, pad, probe, same
from tests.notes import texts
from tests.reference.enumeration import LONGEST, TEMPERATURE, TinyPolicy, trained_optimizer
from tests.whole_batch import coefficients


def brute_force(model: TinyPolicy, optimizer: torch.optim.Optimizer, update: Rollouts, evaluation: Rollouts,
                normalization: str) -> dict[str, float]:  # fmt: skip
    """The prediction from per-sequence autograd on a route of its own, dapo loss, no clipping."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def scores(r: Rollouts) -> tuple[torch.Tensor, torch.Tensor]:
        log_p = torch.log_softmax(model(r.input_ids, r.attention_mask.long()).logits / TEMPERATURE, -1)
        s = log_p[:, :-1].gather(-1, r.input_ids[:, 1:, None])[..., 0] * r.response_mask[:, 1:]
        return s, -(log_p.exp() * log_p).sum(-1)[:, :-1] * r.response_mask[:, 1:]

    s, _ = scores(update)
    prompt_losses = [
        -(s * update.token_advantages[:, 1:])[update.prompt_ids == p].sum() / update.response_mask.sum()
        for p in range(update.num_prompts)
    ]
    per_prompt = [torch.autograd.grad(loss, list(named.values()), retain_graph=True) for loss in prompt_losses]
    g = {n: sum(column) for n, column in zip(named, zip(*per_prompt, strict=True), strict=True)}
    step = adamw_step(named, optimizer, g)
    s, h = scores(evaluation)
    n, d, weights = len(evaluation), [], evaluation.response_mask.sum(1).double()
    h_token = h.detach().sum() / weights.sum() if normalization == "token" else 0.0
    to_go = torch.zeros_like(h)
    for i in range(n):
        for t in range(LONGEST):
            to_go[i, t] = sum(h[i, u].detach() - h_token for u in range(t + 1, int(weights[i])))
    gradient = {k: torch.zeros_like(p) for k, p in named.items()}
    for i in range(n):
        value = torch.zeros((), dtype=torch.float64)
        for t in range(int(weights[i])):
            reach = [j for j in range(n) if j != i and weights[j] > t]
            baseline = sum(to_go[j, t] for j in reach) / len(reach) if reach else 0.0
            value = value + h[i, t] + (to_go[i, t] - baseline) * s[i, t]
        x = torch.autograd.grad(value, list(named.values()), retain_graph=True)
        d.append(sum((a * step.delta[k]).sum() for k, a in zip(named, x, strict=True)))
        for k, a in zip(named, x, strict=True):
            gradient[k] += a
    d = torch.stack(d)
    b = weights if normalization == "token" else torch.ones(n, dtype=torch.float64)
    value = d.sum() / b.sum()
    longer = 0.0
    if normalization == "token":  # the error of the batch's own entropy, times the change of the mean length
        chosen, tokens_to_go = chosen_sequences(evaluation, Clusters.sequences(n)).tolist(), torch.zeros(())
        for i in chosen:
            for t in range(int(weights[i])):
                others = [weights[j] - t - 1 for j in range(n) if j != i and weights[j] > t]
                tokens_to_go = tokens_to_go + (weights[i] - t - 1 - sum(others) / len(others)) * s[i, t]
        x = torch.autograd.grad(tokens_to_go, list(named.values()), retain_graph=True)
        longer = sum((a * step.delta[k]).sum() for k, a in zip(named, x, strict=True)) / weights[chosen].sum()
    excess = h.detach().sum(1) - h_token * b
    se_e = ((d - value * b - longer * excess) / b.mean()).std() / n**0.5
    q = torch.stack([
        -len(per_prompt) * sum((gradient[k] / b.sum() * step.gradient_scale[k] * a).sum()
                               for k, a in zip(named, y, strict=True))
        for y in per_prompt
    ])  # fmt: skip
    se_u = q.std() / len(q) ** 0.5
    return {"value": value.item(), "se_evaluation": se_e.item(), "se_update": se_u.item()}


@pytest.mark.parametrize("path", ["per cluster (switched off)", "hooks", "linear-layer hooks"])
@pytest.mark.parametrize("normalization", ["token", "sequence"])
def test_prediction_equals_brute_force(path, normalization, monkeypatch):
    model = TinyPolicy(train_embedding=path != "linear-layer hooks")
    if path.startswith("per cluster"):
        monkeypatch.setattr("entropy_probe.analyses.policy.hookable", lambda *a: "switched off")
    optimizer = trained_optimizer(model, weight_decay=0.1)
    update, evaluation = batches()
    result = probe(model, optimizer, normalization=normalization, max_grad_norm=None).predict(
        update=update, evaluation=evaluation
    )
    expected = brute_force(model, optimizer, update, evaluation, normalization)
    got = {k: getattr(result.predicted, k) for k in expected}
    assert got == pytest.approx(expected, rel=1e-9)
    assert result.diagnostics.per_sample_gradients == path


def test_two_passes_equal_stored_gradients():
    for train_embedding in (True, False):
        model = TinyPolicy(train_embedding=train_embedding)
        optimizer = trained_optimizer(model)
        update, evaluation = batches()
        stored = probe(model, optimizer).run(update=update, evaluation=evaluation)
        second = probe(model, optimizer, max_stored_gradient_gib=0).run(update=update, evaluation=evaluation)
        same(numbers(stored), numbers(second))
        assert any("passed over twice" in m for m in texts(second.diagnostics.notes))


@pytest.mark.parametrize("max_norm", [None, 1e-3], ids=["unclipped", "clipped"])
def test_components_sum_and_clipping_is_reported(max_norm):
    model = TinyPolicy()
    update, evaluation = batches()
    result = probe(model, trained_optimizer(model), max_grad_norm=max_norm).run(update=update, evaluation=evaluation)
    assert sum(c.value for c in result.components.values()) == pytest.approx(result.predicted.value, rel=1e-12)
    assert set(result.components) == {"gradient", "momentum", "weight_decay"}
    # only the fresh gradient depends on the update batch
    assert result.components["gradient"].standard_error > result.predicted.se_update
    only_e = probe(model, trained_optimizer(model), max_grad_norm=max_norm).predict(
        update=update, evaluation=evaluation.select(torch.arange(len(evaluation)).repeat(4))
    )
    for name in ("momentum", "weight_decay"):
        ratio = result.components[name].standard_error / only_e.components[name].standard_error
        assert ratio == pytest.approx(2.0, rel=0.1)
    assert (result.diagnostics.clip_factor < 1) == (max_norm is not None)
    assert any("clipping scales" in m for m in texts(result.diagnostics.notes)) == (max_norm is not None)
    assert sum(result.contributions) / len(evaluation) == pytest.approx(result.predicted.value, rel=1e-12)


def test_prediction_and_measurement_converge_to_the_exact_change():
    """Large batches: both within error of the enumerated value, and their difference vanishes with the step."""
    model = TinyPolicy(train_embedding=False)
    optimizer = trained_optimizer(model, lr=1e-3)
    update, evaluation = batches(seed=4, n=10_000)
    gaps = []
    for lr in (4e-3, 1e-3):
        result = probe(model, optimizer, learning_rate=lr).run(update=update, evaluation=evaluation)
        after = copy.deepcopy(model)
        shadow = trained_optimizer(after, lr=lr)
        weights = update.token_advantages / update.response_mask.sum()
        log_p = torch.log_softmax(after(update.input_ids, update.attention_mask.long()).logits / TEMPERATURE, -1)
        s = log_p[:, :-1].gather(-1, update.input_ids[:, 1:, None])[..., 0]
        (-(weights[:, 1:] * s).sum()).backward()
        torch.nn.utils.clip_grad_norm_(after.parameters(), 1.0)
        shadow.step()
        exact = (TABLE.entropy(after, "token") - TABLE.entropy(model, "token")).item()
        assert abs(result.realized.value - exact) < 4 * result.realized.standard_error
        theta = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}
        delta = {k: p.detach() - theta[k] for k, p in after.named_parameters() if k in theta}

        class Bound:
            def __init__(self, q):
                self.q = q

            def __call__(self, *args):
                return functional_call(model, self.q, args)

        _, slope = jvp(lambda q: TABLE.entropy(Bound(q), "token"), (theta,), (delta,))
        assert abs(result.predicted.value - slope.item()) < 4 * result.predicted.se_evaluation
        gaps.append(abs(result.realized.value - result.predicted.value) / abs(result.predicted.value))
    assert gaps[1] < 0.4 * gaps[0]


def test_total_error_covers_over_both_batches():
    """Frozen geometry is linear in the gradient, so the exact expectation over U and E is known."""
    model = TinyPolicy(train_embedding=False)
    optimizer = trained_optimizer(model)
    group = 4
    theta = {k: p for k, p in model.named_parameters() if p.requires_grad}
    gradient_h = torch.autograd.grad(TABLE.entropy(model, "sequence"), list(theta.values()))
    mean_reward = (TABLE.probabilities(model) * TABLE.rollouts.rewards).sum()
    gradient_r = torch.autograd.grad(mean_reward, list(theta.values()))
    exact = 0.0
    for p, h, r in zip(theta.values(), gradient_h, gradient_r, strict=True):
        state = optimizer.state[p]
        scale = 1 / ((state["exp_avg_sq"] / (1 - 0.999**3)).sqrt() + 1e-8)
        # centring within a group of G keeps 1 - 1/G of the gradient
        exact += 1e-3 * (1 - 1 / group) / LONGEST * (h * scale * r).sum().item()
    covered, values = 0, []
    settings = {"geometry": "frozen", "normalization": "sequence", "loss_type": "dr_grpo",
                "max_completion_length": LONGEST, "frozen_max_scale": 1e12}  # fmt: skip
    for seed in range(200):
        update, evaluation = batches(seed=seed, groups=40, n=60)
        predicted = probe(model, optimizer, **settings).predict(update=update, evaluation=evaluation).predicted
        values.append(predicted.value)
        covered += abs(predicted.value - exact) <= 1.96 * predicted.standard_error
    values = torch.tensor(values)
    assert abs(values.mean() - exact) < 4 * values.std() / len(values) ** 0.5
    assert 0.91 <= covered / 200 <= 0.985


def test_negated_advantages_flip_the_gradient_component_exactly():
    model = TinyPolicy()
    optimizer = trained_optimizer(model)
    update, evaluation = batches()
    flipped = Rollouts(update.input_ids, update.attention_mask, update.response_mask, update.prompt_ids,
                       advantages=-update.advantages)  # fmt: skip
    a, b = (probe(model, optimizer).predict(update=u, evaluation=evaluation) for u in (update, flipped))
    assert a.components["gradient"].value == -b.components["gradient"].value
    assert a.components["momentum"].value == b.components["momentum"].value


def test_zero_advantages_without_history_change_nothing():
    model = TinyPolicy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    update, evaluation = batches()
    still = Rollouts(update.input_ids, update.attention_mask, update.response_mask, update.prompt_ids,
                     advantages=torch.zeros(len(update)))  # fmt: skip
    result = probe(model, optimizer).run(update=still, evaluation=evaluation)
    assert result.components["gradient"].value == 0
    assert result.predicted.value == result.realized.value == 0
    assert result.realized.ess == len(evaluation)
    assert result.realized.max_weight == 1
    assert any("no usable second moment" in m for m in texts(result.diagnostics.notes))
    assert any("without a history" in m for m in texts(result.diagnostics.notes))


@pytest.mark.parametrize("train_embedding", [True, False])
@pytest.mark.parametrize("realized", ["per_decision", "snis"])
def test_invariant_to_layout(train_embedding, realized):
    model = TinyPolicy(train_embedding=train_embedding)
    optimizer = trained_optimizer(model)
    update, evaluation = batches()

    def run(u: Rollouts, e: Rollouts, tokens: int = 8192) -> dict[str, float]:
        return numbers(
            probe(model, optimizer, max_tokens_per_microbatch=tokens, realized=realized).run(update=u, evaluation=e)
        )

    expected = run(update, evaluation)
    generator = torch.Generator().manual_seed(9)
    shuffle = [torch.randperm(len(r), generator=generator) for r in (update, evaluation)]
    same(expected, run(update, evaluation, tokens=7))
    same(expected, run(pad(update, 2, 1), pad(evaluation, 0, 3)))
    same(expected, run(update.select(shuffle[0]), evaluation.select(shuffle[1])))


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "cispo", "dr_grpo", "per_prompt_max"])
def test_every_loss_runs_and_matches_autograd(loss_type):
    model = TinyPolicy()
    optimizer = trained_optimizer(model)
    update, evaluation = batches()
    result = probe(model, optimizer, loss_type=loss_type, max_completion_length=5, max_grad_norm=None).predict(
        update=update, evaluation=evaluation
    )
    mask, lengths, n = update.response_mask[:, 1:], update.response_mask.sum(1).double(), len(update)
    longest = torch.stack([lengths[update.prompt_ids == p].max() for p in update.prompt_ids])
    denominator = {"grpo": n * lengths, "dr_grpo": torch.full((n,), n * 5.0), "per_prompt_max": n * longest}.get(
        loss_type, torch.full((n,), lengths.sum().item(), dtype=torch.float64)
    )
    log_p = torch.log_softmax(model(update.input_ids, update.attention_mask.long()).logits / TEMPERATURE, -1)
    s = log_p[:, :-1].gather(-1, update.input_ids[:, 1:, None])[..., 0] * mask
    cap = 0.2 if loss_type == "cispo" else 1.0  # TRL's epsilon_high bounds the ratio itself
    loss = -(cap * s.sum(1) * update.advantages / denominator).sum()
    gradient = dict(
        zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters())), strict=True)
    )
    assert result.diagnostics.gradient_norm == pytest.approx(clip_gradient(gradient, None).norm, rel=1e-10)


def test_evaluation_unit_is_recognised():
    update, evaluation = batches()
    model = TinyPolicy()
    p = probe(model, trained_optimizer(model))
    assert p.predict(update=update, evaluation=evaluation).diagnostics.evaluation_unit == "sequence"
    grouped = p.predict(update=update, evaluation=update)
    assert grouped.diagnostics.evaluation_unit == "prompt"
    assert grouped.predicted.num_clusters == update.num_prompts
    assert any("same sequences" in m for m in texts(grouped.diagnostics.notes))


@pytest.mark.parametrize("unit", ["sequence", "prompt"])
def test_evaluation_unit_can_be_set(unit):
    update, _ = batches()
    evaluation, _ = batches(seed=1)
    model = TinyPolicy()
    got = probe(model, trained_optimizer(model), evaluation_unit=unit).predict(update=update, evaluation=evaluation)
    assert got.diagnostics.evaluation_unit == unit
    assert got.entropy.num_clusters == (evaluation.num_prompts if unit == "prompt" else len(evaluation))


def test_frozen_step_by_hand():
    """Each parameter with its own group's rate, P once, no momentum, decay or clipping; measured like predicted."""
    model = TinyPolicy(train_embedding=False)
    history = trained_optimizer(model, weight_decay=0.5)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    rates = {n: 1e-4 if n.endswith("bias") else 3e-4 for n in named}
    optimizer = torch.optim.AdamW([{"params": [p], "lr": rates[n], "weight_decay": 0.5} for n, p in named.items()])
    optimizer.state.update(history.state)
    update, evaluation = batches()
    settings = {"geometry": "frozen", "frozen_max_scale": 1e12, "max_grad_norm": 1e-6}
    result = probe(model, optimizer, **settings).run(update=update, evaluation=evaluation)
    s = torch.log_softmax(model(update.input_ids, update.attention_mask.long()).logits / TEMPERATURE, -1)
    s = s[:, :-1].gather(-1, update.input_ids[:, 1:, None])[..., 0]
    loss = -(s * update.token_advantages[:, 1:]).sum() / update.response_mask.sum()
    moved = 0.0
    for (n, p), g in zip(named.items(), torch.autograd.grad(loss, list(named.values())), strict=True):
        v = optimizer.state[p]["exp_avg_sq"] / (1 - 0.999**3)
        moved += (rates[n] * g / (v.sqrt() + 1e-8)).square().sum().item()
    assert result.diagnostics.step_norm == pytest.approx(moved**0.5, rel=1e-9)
    assert set(result.components) == {"gradient"}
    assert abs(result.difference.value) < 0.05 * abs(result.predicted.value)


@pytest.mark.parametrize(
    "setting", [("per_sample._CACHED_ELEMENTS", 0), ("layers._BLOCK_ELEMENTS", 60), ("rows._COLUMN_ELEMENTS", 9)]
)
def test_memory_bounds_do_not_change_the_numbers(setting, monkeypatch):
    update, evaluation = batches()
    found = []
    for train_embedding in (True, False):
        model = TinyPolicy(train_embedding=train_embedding)
        optimizer = trained_optimizer(model)
        for bounded in (False, True):
            with monkeypatch.context() as patch:
                if bounded:
                    patch.setattr(f"entropy_probe.gradients.{setting[0]}", setting[1])
                found.append(numbers(probe(model, optimizer).run(update=update, evaluation=evaluation)))
        same(found[-2], found[-1])


def test_evaluation_unit_does_not_depend_on_row_order():
    model = TinyPolicy()
    generator = torch.Generator().manual_seed(8)
    evaluation, _ = batches(groups=12)
    shuffled = evaluation.select(torch.randperm(len(evaluation), generator=generator))
    update, _ = batches(seed=1)
    a, b = (probe(model, trained_optimizer(model)).run(update=update, evaluation=e) for e in (evaluation, shuffled))
    assert a.diagnostics.evaluation_unit == b.diagnostics.evaluation_unit == "prompt"
    same(numbers(a), numbers(b))


def test_rates_are_read_when_the_probe_runs():
    model = TinyPolicy()
    optimizer = trained_optimizer(model)
    update, evaluation = batches()
    for geometry in ("adamw", "frozen"):
        p = probe(model, optimizer, geometry=geometry)
        before = p.predict(update=update, evaluation=evaluation)
        for group in optimizer.param_groups:
            group["lr"] *= 0.5
        after = p.predict(update=update, evaluation=evaluation)
        assert after.predicted.value == pytest.approx(0.5 * before.predicted.value, rel=1e-12)
        assert after.optimizer_state.learning_rates[0] == 0.5 * before.optimizer_state.learning_rates[0]


@pytest.mark.parametrize("geometry", ["adamw", "frozen"])
def test_moments_without_a_step_count_are_refused(geometry):
    model = TinyPolicy()
    optimizer = trained_optimizer(model)
    update, evaluation = batches()
    for state in optimizer.state.values():
        state["step"] = torch.zeros(())
    with pytest.raises(ValueError, match="expected a positive step count"):
        probe(model, optimizer, geometry=geometry).predict(update=update, evaluation=evaluation)
    for state in optimizer.state.values():
        del state["step"]
    if geometry == "adamw":
        with pytest.raises(ValueError, match="expected a step count beside the moments"):
            probe(model, optimizer, geometry=geometry).predict(update=update, evaluation=evaluation)


def test_a_sampler_that_is_not_the_policy_is_noted():
    model = TinyPolicy()
    update, evaluation = batches()
    for shift, noted in ((0.0, False), (0.3, True)):
        log_p = torch.log_softmax(
            model(evaluation.input_ids, evaluation.attention_mask.long()).logits.detach() / TEMPERATURE, -1
        )
        sampled = torch.zeros(evaluation.input_ids.shape, dtype=torch.float64)
        sampled[:, 1:] = log_p[:, :-1].gather(-1, evaluation.input_ids[:, 1:, None])[..., 0] + shift
        given = Rollouts(evaluation.input_ids, evaluation.attention_mask, evaluation.response_mask,
                         evaluation.prompt_ids, sampled_logprobs=sampled)  # fmt: skip
        result = probe(model, trained_optimizer(model)).predict(update=update, evaluation=given)
        assert any("evaluation: sampled_logprobs differ" in m for m in texts(result.diagnostics.notes)) == noted
        found = result.diagnostics.mismatch
        assert found.mean == pytest.approx(shift, abs=1e-12)
        assert found.max == pytest.approx(shift, abs=1e-12)
        weights = torch.exp(-shift * evaluation.response_lengths.double())
        assert found.ess_fraction == pytest.approx((weights.mean() ** 2 / weights.square().mean()).item())
        refusing = probe(model, trained_optimizer(model), on_mismatch="refuse")
        if noted:
            with pytest.raises(
                ValueError, match=r"differ from the policy's by 0.3 nats per token .*expected at most 0.05"
            ):
                refusing.predict(update=update, evaluation=given)
        else:
            refusing.predict(update=update, evaluation=given)
        assert (
            probe(model, trained_optimizer(model)).predict(update=update, evaluation=evaluation).diagnostics.mismatch
            is None
        )


def test_impossible_update_tokens_are_refused():
    model = TinyPolicy()
    optimizer = trained_optimizer(model)
    update, evaluation = batches(groups=12)
    keep = ~((evaluation.input_ids == 3) & evaluation.response_mask).any(1)
    with torch.no_grad():
        model.out.bias[3] = -torch.inf
    with pytest.raises(ValueError, match="expected finite log-probabilities"):
        probe(model, optimizer).predict(update=update, evaluation=evaluation.select(keep))


def test_surprisal_coefficients_equal_the_textbook_form():
    model = TinyPolicy()
    scores = TABLE.token_scores(model)
    rows = torch.arange(0, 120, 4)
    picked = TokenScores(scores.logprobs.detach()[rows], scores.entropies.detach()[rows], scores.response_mask[rows])
    ids = torch.arange(len(rows))
    c = coefficients(picked, ids, Clusters.sequences(len(rows)), "sequence", "surprisal")
    s = picked.sequence_logprobs
    expected = -(s - (s.sum() - s) / (len(s) - 1))
    torch.testing.assert_close(c.logprobs, expected[:, None] * picked.response_mask)
    assert c.entropies is None


def test_surprisal_prediction_by_hand():
    """The textbook score-function estimator, per sequence, with the mean of the prompt's other draws as baseline."""
    model = TinyPolicy(train_embedding=False)
    optimizer = trained_optimizer(model)
    update, evaluation = batches()
    settings = {"entropy": "surprisal", "normalization": "sequence", "max_grad_norm": None}
    result = probe(model, optimizer, **settings).predict(update=update, evaluation=evaluation)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def log_probabilities(r: Rollouts) -> torch.Tensor:
        log_p = torch.log_softmax(model(r.input_ids, r.attention_mask.long()).logits / TEMPERATURE, -1)
        return log_p[:, :-1].gather(-1, r.input_ids[:, 1:, None])[..., 0] * r.response_mask[:, 1:]

    loss = -(log_probabilities(update) * update.token_advantages[:, 1:]).sum() / update.response_mask.sum()
    g = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
    delta = adamw_step(named, optimizer, g).delta
    s = log_probabilities(evaluation).sum(1)
    ids, surrogate = evaluation.prompt_ids, 0.0
    for i in range(len(s)):
        others = [s[j].detach() for j in range(len(s)) if j != i and ids[j] == ids[i]]
        surrogate = surrogate - (s[i].detach() - sum(others) / len(others)) * s[i] / len(s)
    x = torch.autograd.grad(surrogate, list(named.values()))
    expected = sum((a * delta[n]).sum().item() for n, a in zip(named, x, strict=True))
    assert result.predicted.value == pytest.approx(expected, rel=1e-9)
    assert result.entropy.value == pytest.approx(-s.mean().item(), rel=1e-12)


def test_save_and_load_round_trip(tmp_path):
    model = TinyPolicy()
    update, evaluation = batches()
    result = probe(model, trained_optimizer(model)).run(update=update, evaluation=evaluation)
    assert result.save(tmp_path / "out") == tmp_path / "out" / "results.json"
    loaded = ProbeResult.load(tmp_path / "out")
    assert loaded == result.model_copy(update={"contributions": None, "step": None})
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["results.json"]
    file = tmp_path / "out" / "results.json"
    file.write_text(file.read_text().replace('"schema_version": 3', '"schema_version": 2'))
    with pytest.raises(
        ValueError, match=r"not a result of schema 3: schema_version: .* 3, got 2; probe the checkpoint again"
    ):
        ProbeResult.load(tmp_path / "out")
    (tmp_path / "out" / "results.json").write_text("{}")
    with pytest.raises(ValueError, match="not a result of schema"):
        ProbeResult.load(tmp_path / "out")
    (tmp_path / "out" / "results.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"results\.json: not a result of schema"):
        ProbeResult.load(tmp_path / "out")
    with pytest.raises(ValueError, match="no such file"):
        ProbeResult.load(tmp_path / "nowhere")


def test_a_step_that_is_not_the_optimizers_is_noticed(monkeypatch):
    model = TinyPolicy()
    update, evaluation = batches()
    real = step.shadow_step

    def wrong(*args):
        return {name: value + 1e-2 for name, value in real(*args).items()}

    monkeypatch.setattr(step, "shadow_step", wrong)
    with pytest.raises(RuntimeError, match="the optimizer's own step and its closed form disagree"):
        probe(model, trained_optimizer(model)).measure(update=update, evaluation=evaluation)


def test_a_prediction_that_does_not_add_up_over_prompts_is_noticed(monkeypatch):
    model = TinyPolicy()
    update, evaluation = batches()
    real = SampleGradients.dot_stored
    monkeypatch.setattr(SampleGradients, "dot_stored", lambda self, direction: 1.1 * real(self, direction))
    with pytest.raises(RuntimeError, match="summed over evaluation clusters but"):
        probe(model, trained_optimizer(model)).predict(update=update, evaluation=evaluation)


@pytest.mark.parametrize("unit", ["sequence", "prompt"])
@pytest.mark.parametrize("settings", [{}, {"entropy": "surprisal"}, {"normalization": "sequence"}], ids=str)
def test_numbers_do_not_depend_on_how_estimators_are_fed(monkeypatch, settings, unit):
    """A large batch is given to them in chunks, of which no prompt may be in two."""
    model = TinyPolicy()
    optimizer = trained_optimizer(model)
    update, evaluation = batches(n=80)
    subject = probe(model, optimizer, evaluation_unit=unit, **settings)
    whole = numbers(subject.run(update=update, evaluation=evaluation))
    monkeypatch.setattr(uncertainty, "CHUNK_SEQUENCES", 7)
    again = probe(model, optimizer, evaluation_unit=unit, **settings).run(update=update, evaluation=evaluation)
    assert numbers(again) == pytest.approx(whole, rel=1e-10)
