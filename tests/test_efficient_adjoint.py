"""Adjoint matching in closed form: on a Gaussian, where the optimum is known, on the mixture, and as one more recipe on images."""

import pytest
import torch
from torch import nn

from ctrl.control import Control
from ctrl.distances import sliced_wasserstein
from ctrl.errors import UserError
from ctrl.finetune.backprop import bounded
from ctrl.finetune.efficient_adjoint import efficient_adjoint, end_of_control, information, levels, noised, optimal_eps
from ctrl.finetune.gradients import gradient_function
from ctrl.finetune.task import Task
from ctrl.mixture import Controlled, GaussianMixture, SoftmaxLinear, active, exact, process_of
from ctrl.process import Process
from ctrl.sampling import sample
from scripts.common import DEFAULTS, read_yaml
from tests.conftest import SUBJECTS, TEMPLATES

# x_0 ~ N(0, 0.3 I) in two dimensions; after three steps of control the pretrained model takes two more alone.
ABAR = torch.tensor([0.05, 0.3, 0.7, 0.9, 0.97]).double()
PROCESS = Process(torch.arange(5).flip(0), ABAR, torch.tensor([0.3, 0.7, 0.9, 0.97, 0.995]).double())
ACTIVE, LAST = [True, True, True, False, False], 3
VARIANCE = ABAR * 0.3 + 1 - ABAR  # of x_t
M = ((1 - ABAR) / VARIANCE)[LAST].item()
GAMMA, KL_WEIGHT, B = 2.0, 0.5, torch.tensor([0.7, -1.2]).double()
DEFAULT = read_yaml(DEFAULTS)["finetune"]


def pre(x, i):
    return (1 - ABAR[i]).sqrt() / VARIANCE[i] * x


def at(i):
    return torch.full((6,), i)


@pytest.fixture
def noise():
    return torch.randn(6, 6, 2, generator=torch.Generator().manual_seed(0)).double()


def slope():
    """d x_0 / d x_1, a number: both of the pretrained model's own steps are linear."""
    one = torch.ones(1).double()
    return PROCESS.mean(4, PROCESS.mean(3, one, pre(one, 3)), pre(PROCESS.mean(3, one, pre(one, 3)), 4)).item()


class Optimum(nn.Module):
    """For log p = B · x_0 the law of x_1 is shifted by v_1 g, g = gamma · slope · B / kl_weight, and x_t's by sqrt(r) of that."""

    def __init__(self):
        super().__init__()
        self.off = nn.Parameter(torch.zeros(3, 2).double())

    def forward(self, x, i):
        shift = VARIANCE[LAST] * GAMMA * slope() * B / KL_WEIGHT
        r, abar, v = (values[i].reshape(-1, 1) for values in (ABAR / ABAR[LAST], ABAR, VARIANCE))
        return (1 - abar).sqrt() * (x - r.sqrt() * shift) / v + self.off[i]


def run(psi, noise, rows=slice(None), share=1 / 6, **changes):
    drawn = levels(ACTIVE, 2, (6, 2), torch.Generator().manual_seed(1))
    settings = {"kl_weight": KL_WEIGHT, "information": M, "active": ACTIVE} | changes
    return efficient_adjoint(
        PROCESS, psi, pre, lambda x: x @ B, noise[:, rows], GAMMA, steps=drawn["steps"][:, rows],
        fresh=drawn["fresh"].double()[:, rows], share=share, **settings,
    )  # fmt: skip


def test_the_optimum_of_a_gaussian_is_stationary(noise):
    """With the information of its law nothing is left that is random: every target is the optimum's own eps."""
    psi = Optimum()
    figures = run(psi, noise)
    assert figures["loss"].max() < 1e-20 and psi.off.grad.abs().max() < 1e-10
    assert torch.allclose(figures["log_prob"], figures["x_0"] @ B)
    psi.off.data += 0.1
    assert run(psi, noise)["loss"].min() > 1e-3 and psi.off.grad.abs().max() > 1e-2


@pytest.mark.parametrize("m", [1e-12, 0.02, M, 1.0, 1e12], ids=["A alone", "small", "information", "one", "B alone"])
def test_the_targets_mean_is_the_optimal_eps_with_any_weights(noise, m):
    """log p = −1.5 |x_0|² + B · x_0: p*(x_1) is a Gaussian, and the target, linear in x_1 and z, at their means given x_t is its mean."""
    noise[LAST + 1 :] = 0  # that of the pretrained model's steps has mean 0, and enters the target linearly
    pull = GAMMA / KL_WEIGHT * slope()
    variance = 1 / (1 / VARIANCE[LAST] + 3 * pull * slope())
    mean = variance * pull * B
    for i in range(LAST):
        r, x_t = ABAR[i] / ABAR[LAST], noise[0]
        v_t = r * variance + 1 - r
        expected = (1 - ABAR[i]).sqrt() * (x_t - r.sqrt() * mean) / v_t
        x_1, z = mean + r.sqrt() * variance / v_t * (x_t - r.sqrt() * mean), (1 - r).sqrt() / v_t * (x_t - r.sqrt() * mean)
        eps = optimal_eps(PROCESS, pre, lambda x: -1.5 * x.square().sum(1) + x @ B, noise, GAMMA, KL_WEIGHT, x_1, LAST)[0]
        found, target = noised(PROCESS, at(i), LAST, x_1, eps, z, m)
        assert torch.allclose(found, x_t) and torch.allclose(target, expected)


