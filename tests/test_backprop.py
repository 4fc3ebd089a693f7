"""The trainer's gradient: against automatic differentiation of the whole objective, finite differences, and cases known by hand."""

import itertools

import pytest
import torch
from torch import nn

from ctrl.finetune.adjoint import adjoint
from ctrl.finetune.backprop import backprop, clip_adjoint
from ctrl.finetune.objective import annealed, effective_gamma, hold, learning_rate_factor, term_weights, within_cell_variance
from ctrl.process import Process, Unguided

ABAR = torch.tensor([0.05, 0.3, 0.7])
PROCESS = Process(torch.tensor([900, 500, 100]), ABAR, torch.tensor([0.3, 0.7, 0.98]))


class Toy(nn.Module):
    """A denoiser on two numbers with its own parameters at every step."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.weight = nn.Parameter(0.3 * torch.randn(3, 2, 2))
        self.double()

    def forward(self, x, i):
        return torch.tanh(x @ self.weight[i])


PRE = Toy(1).requires_grad_(False)


def log_prob(x):
    return -(x - 1).square().sum(1)


def objective(psi, noise, gamma, kl_weight):
    """The definition, step by step: −gamma log p + kl_weight Σ KL of two Gaussians, summed over the batch."""
    x, kl = noise[0], 0.0
    for i in range(3):
        laws = [torch.distributions.Normal(PROCESS.mean(i, x, net(x, i)), PROCESS.sigma(i)) for net in (psi, PRE)]
        kl = kl + torch.distributions.kl_divergence(*laws).sum()
        x = laws[0].mean + PROCESS.sigma(i) * noise[i + 1]
    return -gamma * log_prob(x).sum() + kl_weight * kl


@pytest.fixture
def noise():
    torch.manual_seed(0)
    return torch.randn(4, 5, 2).double()


@pytest.mark.parametrize(("gamma", "kl_weight"), [(1.0, 1.0), (10.0, 1.0), (0.1, 0.01), (1.0, 0.0)])
def test_full_gradient_is_that_of_the_objective(noise, gamma, kl_weight):
    psi = Toy()
    objective(psi, noise, gamma, kl_weight).backward()
    expected, psi.weight.grad = psi.weight.grad, None
    backprop(PROCESS, psi, PRE, log_prob, noise, gamma, kl_weight)
    assert torch.allclose(psi.weight.grad, expected, rtol=1e-5)


def test_held_parameters_move_nothing_but_x(noise):
    psi = Toy()
    x = noise[0].requires_grad_()
    held = hold(psi, psi.parameters())
    held(x, 0).sum().backward()
    assert psi.weight.grad is None and x.grad is not None and psi.weight.requires_grad
    assert torch.equal(held(x, 0), psi(x, 0))


def test_without_a_kl_the_pretrained_model_is_not_differentiated(noise):
    """Reward maximisation reports the KL; a way back through pre would cost a third of its time for a gradient of zero."""
    followed = {}
    for kl_weight in (1.0, 0.0):
        psi, asked = Toy(), []

        def pre(x, i, asked=asked):
            asked.append(torch.is_grad_enabled())
            return PRE(x, i)

        figures = backprop(PROCESS, psi, pre, log_prob, noise, 1.0, kl_weight)
        followed[kl_weight] = asked, figures["kl_nats"]
    assert any(followed[1.0][0]) and not any(followed[0.0][0])
    assert len(followed[0.0][0]) == len(followed[1.0][0]) and torch.equal(followed[0.0][1], followed[1.0][1])


@pytest.mark.parametrize("kl_weight", [1.0, 0.3])
def test_control_variate_is_the_gradient_along_the_trajectory(noise, kl_weight):
    """−gamma log p + kl_weight Σ log psi(x_s | x_t) / pre(x_s | x_t), whose densities hold psi's parameters fixed."""
    psi, fixed, x, loss = Toy(), Toy().requires_grad_(False), noise[0], 0.0
    for i in range(3):
        x_s = PROCESS.step(i, x, psi(x, i), noise[i + 1])
        loss = loss + kl_weight * (PROCESS.log_prob(i, x_s, x, fixed(x, i)) - PROCESS.log_prob(i, x_s, x, PRE(x, i))).sum()
        x = x_s
    (loss - 2.0 * log_prob(x).sum()).backward()
    expected = psi.weight.grad
    for trainer in (backprop, adjoint):
        psi = Toy()
        trainer(PROCESS, psi, PRE, log_prob, noise, 2.0, kl_weight, held=hold(psi, psi.parameters()))
        assert torch.allclose(psi.weight.grad, expected, rtol=1e-6)  # that the adjoint walks without a graph changes nothing here


