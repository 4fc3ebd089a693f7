"""Guidance where the right answer is known: a Gaussian prior, whose denoiser is linear."""

import pytest
import torch

from ctrl.guidance.classifier import classifier_guidance
from ctrl.guidance.mpgd import mpgd
from ctrl.guidance.reconstruction import reconstruction_guidance
from ctrl.process import Process
from ctrl.sampling import sample

PROCESS = Process(torch.tensor([500]), torch.tensor([0.3]), torch.tensor([0.9]))


def denoiser(x_t, i):
    return 0.5 * x_t


def log_prob(x_0):
    return -(x_0 - 2.0).square().sum(1)


def test_scale_zero_is_the_denoiser():
    x = torch.randn(4, 3)
    for weighting in ("constant", "normalised"):
        assert torch.equal(reconstruction_guidance(denoiser, PROCESS, log_prob, 0.0, weighting)(x, 0), denoiser(x, 0))


def test_constant_weighting_by_hand():
    x = torch.tensor([[1.0]])
    slope = (1 - 0.7**0.5 * 0.5) / 0.3**0.5  # d x̂_0 / d x_t: through the network, not around it
    g = -2 * (slope - 2.0) * slope
    expected = 0.5 - 3.0 * 0.7**0.5 * g
    assert reconstruction_guidance(denoiser, PROCESS, log_prob, 3.0, "constant")(x, 0).item() == pytest.approx(expected, rel=1e-5)


def test_normalised_weighting_moves_x_s_by_the_gradient_of_the_residual():
    """DPS, Algorithm 1, line 7 with step 1/‖r‖: x_s − scale ∇‖r‖² / ‖r‖ = x_s − 2 scale ∇‖r‖ ... here r = x̂_0 − 2."""
    x = torch.randn(5, 3, requires_grad=True)
    noise = torch.randn(5, 3)
    residual = (PROCESS.predict_x0(0, x, denoiser(x, 0)) - 2.0).norm(dim=1)
    (gradient,) = torch.autograd.grad(residual.sum(), x)
    expected = PROCESS.step(0, x, denoiser(x, 0), noise) - 0.1 * 2 * gradient
    guided = reconstruction_guidance(denoiser, PROCESS, log_prob, 0.1)
    assert torch.allclose(PROCESS.step(0, x.detach(), guided(x, 0), noise), expected, atol=1e-5)


def test_guidance_works_under_no_grad_and_raises_the_log_prob():
    process = Process(torch.tensor([900, 500, 100]), torch.tensor([0.05, 0.3, 0.7]), torch.tensor([0.3, 0.7, 0.98]))
    torch.manual_seed(0)
    noise = torch.randn(4, 500, 2)
    plain = log_prob(sample(process, denoiser, noise)).mean()
    for weighting in ("constant", "normalised"):
        assert log_prob(sample(process, reconstruction_guidance(denoiser, process, log_prob, 0.3, weighting), noise)).mean() > plain + 0.5


def test_a_last_step_that_moves_nothing_is_not_guided():
    """As with a scheduler that ends at t = 0 and has no ᾱ of 1 beyond."""
    process, x = Process(torch.tensor([500, 0]), torch.tensor([0.3, 0.999]), torch.tensor([0.999, 0.999])), torch.randn(4, 3)
    guided = [reconstruction_guidance(denoiser, process, log_prob, 1.0, w) for w in ("constant", "normalised")]
    for each in [*guided, mpgd(denoiser, process, log_prob, 1.0)]:
        assert torch.equal(each(x, 1), denoiser(x, 1)) and not torch.equal(each(x, 0), denoiser(x, 0))


def test_unknown_weighting_is_refused():
    with pytest.raises(ValueError, match="weighting"):
        reconstruction_guidance(denoiser, PROCESS, log_prob, 1.0, "magic")


def test_mpgd_at_scale_zero_is_the_denoiser():
    x = torch.randn(4, 3)
    assert torch.equal(mpgd(denoiser, PROCESS, log_prob, 0.0)(x, 0), denoiser(x, 0))


def test_mpgd_step_is_that_of_the_moved_estimate_with_the_same_noise():
    x, noise = torch.randn(2, 5, 3)
    eps = denoiser(x, 0)
    residual = PROCESS.predict_x0(0, x, eps) - 2.0
    moved = PROCESS.predict_x0(0, x, eps) - 0.1 * 2 * residual / residual.norm(dim=1, keepdim=True)
    expected = 0.9**0.5 * moved + (1 - 0.9 - PROCESS.sigma(0) ** 2) ** 0.5 * eps + PROCESS.sigma(0) * noise
    assert torch.allclose(PROCESS.step(0, x, mpgd(denoiser, PROCESS, log_prob, 0.1)(x, 0), noise), expected, atol=1e-5)


def test_mpgd_sends_no_gradient_through_the_network():
    """A network that cannot be differentiated serves as well."""

    def opaque(x_t, i):
        return torch.from_numpy(0.5 * x_t.numpy())

    x = torch.randn(4, 3)
    assert torch.equal(mpgd(opaque, PROCESS, log_prob, 0.3)(x, 0), mpgd(denoiser, PROCESS, log_prob, 0.3)(x, 0))


def test_mpgd_raises_the_log_prob_under_no_grad():
    process = Process(torch.tensor([900, 500, 100]), torch.tensor([0.05, 0.3, 0.7]), torch.tensor([0.3, 0.7, 0.98]))
    noise = torch.randn(4, 500, 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        guided = sample(process, mpgd(denoiser, process, log_prob, 0.3), noise)
    assert log_prob(guided).mean() > log_prob(sample(process, denoiser, noise)).mean() + 0.5


def noisy_log_prob(x_t, i):
    return -3.0 * x_t.square().sum(1)


def test_classifier_guidance_by_hand():
    """eps − sqrt(1 − ᾱ_t) · scale · ∇ log p_t = 0.5 x + sqrt(0.7) · 2 · 6 x."""
    x = torch.randn(4, 3)
    expected = 0.5 * x + 0.7**0.5 * 2.0 * 6.0 * x
    with torch.no_grad():
        assert torch.allclose(classifier_guidance(denoiser, PROCESS, noisy_log_prob, 2.0)(x, 0), expected, rtol=1e-5)
    assert torch.equal(classifier_guidance(denoiser, PROCESS, noisy_log_prob, 0.0)(x, 0), denoiser(x, 0))


def test_classifier_guidance_sends_no_gradient_through_the_network():
    def opaque(x_t, i):
        return torch.from_numpy(0.5 * x_t.numpy())

    x = torch.randn(4, 3)
    assert torch.equal(*(classifier_guidance(d, PROCESS, noisy_log_prob, 1.0)(x, 0) for d in (opaque, denoiser)))