def test_the_loss_is_its_definition(noise):
    """By target and denoising score matching, mixed as the least variance asks for, at each trajectory's own steps."""
    psi, drawn = Optimum(), levels(ACTIVE, 2, (6, 2), torch.Generator().manual_seed(1))
    psi.off.data += torch.tensor([[0.1, -0.2], [0.3, 0.0], [-0.1, 0.2]])
    figures, found = run(psi, noise), psi.off.grad.clone()
    x_1, expected = end_of_control(PROCESS, psi, noise, ACTIVE)[0], torch.zeros(6).double()
    score = -pre(x_1, LAST) / (1 - ABAR[LAST]).sqrt() + GAMMA * slope() * B / KL_WEIGHT
    for steps, fresh in zip(drawn["steps"].tolist(), drawn["fresh"].double(), strict=True):
        for k, (i, z) in enumerate(zip(steps, fresh, strict=True)):
            r = ABAR[i] / ABAR[LAST]
            a_of, b_of = score[k] / r.sqrt(), -z / (1 - r).sqrt()
            wide = (1 / (1 - r), M / (1 - ABAR[LAST]) / r)  # E‖B‖² and E‖A‖², of one dimension
            target = -(1 - ABAR[i]).sqrt() * (wide[0] * a_of + wide[1] * b_of) / sum(wide)
            x_t = r.sqrt() * x_1[k] + (1 - r).sqrt() * z
            miss = psi(x_t[None], torch.tensor([i]))[0] - target
            expected[k] += KL_WEIGHT * 3 / 2 * PROCESS.kl_weight(i) * miss.square().sum()
    assert torch.allclose(figures["loss"], expected)
    assert torch.allclose(found, torch.autograd.grad(expected.sum() / 6, psi.off)[0])


def test_shares_of_micro_batches_add_up(noise):
    whole, parts = Optimum(), Optimum()
    for psi in (whole, parts):
        psi.off.data += 0.1
    figures = run(whole, noise)
    halves = [run(parts, noise, rows) for rows in (slice(0, 2), slice(2, 6))]
    assert torch.allclose(parts.off.grad, whole.off.grad)
    assert all(torch.equal(torch.cat([h[key] for h in halves]), value) for key, value in figures.items())


def test_the_gradient_is_bounded_for_each_trajectory_alone(noise):
    reward = (lambda x: -x.square().sum(1).square(), noise, GAMMA, 1.0, noise[0], LAST)
    free, tight = (optimal_eps(PROCESS, pre, *reward, bound)[0] - pre(noise[0], LAST) for bound in (None, 0.1))
    deviation = (1 - ABAR[LAST]).sqrt()
    assert ((free / deviation).norm(dim=1) > 0.1).any()
    assert (tight / deviation).norm(dim=1).max() <= 0.1 + 1e-9
    assert torch.equal(optimal_eps(PROCESS, pre, *reward, 1e9)[0], optimal_eps(PROCESS, pre, *reward)[0])
    assert torch.equal(bounded(free, None), free)


def test_what_it_cannot_do_is_refused(noise):
    with pytest.raises(ValueError, match="kl_weight must be above 0"):
        run(Optimum(), noise, kl_weight=0.0)
    for acts in ([True] * 5, [False] * 5, [False, True, True, True, False]):
        with pytest.raises(ValueError, match="every step but the last"):
            run(Optimum(), noise, active=acts)


def test_levels_are_active_steps_and_follow_from_the_generator():
    one, two = (levels(ACTIVE, 3, (500, 4, 2), torch.Generator().manual_seed(5)) for _ in range(2))
    assert one["steps"].shape == (3, 500) and one["fresh"].shape == (3, 500, 4, 2)
    assert set(one["steps"].unique().tolist()) == {0, 1, 2} and all(torch.equal(one[key], two[key]) for key in one)


@pytest.fixture(scope="module")
def problem():
    mixture = GaussianMixture.from_config([0.4, 0.6], [[-1.5, 0], [1.5, 0.5]], [[[0.3, 0.1], [0.1, 0.2]], [[0.2, 0], [0, 0.3]]])
    label, moments = SoftmaxLinear.from_config([[2, 0], [-2, 1]], [0, 0], 2), mixture.moments()
    return mixture.affine(*moments), label.affine(*moments)


