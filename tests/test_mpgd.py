"""MPGD: by hand, and on a Gaussian prior whose denoiser is linear."""

import torch

from ctrl.guidance.mpgd import mpgd
from ctrl.process import Process
from ctrl.sampling import sample

PROCESS = Process(torch.tensor([500]), torch.tensor([0.3]), torch.tensor([0.9]))


def denoiser(x_t, i):
    return 0.5 * x_t


def log_prob(x_0):
    return -(x_0 - 2.0).square().sum(1)


def test_scale_zero_is_the_denoiser():
    x = torch.randn(4, 3)
    assert torch.equal(mpgd(denoiser, PROCESS, log_prob, 0.0)(x, 0), denoiser(x, 0))


def test_the_step_is_that_of_the_moved_estimate_with_the_same_noise():
    x, noise = torch.randn(2, 5, 3)
    eps = denoiser(x, 0)
    residual = PROCESS.predict_x0(0, x, eps) - 2.0
    moved = PROCESS.predict_x0(0, x, eps) - 0.1 * 2 * residual / residual.norm(dim=1, keepdim=True)
    expected = 0.9**0.5 * moved + (1 - 0.9 - PROCESS.sigma(0) ** 2) ** 0.5 * eps + PROCESS.sigma(0) * noise
    assert torch.allclose(PROCESS.step(0, x, mpgd(denoiser, PROCESS, log_prob, 0.1)(x, 0), noise), expected, atol=1e-5)


def test_no_gradient_goes_through_the_network():
    """A network that cannot be differentiated serves as well."""

    def opaque(x_t, i):
        return torch.from_numpy(0.5 * x_t.numpy())

    x = torch.randn(4, 3)
    assert torch.equal(mpgd(opaque, PROCESS, log_prob, 0.3)(x, 0), mpgd(denoiser, PROCESS, log_prob, 0.3)(x, 0))


def test_it_raises_the_log_prob_under_no_grad():
    process = Process(torch.tensor([900, 500, 100]), torch.tensor([0.05, 0.3, 0.7]), torch.tensor([0.3, 0.7, 0.98]))
    noise = torch.randn(4, 500, 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        guided = sample(process, mpgd(denoiser, process, log_prob, 0.3), noise)
    assert log_prob(guided).mean() > log_prob(sample(process, denoiser, noise)).mean() + 0.5