def test_adjoint_walks_back_through_the_model_it_is_given(noise):
    """g_t = (∂mu / ∂x_t)ᵀ g_s of that model, and the regression on pre; each is asked where its answer is used, and as it is used."""
    psi, other, g = Toy(), Toy(2).requires_grad_(False), None
    path, asked = [noise[0]], {"pre": [], "other": [], "guide": []}
    for i in range(3):
        path.append(PROCESS.step(i, path[i], psi(path[i], i), noise[i + 1]).detach())
    x_0 = path[3].requires_grad_()
    (g,) = torch.autograd.grad(2 * log_prob(x_0).sum(), x_0)
    for i in (2, 1, 0):
        x_t, sigma = path[i].detach().requires_grad_(), PROCESS.sigma(i)
        miss = PROCESS.mean(i, x_t.detach(), psi(x_t.detach(), i)) - PROCESS.mean(i, x_t.detach(), PRE(x_t.detach(), i)) - sigma**2 * g
        (miss.square().sum() / (2 * sigma**2)).backward()
        (g,) = torch.autograd.grad(PROCESS.mean(i, x_t, other(x_t, i)), x_t, g)
    expected, psi.weight.grad = psi.weight.grad, None

    def recording(name, function):
        return lambda x, i, *eps: asked[name].append((i, torch.is_grad_enabled())) or function(x, i)

    parts = Unguided(recording("other", other), recording("guide", PRE))
    adjoint(PROCESS, psi, recording("pre", PRE), log_prob, noise, 2.0, unguided=parts)
    assert torch.allclose(psi.weight.grad, expected, rtol=1e-6)
    assert asked == {"other": [(2, True), (1, True)], "guide": [(2, False), (1, False)], "pre": [(0, False)]}
    psi.weight.grad = None
    adjoint(PROCESS, psi, PRE, log_prob, noise, 2.0)
    assert not torch.allclose(psi.weight.grad, expected, rtol=1e-2)
    with pytest.raises(ValueError, match="held walks back"):
        adjoint(PROCESS, psi, PRE, log_prob, noise, 2.0, held=hold(psi, psi.parameters()), unguided=parts)


def test_control_variate_keeps_the_mean_of_the_gradient_and_takes_out_its_noise():
    """x_0 ~ N(0, 1), log p = −2 x_0²: the best policy multiplies each step's mean by a number that dynamic programming gives."""
    log_snr = torch.linspace(-6, 4, 40).double()
    abar = torch.sigmoid(log_snr)
    process = Process(torch.arange(40), abar, torch.cat([abar[1:], torch.sigmoid(log_snr[-1:] + 0.25)]))
    factors, curvature = [], 4.0  # log p is −curvature x² / 2
    for i in reversed(range(40)):
        one = torch.ones(1).double()
        slope, sigma = process.mean(i, one, process.scales(i, one)[1] * one).item(), process.sigma(i)
        factors.insert(0, 1 / (1 + sigma**2 * curvature))
        curvature = slope**2 * curvature * factors[0]
    weight = nn.Parameter(torch.tensor(factors).double())

    def pre(x, i):
        return process.scales(i, x)[1] * x

    def psi(x, i):
        rest = process.mean(i, x, torch.zeros_like(x))
        return (weight[i] * process.mean(i, x, pre(x, i)) - rest) / process.eps_coefficient(i)

    torch.manual_seed(0)
    plain, varied = [], []
    for _ in range(60):
        noise = torch.randn(41, 32, 1).double()
        for gradients, held in ((plain, None), (varied, hold(psi, [weight]))):
            weight.grad = None
            backprop(process, psi, pre, lambda x: -2 * x.square().sum(1), noise, 1.0, share=1 / 32, held=held)
            gradients.append(weight.grad.clone())
    plain, varied = torch.stack(plain), torch.stack(varied)
    difference = plain - varied
    assert (difference.mean(0).abs() <= 4.5 * difference.std(0) / 60**0.5).all(), "what is added has mean 0"
    assert varied.var(0).sum() < 0.3 * plain.var(0).sum()
    assert (varied.mean(0).abs() <= 4.5 * varied.std(0) / 60**0.5).all(), "the optimum is stationary"


