"""The reverse process against hand-computed values, diffusers' own DDIM, and torch's distributions."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from ctrl.process import Process, quadratic_timesteps


@pytest.fixture
def scheduler():
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )


def process_of(scheduler, num_steps=10, eta=1.0):
    scheduler.set_timesteps(num_steps)
    alphas, final = scheduler.alphas_cumprod, float(scheduler.final_alpha_cumprod)
    return Process.from_alphas(alphas, scheduler.timesteps, final, eta, stride=len(alphas) // num_steps)


def test_one_step_by_hand():
    process = Process(torch.tensor([7]), torch.tensor([0.5]), torch.tensor([0.8]))
    sigma = math.sqrt(0.2 / 0.5) * math.sqrt(1 - 0.5 / 0.8)
    assert process.sigma(0) == pytest.approx(sigma)
    x_t, eps = torch.full((1, 1), 2.0), torch.full((1, 1), 1.0)
    x0 = (2 - math.sqrt(0.5)) / math.sqrt(0.5)
    assert process.predict_x0(0, x_t, eps).item() == pytest.approx(x0, rel=1e-6)
    mu = math.sqrt(0.8) * x0 + math.sqrt(0.2 - sigma**2)
    assert process.mean(0, x_t, eps).item() == pytest.approx(mu, rel=1e-6)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("num_steps", [10, 30])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_steps_are_those_of_diffusers(scheduler, eta, spacing, num_steps):
    """Also where their number does not divide the 1000 of training, and a step does not end where the next begins."""
    scheduler = DDIMScheduler.from_config(scheduler.config, timestep_spacing=spacing)
    process = process_of(scheduler, num_steps, eta)
    torch.manual_seed(0)
    x, eps, noise = torch.randn(3, 2, 4, 4, 4)
    for i, t in enumerate(scheduler.timesteps):
        theirs = scheduler.step(eps, t, x, eta=eta, variance_noise=noise).prev_sample
        assert torch.allclose(process.step(i, x, eps, noise), theirs, atol=2e-5), i


def test_every_step_is_noisy_without_alpha_one(scheduler):
    process = process_of(scheduler)
    assert all(process.sigma(i) > 0 for i in range(process.num_steps))


def test_kl_is_that_of_two_gaussians(scheduler):
    process = process_of(scheduler)
    torch.manual_seed(0)
    x, eps_psi, eps_pre = torch.randn(3, 5, 4, 3, 3)
    for i in range(process.num_steps):
        laws = [torch.distributions.Normal(process.mean(i, x, e), process.sigma(i)) for e in (eps_psi, eps_pre)]
        expected = torch.distributions.kl_divergence(*laws).flatten(1).sum(1)
        assert torch.allclose(process.kl(i, eps_psi, eps_pre), expected, rtol=1e-3)


def test_log_ratio_is_the_difference_of_log_probs(scheduler):
    process = process_of(scheduler)
    torch.manual_seed(0)
    x, eps_psi, eps_pre, noise = torch.randn(4, 5, 4, 3, 3).double()
    for i in range(process.num_steps):
        x_s = process.step(i, x, eps_psi, noise)
        expected = process.log_prob(i, x_s, x, eps_psi) - process.log_prob(i, x_s, x, eps_pre)
        assert torch.allclose(process.log_ratio(i, eps_psi, eps_pre, noise), expected, rtol=1e-5)


def test_no_kl_without_noise(scheduler):
    with pytest.raises(ValueError, match="eta"):
        process_of(scheduler, eta=0.0).kl_weight(0)


def test_memoryless_chain_of_the_exact_denoiser_reaches_the_data(scheduler):
    """For data N(m, v) the exact denoiser is linear; the chain must end at mean m and variance close to v."""
    process = process_of(scheduler, 500)
    m, v = 1.5, 0.25
    torch.manual_seed(0)
    x = torch.randn(20_000, 1)
    for i in range(process.num_steps):
        a = process.abar_t[i].item()
        eps = math.sqrt(1 - a) * (x - math.sqrt(a) * m) / (a * v + 1 - a)
        x = process.step(i, x, eps, torch.randn_like(x))
    assert x.mean().item() == pytest.approx(m, abs=0.03)
    assert x.var().item() == pytest.approx(v, rel=0.06)


def test_coarse_keeps_the_levels_that_stay_and_every_step_that_is_not_active():
    process = Process.from_alphas(torch.linspace(0.99, 0.01, 100), torch.arange(90, -1, -10), 1.0)
    coarse = process.coarse(2, [True] * 7 + [False] * 3)
    assert coarse.timesteps.tolist() == [90, 70, 50, 30, 20, 10, 0]
    assert torch.equal(coarse.abar_t, process.abar_t[[0, 2, 4, 6, 7, 8, 9]])
    assert torch.equal(coarse.abar_s, torch.cat([coarse.abar_t[1:], process.abar_s[-1:]]))
    same = process.coarse(1, [True] * 10)
    assert torch.equal(same.abar_t, process.abar_t) and torch.equal(same.abar_s, process.abar_s)


def test_quadratic_steps_are_distinct_and_shorten():
    assert quadratic_timesteps(10).tolist() == [999, 809, 639, 489, 359, 249, 159, 89, 39, 9]
    for num_steps in (1, 2, 3, 31, 32, 50, 200, 999, 1000):
        timesteps = quadratic_timesteps(num_steps)
        assert (timesteps.diff() < 0).all() and timesteps[0] == 999 and timesteps[-1] >= 0


def test_quadratic_steps_are_those_of_ddpm(base):
    """DDIM with eta 1 is DDPM, which diffusers runs on any timesteps."""
    process = base.process(6, 1.0, "quadratic")
    ddpm = DDPMScheduler.from_config(base.pipe.scheduler.config, variance_type="fixed_small")
    ddpm.set_timesteps(timesteps=process.timesteps.tolist())
    x, eps = torch.randn(2, 2, 4, 4, 4)
    for i, t in enumerate(ddpm.timesteps):
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(i))
        theirs = ddpm.step(eps, t, x, generator=torch.Generator().manual_seed(i)).prev_sample
        assert torch.allclose(process.step(i, x, eps, noise), theirs, atol=2e-5), i
    assert process.sigma(5) == 0 and process.lowest_noisy_timestep == process.timesteps[4]
