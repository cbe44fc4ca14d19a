"""The cross-prompt U-statistic on the enumerable policy: exactness, bias, calibration, and its traps."""

from functools import partial

import pytest
import torch

from entropy_probe import EntropyProbe, ProbeConfig, Rollouts
from entropy_probe.analyses.before import chosen_clusters
from entropy_probe.analyses.one_batch import MIN_FOR_LENGTH
from entropy_probe.estimators.baselines import strictly_after
from entropy_probe.estimators.u_statistic import cross_statistic, influence_of_sums
from entropy_probe.estimators.uncertainty import ratio
from entropy_probe.losses.trl import TRLLoss
from entropy_probe.results.student import critical_value
from entropy_probe.types import Clusters
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


@pytest.mark.parametrize("path", ["per cluster", "hooks", "linear-layer hooks"])
@pytest.mark.parametrize("entropy", ["rao_blackwell", "surprisal"])
@pytest.mark.parametrize("memory", [2.0, 6e-6, 0.0], ids=["stored", "one side stored", "two passes"])
def test_equals_a_double_loop(path, entropy, memory, monkeypatch):
    model = TinyPolicy(train_embedding=path != "linear-layer hooks")
    if path == "per cluster":
        monkeypatch.setattr("entropy_probe.analyses.policy.hookable", lambda *a: "switched off by a test")
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
    assert (blocks.mode, blocks.num_clusters, blocks.block_size) == ("block", 4, 3)
    assert blocks.u_cross != exact.u_cross
    renamed = Rollouts(rollouts.input_ids, rollouts.attention_mask, rollouts.response_mask, rollouts.prompt_ids // 3,
                       advantages=rollouts.advantages)  # fmt: skip
    assert cross(model, optimizer, renamed).u_cross == pytest.approx(blocks.u_cross, rel=1e-12)


def test_large_batches_use_blocks():
    model = TinyPolicy(train_embedding=False)
    optimizer = trained_optimizer(model)
    got = cross(model, optimizer, batch(3, prompts=192, group=2))
    assert (got.mode, got.num_clusters, got.block_size) == ("block", 96, 2)
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


def statistics(rows, clusters):
    x, py, exact = rows
    found = []
    for start in range(0, len(x) - clusters + 1, clusters):
        a, b = x[start : start + clusters], py[start : start + clusters]
        found.append(cross_statistic(a @ b.sum(0), b @ a.sum(0), (a * b).sum(1)))
    return found, exact


@pytest.mark.parametrize("clusters", [4, 8, 32])
def test_unbiased_where_the_v_statistic_is_not(rows, clusters):
    found, exact = statistics(rows, clusters)
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
        ({"prompts": 2}, {}, "expected at least 3 clusters for the U-statistic and its jackknife error, got 2"),
        ({"prompts": 8, "group": 1}, {"entropy": "surprisal"}, "expected at least 2 responses per prompt"),
        ({"prompts": 8}, {"one_batch_units": "block", "block_size": 9}, "expected a divisor of the 8 prompts"),
        ({"prompts": 8}, {"block_size": 3}, "use one of 1, 2, 4"),
        ({"prompts": 8}, {"one_batch_units": "exact", "block_size": 2}, "expected 1 or nothing"),
        ({"prompts": 8}, {"one_batch_units": "block", "block_size": 4}, "expected at least 3 clusters"),
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


class PerToken:
    """Gradients of every response per token, from which many batches are arithmetic; rewards may be lengths.

    Baselines are the exact means by position, so that a prompt's gradients are its own but for the batch's H and sums.
    """

    def __init__(self, seed: int, rewards: str) -> None:
        model = TinyPolicy(seed, train_embedding=False)
        parameters = [p for p in model.parameters() if p.requires_grad]
        scores, mask = TABLE.token_scores(model), TABLE.rollouts.response_mask
        self.probabilities = TABLE.probabilities(model).detach()
        self.lengths = mask.sum(1).double()
        self.entropies = scores.entropies.detach().sum(1)
        self.rewards = self.lengths if rewards == "length" else TABLE.rollouts.rewards

        def centred(values: torch.Tensor) -> torch.Tensor:
            to_go = strictly_after(values.detach(), mask)
            reach = self.probabilities[:, None] * mask
            return (to_go - (reach * to_go).sum(0) / reach.sum(0).clamp(min=1e-12)) * mask

        def rows(values: torch.Tensor) -> torch.Tensor:
            found = [torch.autograd.grad(v, parameters, retain_graph=True, allow_unused=True) for v in values]
            return torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in found])

        s, h = scores.logprobs, scores.entropies
        self.of_entropy = rows((h + centred(h) * s).sum(1))
        self.of_length = rows((centred(mask.double()) * s).sum(1))
        self.of_logprob = rows(s.sum(1))
        scale = scale_of(model, trained_optimizer(model))
        self.scale = torch.cat([v.reshape(-1) for v in scale.values()])
        gradients = [torch.autograd.grad(f, parameters) for f in (
            TABLE.entropy(model, "token"), (TABLE.probabilities(model) * self.rewards).sum()
        )]  # fmt: skip
        h_flat, r_flat = (torch.cat([g.reshape(-1) for g in each]) for each in gradients)
        mean_length = self.probabilities @ self.lengths
        self.exact = -((1 - 1 / GROUP) / mean_length * (h_flat @ (self.scale * r_flat))).item()

    def statistic(self, prompts: int, generator: torch.Generator, *, of_sums: bool):
        """The statistic of the token-mean loss on one batch."""
        which = torch.randint(3, (prompts,), generator=generator)
        p = self.probabilities.view(3, -1)[which]
        picked = torch.multinomial(p, GROUP, replacement=True, generator=generator) + p.shape[1] * which[:, None]
        tokens, h = self.lengths[picked].sum(1), self.entropies[picked].sum(1)
        entropy = ratio(h, tokens)
        share = prompts / tokens.sum()
        advantages = self.rewards[picked] - self.rewards[picked].mean(1, keepdim=True)
        lengths = self.of_length[picked].sum(1)
        x = -share * (self.of_entropy[picked].sum(1) - entropy.value * lengths)
        y = share * torch.einsum("ug,ugp->up", advantages, self.of_logprob[picked]) * self.scale
        some = MIN_FOR_LENGTH
        slope = (lengths[:some].sum(0) @ y[some:].mean(0) / tokens[:some].sum()).item()
        beyond = partial(influence_of_sums, weights=tokens, loss_weights=tokens, entropy=entropy, length_slope=slope)
        given = (x @ y.sum(0), y @ x.sum(0), (x * y).sum(1))
        return cross_statistic(*given, beyond if of_sums else None)