def test_the_information_has_the_least_variance(problem):
    """At every level, of the targets about the mean that they have in common, the pretrained score."""
    mixture, process, generator = problem[0], process_of(problem[0], 64), torch.Generator().manual_seed(0)
    pre, acts = mixture.denoiser(process), active(process)
    m = information(process, pre, torch.randn(65, 4000, 2, generator=generator), acts)
    abar = process.abar_t[-1].item()
    x_1 = (abar**0.5 * mixture.sample(20_000, generator) + (1 - abar) ** 0.5 * torch.randn(20_000, 2, generator=generator)).float()
    eps, z = pre(x_1, 63), torch.randn(20_000, 2, generator=generator)
    assert m == pytest.approx(eps.square().mean().item(), rel=0.1)
    for i in (10, 30, 50):
        missed = {}
        for factor in (0.2, 1.0, 5.0):
            x_t, target = noised(process, torch.full((20_000,), i), 63, x_1, eps, z, factor * m)
            missed[factor] = (target - pre(x_t, i)).square().mean().item()
        assert missed[1.0] < min(missed[0.2], missed[5.0]), (i, missed)


def test_it_starts_at_the_mixture_and_comes_nearer_to_p_gamma(problem):
    mixture, label = problem
    process, generator = process_of(mixture, 16), torch.Generator().manual_seed(1)
    pre, net, acts, n = mixture.denoiser(process), Controlled(mixture, 2), active(process), 4000
    m = information(process, pre, torch.randn(17, 1000, 2, generator=generator), acts)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2, betas=(0.9, 0.99))
    for update in range(40):
        y, noise = torch.randint(2, (256,), generator=generator), torch.randn(17, 256, 2, generator=generator)
        optimizer.zero_grad()
        figures = efficient_adjoint(
            process, net.denoiser(process, y), pre, lambda x, y=y: label.log_prob(x, y), noise, 1.0, active=acts, information=m,
            share=1 / 256, **levels(acts, 2, (256, 2), generator),
        )  # fmt: skip
        if update == 0:
            assert torch.equal(figures["x_0"], sample(process, pre, noise)), "an update begins as the pretrained model, bit for bit"
        optimizer.step()
    for y in range(2):
        noise, truth = torch.randn(17, n, 2, generator=generator), exact(mixture, label, y, 1.0, n, generator)
        before, after = (sample(process, d, noise) for d in (pre, net.denoiser(process, torch.full((n,), y))))
        assert sliced_wasserstein(after, truth) < 0.5 * sliced_wasserstein(before, truth)


def recipe(control, **changes):
    settings = DEFAULT | {"trainer": "efficient_adjoint", "batch_size": 4, "micro_batch_size": 2, "gamma": 5.0, "num_updates": 8} | changes
    task = Task(control, control.base.process(4), [(s, y) for s in SUBJECTS for y in range(3)], TEMPLATES, 1.0, 0)
    decode = control.base.decode
    return gradient_function(task, lambda x_0, y, t: -(decode(x_0).mean(dim=(1, 2, 3)) - y).square() / t, settings)


def gradients(control, update, **changes):
    for parameter in control.parameters().values():
        parameter.grad = None
    figures = recipe(control, **changes)(update)
    return {name: p.grad.clone() for name, p in control.parameters().items()}, figures


def test_an_update_of_the_recipe_follows_from_its_number(control):
    """Whatever came before it, and in micro-batches of any size."""
    one, figures = gradients(control, 7)
    gradient = recipe(control)
    gradient(2)
    for parameter in control.parameters().values():
        parameter.grad = None
    assert gradient(7) == figures and all(torch.equal(p.grad, one[name]) for name, p in control.parameters().items())
    other, same = gradients(control, 6)[0], gradients(control, 7, gradient_checkpointing=True, micro_batch_size=4)[0]
    assert all((one[name] - same[name]).norm() <= 1e-3 * one[name].norm() for name in one)
    assert any((one[name] - other[name]).norm() > 0.1 * one[name].norm() for name in one)
    assert any(g.any() for name, g in one.items() if name.startswith("class_embedding"))
    assert set(figures) == {"loss", "log_prob", "temperature", "unet_forward", "unet_backward"}
    assert figures["unet_forward"] == 4 * (3 + 1 + 2) and figures["unet_backward"] == 4 * (1 + 2)


def test_a_control_that_acts_to_the_end_is_refused_in_one_line(base):
    with pytest.raises(UserError, match="raise finetune.min_timestep above 249, the sampler's last timestep"):
        recipe(Control(base, 3, 4, ["to_q"], min_timestep=100))
