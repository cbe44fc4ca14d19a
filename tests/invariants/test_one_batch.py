"""The cross-prompt U-statistic on the enumerable policy: exactness, bias, calibration, and its traps."""

import pytest
import torch

from entropy_probe import EntropyProbe, ProbeConfig, Rollouts
from entropy_probe.estimators.u_statistic import cross_statistic
from tests.reference.enumeration import LONGEST, TEMPERATURE, Table, TinyPolicy, trained_optimizer

TABLE = Table.build()
GROUP = 4
SETTINGS = {"normalization": "sequence", "loss_type": "dr_grpo", "max_completion_length": LONGEST,
            "frozen_max_scale": 1e12}  # fmt: skip


def batch(seed: int, prompts: int = 8, group: int = GROUP) -> Rollouts:
    generator = torch.Generator().manual_seed(seed)
    return TABLE.update_batch(TABLE.sample_groups(TinyPolicy(), prompts, group, generator), group)


def cross(model, optimizer, rollouts, **settings):
    config = ProbeConfig(**({"temperature": TEMPERATURE, "merge_equal_prompts": False} | SETTINGS | settings))
    return EntropyProbe(model, optimizer, config).cross_prompt(rollouts)


def scale_of(model, optimizer) -> dict[str, torch.Tensor]:
    return {
        n: 1 / ((optimizer.state[p]["exp_avg_sq"] / (1 - 0.999**3)).sqrt() + 1e-8)
        for n, p in model.named_parameters()
        if p.requires_grad
    }