def coverage(seed: int, rewards: str, batches: int, *, of_sums: bool = True, prompts: int = 40):
    """Both reported variances over the true one, and how often the larger error covers."""
    policy, generator = PerToken(seed, rewards), torch.Generator().manual_seed(1)
    found = [policy.statistic(prompts, generator, of_sums=of_sums) for _ in range(batches)]
    values, plugin, jackknife = torch.tensor([(f.value, f.se_plugin, f.se_jackknife) for f in found]).double().T
    reach = critical_value(prompts - 1) * torch.maximum(plugin, jackknife)
    covered = ((values - policy.exact).abs() <= reach).double().mean().item()
    return plugin.square().mean() / values.var(), jackknife.square().mean() / values.var(), covered


@pytest.mark.parametrize(
    ("seed", "rewards", "without"), [(4, "length", 0.43), (3, "length", 0.85), (1, "random", 1.35)]
)
def test_the_error_per_token_has_the_terms_of_the_batchs_sums(seed, rewards, without):
    plugin, jackknife, covered = coverage(seed, rewards, 400)
    assert plugin == pytest.approx(1, abs=0.25)
    assert jackknife == pytest.approx(1, abs=0.25)
    assert 0.90 <= covered <= 0.985
    held, _, _ = coverage(seed, rewards, 400, of_sums=False)
    assert held / plugin == pytest.approx(without, rel=0.2)


@pytest.mark.parametrize(("loss", "kept"), [("dapo", 2.0), ("dapo", 0.0), ("grpo", 2.0)])
def test_a_probe_takes_these_terms_from_its_batch(loss, kept):
    """Against the same by loops."""
    model = TinyPolicy(3, train_embedding=False)
    optimizer = trained_optimizer(model)
    rollouts = batch(3, prompts=9)
    got = cross(model, optimizer, rollouts, normalization="token", loss_type=loss, max_stored_gradient_gib=kept)
    scores = TABLE.token_scores(model)
    rows = [int((TABLE.rollouts.input_ids == ids).all(1).nonzero()[0, 0]) for ids in rollouts.input_ids]
    clusters, own = Clusters.prompts(rollouts.prompt_ids), scores.select(torch.tensor(rows))
    tokens = clusters.total(rollouts.response_lengths)
    h = ratio(clusters.total(own.entropies.detach().sum(1)), tokens)
    parameters = [p for p in model.parameters() if p.requires_grad]
    scale = torch.cat([s.reshape(-1) for s in scale_of(model, optimizer).values()])

    def flat(value: torch.Tensor) -> torch.Tensor:
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, parameters, retain_graph=True)])

    to_go = strictly_after(own.response_mask.double(), own.response_mask)
    some = chosen_clusters(rollouts, clusters, 4)
    baseline = torch.zeros_like(to_go)
    for i, t in own.response_mask.nonzero().tolist():
        other = own.response_mask[:, t] & (clusters.index != clusters.index[i])
        baseline[i, t] = to_go[other, t].mean() if bool(other.any()) else 0.0
    omega = TRLLoss(loss_type=loss).weights(rollouts)
    longer, gain = (
        (to_go - baseline) * own.response_mask * own.logprobs,
        omega * rollouts.token_advantages * own.logprobs,
    )
    products = [
        flat(longer[clusters.index == u].sum()) @ (scale * 9 * flat(gain[clusters.index != u].sum())) / 8 for u in some
    ]
    slope = (sum(products) / tokens[some].sum()).item()
    of_loss = tokens if loss == "dapo" else torch.full_like(tokens, GROUP)
    e = slope * h.influence - got.u_cross * ((tokens / tokens.mean() - 1) + (of_loss / of_loss.mean() - 1))
    r = torch.tensor(got.row_means, dtype=torch.float64)
    assert got.zeta_plugin == pytest.approx((r - r.mean() + e / 2).var().item(), rel=1e-8)
    assert got.zeta_plugin != pytest.approx(r.var().item(), rel=1e-2)
    left_out = (9 * got.u_cross - 2 * r) / 7 - e / 8
    assert got.se_jackknife == pytest.approx(1e-3 * (8 / 9 * 8 * left_out.var().item()) ** 0.5, rel=1e-8)
