"""Particle samplers where the right answer is known: a Gaussian prior and a Gaussian log p, whose product is Gaussian."""

import pytest
import torch

from ctrl.guidance.particles import smc, svdd, systematic
from ctrl.process import Process
from ctrl.sampling import sample

ABAR = torch.sigmoid(torch.linspace(-8, 8, 41, dtype=torch.float64))
PROCESS = Process(torch.arange(40).flip(0), ABAR[:-1], ABAR[1:])


def denoiser(x_t, i):
    """E[eps | x_t] for x_0 ~ N(0, I)."""
    return (1 - PROCESS.abar_t[i].item()) ** 0.5 * x_t


def log_prob(x_0):
    return -(x_0[:, 0] - 1.5).square()


def noise_for(images, particles, seed=0):
    return torch.randn(41, images * particles, 1, generator=torch.Generator().manual_seed(seed))


def test_smc_with_many_particles_is_exact():
    """N(0, 1) times exp(−2 (x − 1.5)²) is N(6/5, 1/5)."""
    noise = noise_for(300, 128)
    x, sizes = smc(PROCESS, denoiser, log_prob, noise, 128, 2.0, torch.Generator().manual_seed(1))
    assert x.shape == (300, 1) and sizes.shape == (41, 300)
    assert x.mean().item() == pytest.approx(1.2, abs=0.1) and x.var().item() == pytest.approx(0.2, abs=0.06)
    assert ((sizes >= 1) & (sizes <= 128.001)).all() and sizes.min() < 64 < sizes[:5].min(), "poor later, not at the start"


def test_one_particle_is_the_pretrained_model():
    noise = noise_for(6, 1)
    plain = sample(PROCESS, denoiser, noise)
    assert torch.equal(smc(PROCESS, denoiser, log_prob, noise, 1, 3.0, torch.Generator())[0], plain)
    assert torch.equal(svdd(PROCESS, denoiser, log_prob, noise, 1), plain)


def test_images_keep_to_their_own_particles():
    """Another image's noise changes nothing of this one's."""
    first, second = noise_for(4, 8, 0), noise_for(4, 8, 1)
    mixed = torch.cat([first[:, :16], second[:, 16:]], dim=1)
    one, other = (svdd(PROCESS, denoiser, log_prob, noise, 8) for noise in (first, mixed))
    assert torch.equal(one[:2], other[:2]) and not torch.equal(one[2:], other[2:])


def test_systematic_resampling_by_hand():
    weights = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
    for seed in range(5):
        ancestors = systematic(weights, torch.Generator().manual_seed(seed))
        assert torch.bincount(ancestors[0], minlength=4).tolist() == [2, 1, 1, 0] and ancestors[1].tolist() == [3] * 4


def test_svdd_comes_nearer_to_the_label_with_more_particles():
    reached = [log_prob(svdd(PROCESS, denoiser, log_prob, noise_for(200, m), m)).mean().item() for m in (1, 4, 16)]
    assert reached[0] < reached[1] < reached[2] and reached[2] > -0.2