@pytest.mark.parametrize("trainer", [backprop, adjoint])
@pytest.mark.parametrize("num_terms", [1, 2])
def test_terms_of_some_steps_stand_for_all(noise, trainer, num_terms):
    """The mean over every choice of steps is the full gradient, and the full KL; pre is not run by backprop where a step is left out."""
    psi, passes = Toy(), []

    def pre(x, i):
        passes.append(i)
        return PRE(x, i)

    def gradient(weights):
        psi.weight.grad = None
        figures = trainer(PROCESS, psi, pre, log_prob, noise, 2.0, weights=weights)
        return psi.weight.grad, figures["kl_nats"], figures["log_ratio"]

    full, kl, log_ratio = gradient(None)
    chosen = list(itertools.combinations(range(3), num_terms))
    passes.clear()
    parts = [gradient([3 / num_terms if i in steps else 0.0 for i in range(3)]) for steps in chosen]
    assert torch.allclose(sum(p[0] for p in parts) / len(parts), full, rtol=1e-6)
    assert torch.allclose(sum(p[1] for p in parts) / len(parts), kl, rtol=1e-6)
    assert all(p[2].isnan().all() for p in parts) and not log_ratio.isnan().any(), "log psi/pre of a path needs every step"
    if trainer is backprop:
        assert len(passes) == sum(map(len, chosen))


def test_the_terms_are_drawn_among_the_active_steps():
    active, generator = [True, False, True, True, True], torch.Generator().manual_seed(0)
    draws = torch.tensor([term_weights(active, 2, generator) for _ in range(2000)])
    assert (draws[:, 1] == 0).all() and ((draws > 0).sum(1) == 2).all() and set(draws.unique().tolist()) == {0.0, 2.0}
    assert torch.allclose(draws.mean(0), torch.tensor(active).float(), atol=0.1)
    assert term_weights(active, None, generator) is term_weights(active, 4, generator) is None


def test_shares_of_micro_batches_add_up(noise):
    psi = Toy()
    backprop(PROCESS, psi, PRE, log_prob, noise, 2.0, share=1 / 5)
    expected, psi.weight.grad = psi.weight.grad, None
    for part in (slice(0, 2), slice(2, 5)):
        backprop(PROCESS, psi, PRE, log_prob, noise[:, part], 2.0, share=1 / 5)
    assert torch.allclose(psi.weight.grad, expected)


def test_all_steps_followed_is_no_truncation(noise):
    psi = Toy()
    backprop(PROCESS, psi, PRE, log_prob, noise, 2.0)
    expected, psi.weight.grad = psi.weight.grad, None
    backprop(PROCESS, psi, PRE, log_prob, noise, 2.0, num_grad_steps=torch.full((5,), 3))
    assert torch.allclose(psi.weight.grad, expected)


