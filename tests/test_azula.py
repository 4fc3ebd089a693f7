"""The same methods by other hands: azula (https://github.com/probabilists/azula), on the same inputs and the same noise.

Its denoisers answer x̂_0 where ours answer eps, and its time is here the index of the step.
"""

from dataclasses import replace

import pytest
import torch

from ctrl.distances import sliced_wasserstein
from ctrl.guidance.particles import smc, systematic
from ctrl.guidance.reconstruction import reconstruction_guidance
from ctrl.mixture import Controlled, GaussianMixture, SoftmaxLinear, exact, process_of
from ctrl.process import Process
from ctrl.sampling import sample
from tests.test_mixture import COVARIANCES, MEANS, WEIGHTS

azula = pytest.importorskip("azula")

MIXTURE = GaussianMixture.from_config(WEIGHTS, MEANS, COVARIANCES)
LABEL = SoftmaxLinear.from_config([[2, 0], [-2, 0], [0, 3]], [0, 0, -1], 2).affine(*MIXTURE.moments())
MIXTURE = MIXTURE.affine(*MIXTURE.moments())
PROCESS = process_of(MIXTURE, 12)
PRE = MIXTURE.denoiser(PROCESS)
STEPS = [1, 4, 7, 10]  # of the twelve: not the first, whose gradients float32 knows to three digits, nor the last, which adds no noise


class Theirs(azula.denoise.Denoiser):
    """`denoiser`, (x_t, i, **kwargs) -> eps, as azula's samplers take it."""

    def __init__(self, denoiser, process=PROCESS):
        super().__init__()
        self.denoiser, self.process = denoiser, process
        self.abar = torch.cat([process.abar_t, process.abar_s[-1:]])

    def schedule(self, t):
        abar = self.abar[round(t.item())]
        return abar.sqrt(), (1 - abar).sqrt()

    def forward(self, x_t, t, **kwargs):
        i = round(t.item())
        return azula.denoise.DiracPosterior(self.process.predict_x0(i, x_t, self.denoiser(x_t, i, **kwargs)))


def their_step(sampler, x_t, i, **kwargs):
    return sampler.step(x_t, torch.tensor(i), torch.tensor(i + 1), **kwargs)


def whole_way(process=PROCESS):
    """The times that their loop visits."""
    return {"start": 0, "stop": process.num_steps, "steps": process.num_steps, "silent": True}


def draws(num, shape, seed=0):
    """What `num` calls of randn draw after `torch.manual_seed(seed)`, which is called again: the next `num` draw the same."""
    torch.manual_seed(seed)
    noise = torch.stack([torch.randn(shape) for _ in range(num)])
    torch.manual_seed(seed)
    return noise


def noisy(i, num=50, seed=1):
    """x_t of step i, with shape (num, 2)."""
    generator = torch.Generator().manual_seed(seed)
    abar = PROCESS.abar_t[i].item()
    return abar**0.5 * MIXTURE.sample(num, generator).float() + (1 - abar) ** 0.5 * torch.randn(num, 2, generator=generator)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("i", [0, *STEPS, 11])
def test_step_is_ddim(i, eta):
    """Their eta multiplies the variance of the step, ours, as in the paper, its standard deviation."""
    x_t, (noise,) = noisy(i), draws(1, (50, 2))
    theirs = their_step(azula.sample.DDIMSampler(Theirs(PRE), eta=eta**2), x_t, i)
    assert torch.allclose(replace(PROCESS, eta=eta).step(i, x_t, PRE(x_t, i), noise), theirs, atol=1e-5)