def per_prompt(model, rollouts, entropy: str) -> tuple[torch.Tensor, torch.Tensor]:
    """X_u and Y_u as flat rows, by autograd prompt by prompt, per sequence and dr_grpo."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    log_p = torch.log_softmax(model(rollouts.input_ids, rollouts.attention_mask.long()).logits / TEMPERATURE, -1)
    s = log_p[:, :-1].gather(-1, rollouts.input_ids[:, 1:, None])[..., 0] * rollouts.response_mask[:, 1:]
    h = -(log_p.exp() * log_p).sum(-1)[:, :-1] * rollouts.response_mask[:, 1:]
    lengths, ids = rollouts.response_mask.sum(1), rollouts.prompt_ids
    xs, ys = [], []
    for u in ids.unique():
        rows = (ids == u).nonzero()[:, 0].tolist()
        value = torch.zeros((), dtype=torch.float64)
        for i in rows:
            if entropy == "surprisal":
                others = [s[j].detach().sum() for j in rows if j != i]
                value = value + (s[i].detach().sum() - sum(others) / len(others)) * s[i].sum() / len(rows)
                continue
            for t in range(int(lengths[i])):
                to_go = h[i, t + 1 :].detach().sum()
                reach = [h[j, t + 1 :].detach().sum() for j in range(len(ids)) if ids[j] != u and lengths[j] > t]
                baseline = sum(reach) / len(reach) if reach else 0.0
                value = value - (h[i, t] + (to_go - baseline) * s[i, t]) / len(rows)
        y = sum(rollouts.advantages[i] * s[i].sum() for i in rows) / len(rows) / LONGEST
        for target, out in ((value, xs), (y, ys)):
            gradient = torch.autograd.grad(target, parameters, retain_graph=True)
            out.append(torch.cat([g.reshape(-1) for g in gradient]))
    return torch.stack(xs), torch.stack(ys)


@pytest.mark.parametrize("path", ["per unit", "taps", "linear-layer taps"])
@pytest.mark.parametrize("entropy", ["rao_blackwell", "surprisal"])
@pytest.mark.parametrize("memory", [2.0, 6e-6, 0.0], ids=["stored", "one side stored", "two passes"])
def test_equals_a_double_loop(path, entropy, memory, monkeypatch):
    model = TinyPolicy(train_embedding=path != "linear-layer taps")
    if path == "per unit":
        monkeypatch.setattr("entropy_probe.session.tappable", lambda *a: "switched off by a test")
    optimizer = trained_optimizer(model)
    rollouts = batch(1)
    got = cross(model, optimizer, rollouts, entropy=entropy, max_stored_gradient_gib=memory)
    x, y = per_prompt(model, rollouts, entropy)
    p = torch.cat([s.reshape(-1) for s in scale_of(model, optimizer).values()])
    u = len(x)
    k = torch.tensor([[(x[i] * p * y[j]).sum() for j in range(u)] for i in range(u)])
    off = k - torch.diag(k.diag())
    rows = (off.sum(0) + off.sum(1)) / (2 * (u - 1))
    leave = torch.stack([off[keep][:, keep].sum() / ((u - 1) * (u - 2)) for keep in
                         ([j for j in range(u) if j != i] for i in range(u))])  # fmt: skip
    value = off.sum() / (u * (u - 1))
    expected = {
        "u_cross": value,
        "bars_dot": k.sum() / u**2,
        "diagonal": k.diag().sum(),
        "delta_h1": -1e-3 * value,
        "se_plugin": 1e-3 * 2 * rows.std() / u**0.5,
        "se_jackknife": 1e-3 * ((u - 1) / u * (leave - leave.mean()).square().sum()).sqrt(),
        "zeta_plugin": rows.var(),
    }
    for name, number in expected.items():
        assert getattr(got, name) == pytest.approx(number.item(), rel=1e-9), name
    assert got.row_means == pytest.approx(rows.tolist(), rel=1e-9)
    assert sum(got.row_means) / u == pytest.approx(got.u_cross, rel=1e-12)
    assert got.mode == "exact"
    how = {2.0: "one pass", 6e-6: "two passes, one side's gradients", 0.0: "two passes, since"}
    assert got.gradients.startswith(how[memory])
    # P enters once: neither its square nor its absence gives this number
    for wrong in (p**0, p**2):
        other = (x @ (wrong[:, None] * y.T)).fill_diagonal_(0).sum() / (u * (u - 1))
        assert got.u_cross != pytest.approx(other.item(), rel=1e-2)
    assert got.bars_dot_ratio == pytest.approx((k.sum() / (x.sum(0) @ y.sum(0))).item(), rel=1e-9)


@pytest.mark.checked
def test_blocks_of_one_are_exact_and_blocks_are_units():
    model = TinyPolicy(train_embedding=False)
    optimizer = trained_optimizer(model)
    rollouts = batch(2, prompts=12)
    exact = cross(model, optimizer, rollouts)
    ones = cross(model, optimizer, rollouts, one_batch_units="block", block_size=1)
    assert ones == exact
    blocks = cross(model, optimizer, rollouts, one_batch_units="block", block_size=3)
    assert (blocks.mode, blocks.num_units, blocks.block_size) == ("block", 4, 3)
    assert blocks.u_cross != exact.u_cross
    renamed = Rollouts(rollouts.input_ids, rollouts.attention_mask, rollouts.response_mask, rollouts.prompt_ids // 3,
                       advantages=rollouts.advantages)  # fmt: skip
    assert cross(model, optimizer, renamed).u_cross == pytest.approx(blocks.u_cross, rel=1e-12)


def test_large_batches_use_blocks():
    model = TinyPolicy(train_embedding=False)
    optimizer = trained_optimizer(model)
    got = cross(model, optimizer, batch(3, prompts=192, group=2))
    assert (got.mode, got.num_units, got.block_size) == ("block", 96, 2)
    assert cross(model, optimizer, batch(3, prompts=131, group=2)).mode == "exact"


def exact_cross(model, optimizer) -> float:
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradient_h = torch.autograd.grad(TABLE.entropy(model, "sequence"), parameters)
    reward = (TABLE.probabilities(model) * TABLE.rollouts.rewards).sum()
    gradient_r = torch.autograd.grad(reward, parameters)
    products = zip(gradient_h, scale_of(model, optimizer).values(), gradient_r, strict=True)
    return -(1 - 1 / GROUP) / LONGEST * sum((h * p * r).sum().item() for h, p, r in products)


@pytest.fixture(scope="module")
def rows():
    """X_u and P Y_u of many independent prompts, from which batches of any size are arithmetic."""
    model = TinyPolicy(train_embedding=False)
    optimizer = trained_optimizer(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    scores = TABLE.token_scores(model)
    jacobian = torch.stack([
        torch.cat([g.reshape(-1) for g in torch.autograd.grad(s, parameters, retain_graph=True)])
        for s in scores.logprobs.sum(1)
    ])  # fmt: skip
    generator = torch.Generator().manual_seed(7)
    count = 96_000
    picked = TABLE.sample_groups(model, count, GROUP, generator).view(count, GROUP)
    s = scores.logprobs.detach().sum(1)[picked]
    r = TABLE.rollouts.rewards[picked]
    others = (s.sum(1, keepdim=True) - s) / (GROUP - 1)
    x = torch.einsum("ug,ugp->up", (s - others) / GROUP, jacobian[picked])
    y = torch.einsum("ug,ugp->up", (r - r.mean(1, keepdim=True)) / GROUP / LONGEST, jacobian[picked])
    p = torch.cat([v.reshape(-1) for v in scale_of(model, optimizer).values()])
    return x, p * y, exact_cross(model, optimizer)


def statistics(rows, units):
    x, py, exact = rows
    found = []
    for start in range(0, len(x) - units + 1, units):
        a, b = x[start : start + units], py[start : start + units]
        found.append(cross_statistic(a @ b.sum(0), b @ a.sum(0), (a * b).sum(1)))
    return found, exact


@pytest.mark.parametrize("units", [4, 8, 32])
def test_unbiased_where_the_v_statistic_is_not(rows, units):
    found, exact = statistics(rows, units)
    for name, biased in (("value", False), ("bars_dot", True)):
        values = torch.tensor([getattr(f, name) for f in found])
        z = (values.mean() - exact) / (values.std() / len(values) ** 0.5)
        assert (abs(z) > 4.5) == biased, f"{name}: mean {values.mean():.5g}, exact {exact:.5g}, z {z:.1f}"


def test_errors_are_calibrated(rows):
    found, exact = statistics(rows, 32)
    values = torch.tensor([f.value for f in found])
    truth = values.var().item()
    assert torch.tensor([f.se_plugin**2 for f in found]).mean().item() == pytest.approx(truth, rel=0.15)
    assert torch.tensor([f.se_jackknife**2 for f in found]).mean().item() == pytest.approx(truth, rel=0.25)
    for name in ("se_plugin", "se_jackknife"):
        errors = torch.tensor([getattr(f, name) for f in found])
        covered = ((values - exact).abs() <= 1.96 * errors).double().mean()
        assert 0.90 <= covered <= 0.98, f"{name}: {covered}"
    for f in found[:5]:
        assert f.zeta_plugin == pytest.approx(f.se_plugin**2 * 32 / 4)
        assert f.zeta_jackknife == pytest.approx(f.se_jackknife**2 * 32 / 4)


def test_agrees_with_the_two_batch_prediction_on_average():
    """The same frozen step, predicted from one batch and from two, over several batches."""
    model = TinyPolicy(train_embedding=False)
    optimizer = trained_optimizer(model)
    gaps, errors = [], []
    for seed in range(40):
        one = cross(model, optimizer, batch(seed, prompts=24))
        probe = EntropyProbe(model, optimizer, ProbeConfig(temperature=TEMPERATURE, geometry="frozen", **SETTINGS))
        evaluation = TABLE.rollouts.select(TABLE.sample(model, 200, torch.Generator().manual_seed(1000 + seed)))
        two = probe.predict(update=batch(seed, prompts=24), evaluation=evaluation).predicted
        gaps.append(one.delta_h1 - two.value)
        errors.append((one.se_plugin**2 + two.standard_error**2) ** 0.5)
    gaps = torch.tensor(gaps)
    assert abs(gaps.mean()) < 4 * gaps.std() / len(gaps) ** 0.5
    assert gaps.std() < 1.5 * torch.tensor(errors).mean()


@pytest.mark.checked
def test_rates_of_groups_are_folded_into_the_scale():
    model = TinyPolicy(train_embedding=False)
    optimizer = trained_optimizer(model)
    one = cross(model, optimizer, batch(4))
    weights, biases = ([p for n, p in model.named_parameters() if p.requires_grad and n.endswith(kind)]
                       for kind in ("weight", "bias"))  # fmt: skip
    split = torch.optim.AdamW([{"params": weights, "lr": 1e-3}, {"params": biases, "lr": 5e-4}])
    split.state.update(optimizer.state)
    both = cross(model, split, batch(4))
    only_weights = torch.optim.AdamW([{"params": weights, "lr": 1e-3}, {"params": biases, "lr": 0.0}])
    only_weights.state.update(optimizer.state)
    half = (one.delta_h1 + cross(model, only_weights, batch(4)).delta_h1) / 2
    assert both.delta_h1 == pytest.approx(half, rel=1e-9)


@pytest.mark.parametrize(
    ("given", "settings", "message"),
    [
        ({"prompts": 2}, {}, "expected at least 3 units for the U-statistic and its jackknife error, got 2"),
        ({"prompts": 8, "group": 1}, {"entropy": "surprisal"}, "expected at least 2 responses per prompt"),
        ({"prompts": 8}, {"one_batch_units": "block", "block_size": 9}, "expected a divisor of the 8 prompts"),
        ({"prompts": 8}, {"block_size": 3}, "use one of 1, 2, 4"),
        ({"prompts": 8}, {"one_batch_units": "exact", "block_size": 2}, "expected 1 or nothing"),
        ({"prompts": 8}, {"one_batch_units": "block", "block_size": 4}, "expected at least 3 units"),
        ({"prompts": 8}, {"one_batch_units": "block"}, "set block_size, or use 'exact'"),
    ],
)
def test_bad_requests(given, settings, message):
    model = TinyPolicy(train_embedding=False)
    with pytest.raises(ValueError, match=message):
        cross(model, trained_optimizer(model), batch(5, **given), **settings)


def test_missing_second_moments_are_an_error_unless_accepted():
    model = TinyPolicy(train_embedding=False)
    fresh = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with pytest.raises(ValueError, match=r"usable second moment for at least 90% of the elements, got 0\.0%"):
        cross(model, fresh, batch(6))
    got = cross(model, fresh, batch(6), identity_if_coverage_below=0.9)
    assert got.preconditioner.num_identity == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert got.bars_dot_ratio == pytest.approx(1.0)