def test_truncation_cuts_the_reward_and_keeps_every_local_kl(noise):
    """With K = 1 the reward reaches the last step's weights alone; the steps before get d KL_t at a detached x_t, and nothing else."""
    psi = Toy()
    backprop(PROCESS, psi, PRE, log_prob, noise, 2.0, num_grad_steps=torch.ones(5, dtype=torch.long))
    truncated, expected, x = psi.weight.grad, torch.zeros(3, 2, 2).double(), noise[0]
    for i in range(3):
        psi.weight.grad = None
        eps = psi(x, i)
        loss = PROCESS.kl(i, eps, PRE(x, i)).sum()
        x_s = PROCESS.step(i, x, eps, noise[i + 1])
        (loss - 2.0 * log_prob(x_s).sum() if i == 2 else loss).backward()
        expected += psi.weight.grad
        x = x_s.detach()
    assert torch.allclose(truncated, expected, rtol=1e-6)


def test_each_trajectory_has_its_own_cut(noise):
    psi, cuts = Toy(), torch.tensor([1, 3, 2, 1, 3])
    backprop(PROCESS, psi, PRE, log_prob, noise, 2.0, num_grad_steps=cuts)
    together, psi.weight.grad = psi.weight.grad, None
    for k in range(5):
        backprop(PROCESS, psi, PRE, log_prob, noise[:, k : k + 1], 2.0, num_grad_steps=cuts[k : k + 1])
    assert torch.allclose(psi.weight.grad, together)


def test_inactive_steps_are_those_of_the_pretrained_model(noise):
    """The same gradient as a policy that is the pretrained one there, and no pass of psi."""
    psi, calls = Toy(), []
    backprop(PROCESS, lambda x, i: PRE(x, i) if i == 2 else psi(x, i), PRE, log_prob, noise, 2.0)
    expected, psi.weight.grad = psi.weight.grad, None
    backprop(PROCESS, lambda x, i: calls.append(i) or psi(x, i), PRE, log_prob, noise, 2.0, active=[True, True, False])
    assert torch.allclose(psi.weight.grad, expected) and calls == [0, 1] and not psi.weight.grad[2].any()


def test_adjoints_are_bounded_for_each_trajectory_alone(noise):
    """A bound that nothing reaches changes nothing; below it, the largest adjoint of x_0 is the bound, and the others stay as they are."""
    loose, free, x_0 = Toy(), Toy(), []
    backprop(PROCESS, loose, PRE, log_prob, noise, 2.0, share=1 / 5, max_adjoint_norm=1e6)
    backprop(PROCESS, free, PRE, lambda x: x_0.append(x) or x.retain_grad() or log_prob(x), noise, 2.0, share=1 / 5)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(loose.parameters(), free.parameters(), strict=True))
    norms = 5 * x_0[0].grad.flatten(1).norm(dim=1)
    bound = norms.sort().values[-2:].mean().item()
    x = torch.randn(5, 3, dtype=torch.double, requires_grad=True)
    found = torch.autograd.grad((clip_adjoint(1 * x, 1 / 5, bound) * norms.view(-1, 1) / 3**0.5 / 5).sum(), x)[0].norm(dim=1) * 5
    assert found.tolist() == pytest.approx(norms.clamp(max=bound).tolist())
    tight = Toy()
    backprop(PROCESS, tight, PRE, log_prob, noise, 2.0, share=1 / 5, max_adjoint_norm=1e-9)
    local = Toy()
    backprop(PROCESS, local, PRE, lambda x: 0 * log_prob(x), noise, 2.0, share=1 / 5, num_grad_steps=torch.ones(5, dtype=torch.long))
    for a, b in zip(tight.parameters(), local.parameters(), strict=True):  # only the local KL terms are left
        torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-5)


def test_at_the_start_there_is_no_divergence(noise):
    psi = Toy()
    psi.load_state_dict(PRE.state_dict())
    figures = backprop(PROCESS, psi, PRE, log_prob, noise, 2.0)
    assert figures["kl_nats"].abs().max() == 0 and figures["log_ratio"].abs().max() == 0
    assert figures["log_prob"].shape == (5,) and psi.weight.grad.abs().max() > 0