def test_sampler_is_ddpm():
    noise = draws(13, (200, 2))
    theirs = azula.sample.DDPMSampler(Theirs(PRE), **whole_way())(torch.randn(200, 2))
    assert torch.allclose(sample(PROCESS, PRE, noise), theirs, atol=1e-4)


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("i", STEPS)
def test_classifier_free_guidance_on_the_mixture(i, scale):
    """Their strength is 0 where there is no guidance, our scale 1."""
    net, y, x_t = Controlled(MIXTURE, 3), torch.arange(50) % 3, noisy(i)
    torch.nn.init.normal_(net.outer.weight, 0, 0.3, generator=torch.Generator().manual_seed(0))
    theirs = azula.guidance.CFGDenoiser(Theirs(lambda x, i, y=None: PRE(x, i) if y is None else net.denoiser(PROCESS, y)(x, i)))
    x_0 = theirs(x_t, torch.tensor(i), positive={"y": y}, guidance=scale - 1).mean
    assert torch.allclose(PROCESS.predict_x0(i, x_t, net.denoiser(PROCESS, y, scale)(x_t, i)), x_0, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_classifier_free_guidance_on_images(base, control, scale):
    from tests.test_control import LABELS, PROMPTS, scramble  # with all of diffusers: the other tests here start without it

    scramble(control)
    process, x_t = base.process(4), torch.randn(3, *base.latent_shape, generator=torch.Generator().manual_seed(0))

    def labelled(x, i, y):
        return control.denoiser(process, PROMPTS, y)(x, i)

    theirs = azula.guidance.CFGDenoiser(Theirs(labelled, process))
    null = torch.full_like(LABELS, control.null)
    x_0 = theirs(x_t, torch.tensor(1), positive={"y": LABELS}, negative={"y": null}, guidance=scale - 1).mean
    ours = process.predict_x0(1, x_t, control.guided_denoiser(process, PROMPTS, LABELS, scale)(x_t, 1))
    assert torch.allclose(ours, x_0, atol=1e-4) and not torch.allclose(ours, Theirs(labelled, process)(x_t, torch.tensor(1), y=null).mean)


def measured(x_0):
    """A(x), neither linear nor of x's shape, and what was measured."""
    return torch.stack([x_0[:, 0] * x_0[:, 1], x_0[:, 0].sin(), x_0.sum(1)], dim=1), torch.tensor([0.5, 0.2, 1.0])


@pytest.mark.parametrize("i", STEPS)
def test_normalised_reconstruction_guidance_is_dps(i):
    """For log p = −‖y − A(x)‖². Theirs descends ‖y − A‖, ours, as Algorithm 1, ‖y − A‖² by a step over ‖y − A‖: zeta is twice our scale.

    Their norm is of a whole batch: one image at a time.
    """

    def log_prob(x_0):
        predicted, y = measured(x_0)
        return -(y - predicted).square().sum(1)

    guided = reconstruction_guidance(PRE, PROCESS, log_prob, 0.3)
    for x_t in noisy(i, 8).split(1):
        (noise,) = draws(1, (1, 2))
        sampler = azula.guidance.DPSSampler(Theirs(PRE), measured(x_t)[1], lambda x_0: measured(x_0)[0], zeta=0.6)
        theirs = their_step(sampler, x_t, i)
        assert torch.allclose(PROCESS.step(i, x_t, guided(x_t, i), noise), theirs, atol=1e-4)
        assert not torch.allclose(PROCESS.step(i, x_t, PRE(x_t, i), noise), theirs, atol=1e-2)


@pytest.mark.parametrize("i", STEPS)
def test_constant_reconstruction_guidance_is_the_proposal_of_tds(i):
    """Of one particle, which nothing can resample."""
    y = torch.tensor([2])
    guided = reconstruction_guidance(PRE, PROCESS, lambda x_0: LABEL.log_prob(x_0, y), 3.0, "constant")
    sampler = azula.guidance.TDSSampler(Theirs(PRE), lambda x_0, _: 3.0 * LABEL.log_prob(x_0, y))
    for x_t in noisy(i, 8).split(1):
        torch.manual_seed(0)
        torch.multinomial(torch.ones(1), 1, replacement=True)  # their resampling, which draws before the step does
        noise = torch.randn(1, 2)
        torch.manual_seed(0)
        theirs = their_step(sampler, x_t, i, carry={})
        assert torch.allclose(PROCESS.step(i, x_t, guided(x_t, i), noise), theirs, atol=5e-4)  # rounding, which little signal magnifies


@pytest.mark.parametrize("gamma", [8.0, 16.0])
def test_smc_is_tds_with_the_pretrained_model_as_the_proposal(monkeypatch, gamma):
    """Particle for particle: the same x̂_0 and the same effective sample size at every step.

    Their twist has a value here and no gradient, both resample systematically, and so sharp a twist makes ours resample at every step too.
    """
    levels = torch.tensor([0.2, 0.4, 0.6, 0.8, 0.95, 1.0], dtype=torch.float64)
    process, num, ours, theirs, their_sizes = Process(torch.arange(5).flip(0), levels[:-1], levels[1:]), 64, [], [], []
    pre, noise, generator = MIXTURE.denoiser(process), draws(6, (num, 2)), torch.Generator().manual_seed(5)

    def log_prob(x_0, seen):
        seen.append(x_0.detach())
        return -4 * (seen[-1] - torch.tensor([0.8, -0.5])).square().sum(1).double()

    def twist(x_0, noise_to_signal):
        return gamma / (1 + noise_to_signal**2) * log_prob(x_0, theirs) + 0 * x_0.sum(1)

    def resample(weights, count, replacement):
        their_sizes.append(1 / weights.square().sum())
        return systematic(weights[None], [generator])[0]

    with monkeypatch.context() as patch:
        patch.setattr(torch, "multinomial", resample)
        theirs.append(azula.guidance.TDSSampler(Theirs(pre, process), twist, **whole_way(process))(torch.randn(num, 2)))
    _, sizes = smc(process, pre, lambda x_0: log_prob(x_0, ours), noise, num, gamma, [torch.Generator().manual_seed(5)])
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(ours, theirs, strict=True))
    assert torch.allclose(sizes[:-1, 0], torch.stack(their_sizes), rtol=1e-3) and sizes[:-1].max() < num / 2


def test_both_draw_the_exact_law():
    """Theirs from its own proposal, one population; ours from the pretrained model, 16 particles a sample: other particles, one law."""
    process, generator = process_of(MIXTURE, 48), torch.Generator().manual_seed(0)
    pre, truth = MIXTURE.denoiser(process), exact(MIXTURE, LABEL, 2, 1.0, 16_000, generator)
    noise = torch.randn(49, 16_000, 2, generator=generator)
    ours, _ = smc(process, pre, lambda x_0: LABEL.log_probs(x_0)[:, 2], noise, 16, 1.0, [generator] * 1000)
    sampler = azula.guidance.TDSSampler(Theirs(pre, process), lambda x_0, r: LABEL.log_probs(x_0)[:, 2] / (1 + r**2), **whole_way(process))
    torch.manual_seed(0)
    theirs, far = sampler(torch.randn(16_000, 2)), sliced_wasserstein(MIXTURE.sample(16_000, generator), truth)
    assert all(sliced_wasserstein(x, truth[: len(x)]) < 0.06 * far for x in (ours, theirs))