def test_effective_gamma_of_the_published_recipe():
    assert effective_gamma(0.1, 0.01, "mean", 4 * 64 * 64) == pytest.approx(163_840)
    assert effective_gamma(3.0, 1.0, "sum", 256) == 3.0


def test_annealing_is_geometric():
    assert [annealed(u, 4.0, 0, 0.5) for u in (0, 0.25, 0.5, 0.9)] == pytest.approx([4.0, 2.0, 1.0, 1.0])
    assert [annealed(u, 4.0, 0.6, 1) for u in (0, 0.6, 0.8, 1)] == pytest.approx([4.0, 4.0, 2.0, 1.0])
    assert annealed(0, 4.0, 0, 0) == 1.0


def test_within_cell_variance_ignores_the_cells_means():
    log_w = torch.tensor([1.0, 3.0, 10.0, 10.0, 7.0])
    assert within_cell_variance(log_w, ["a", "a", "b", "b", "c"]) == pytest.approx(2.0 / 2)
    assert within_cell_variance(torch.tensor([5.0, 5.0, 9.0, 9.0]), [0, 0, 1, 1]) == 0


def test_var_log_w_is_zero_at_the_optimum():
    """One step, Gaussian prior, log p(y|x) = a·x: the optimum shifts the mean by a sigma², and there log w is constant."""
    process = Process(torch.tensor([500]), torch.tensor([0.3]), torch.tensor([0.9]))
    a, sigma, c = torch.tensor([0.7, -1.2]).double(), process.sigma(0), process.eps_coefficient(0)
    shift = sigma**2 * a / c
    noise = torch.randn(2, 50, 2).double()
    weight = nn.Parameter(torch.zeros(2).double())

    def psi(x, i):
        return 0.1 * x + shift + weight

    figures = backprop(process, psi, lambda x, i: 0.1 * x, lambda x: x @ a, noise, 1.0, share=1 / 50)
    log_w = figures["log_prob"] - figures["log_ratio"]
    # x_T varies, and with it the constant: remove what is linear in it.
    residual = log_w - process.mean(0, noise[0], 0.1 * noise[0]) @ a
    assert residual.var() < 1e-20
    assert weight.grad.abs().max() < 1e-12, "the optimum is stationary"


def test_learning_rate_rises_and_falls():
    factor = [learning_rate_factor(u, 100, 10, "cosine") for u in range(100)]
    assert factor[0] == pytest.approx(0.1) and max(factor) < 1 and factor[50] == pytest.approx(0.5) and factor[99] < 1e-3
    assert [learning_rate_factor(u, 100, 2, "none") for u in (0, 1, 99)] == [0.5, 1.0, 1.0]
    assert [learning_rate_factor(u, 100, 1, "quadratic") for u in (0, 50, 90)] == pytest.approx([1.0, 0.25, 0.01])


def test_passes_are_computed_again_only_where_later_steps_keep_the_graph(noise):
    """With K = 2 of 3 steps the first one's graph is gone before the second begins; the gradient is the same. Without a term there, none
    is made of it."""
    plain, psi, again, grads = Toy(), Toy(), [], []

    def recompute(denoiser):
        return lambda x, i: again.append((i, denoiser)) or denoiser(x, i)

    cuts = {"num_grad_steps": torch.full((5,), 2)}
    backprop(PROCESS, plain, PRE, log_prob, noise, 2.0, **cuts)
    backprop(PROCESS, psi, PRE, log_prob, noise, 2.0, recompute=recompute, **cuts)
    assert torch.equal(psi.weight.grad, plain.weight.grad) and again == [(i, d) for i in (1, 2) for d in (psi, PRE)]
    backprop(PROCESS, lambda x, i: grads.append(torch.is_grad_enabled()) or psi(x, i), PRE, log_prob, noise, 2.0, weights=[0, 1, 1], **cuts)
    assert grads == [False, True, True]
