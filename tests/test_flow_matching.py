"""Flow matching in the words of diffusion: on a Gaussian, whose velocity is known, the chain is Adjoint Matching's memoryless SDE."""

import math

import pytest
import torch

from ctrl import base as bases
from ctrl.finetune.supervised import supervised
from ctrl.flow import FIRST, MemorylessScheduler, noise_in, open_slot, scales
from ctrl.guidance.classifier import classifier_guidance
from ctrl.guidance.reconstruction import reconstruction_guidance
from ctrl.process import Process
from tests import kinds

MEAN, SD = 0.7, 0.4  # of the data, a Gaussian


def process_of(sigmas: torch.Tensor) -> Process:
    """The steps from each of `sigmas` to the next, and from the last to 0, as `Base.process` has them."""
    a, norm = scales(sigmas)
    return Process.from_alphas((a / norm).square(), torch.arange(len(sigmas)), 1.0)


def velocity(x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """E[noise − x_0 | x_s] of the Gaussian."""
    x_0 = MEAN + (1 - s) * SD**2 / ((1 - s) ** 2 * SD**2 + s**2) * (x - (1 - s) * MEAN)
    return (x - x_0) / s  # x = (1 − s) x̂_0 + s noise


def denoiser(sigmas: torch.Tensor):
    def eps(z: torch.Tensor, i: int) -> torch.Tensor:
        x = scales(sigmas[i])[1] * z
        return noise_in(x, velocity(x, sigmas[i]), sigmas[i])

    return eps


def law_at_the_end(num_steps: int, shift: float) -> tuple[float, float, float]:
    """Mean and standard deviation of x_0, and its correlation with the noise at the start: every step is affine and adds a Gaussian."""
    linear = torch.linspace(1, 1e-3, num_steps, dtype=torch.float64)
    sigmas = shift * linear / (1 + (shift - 1) * linear)
    process, mean, variance, memory = process_of(sigmas), 0.0, 1.0, 1.0
    eps, points = denoiser(sigmas), torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    for i in range(num_steps):
        start, end = process.mean(i, points, eps(points, i)).flatten().tolist()
        slope = end - start
        mean, variance, memory = start + slope * mean, slope**2 * variance + process.sigma(i) ** 2, slope * memory
    return mean, variance**0.5, memory / variance**0.5


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_chain_ends_in_the_data_and_forgets_where_it_began(shift):
    (_, coarse, _), (mean, sd, correlation) = (law_at_the_end(n, shift) for n in (100, 1000))
    assert mean == pytest.approx(MEAN, abs=0.003) and sd == pytest.approx(SD, rel=0.02) and abs(correlation) < 0.01
    assert abs(sd - SD) < 0.2 * abs(coarse - SD), "what is missing is that of long steps"


@pytest.mark.parametrize("s", [0.9, 0.5, 0.1])
def test_a_short_step_is_that_of_adjoint_matchings_sde(s):
    """dX = (2 v − (α̇/α) X) dτ + sqrt(2 η) dB with η = σ (σ α̇/α − σ̇), where τ = 1 − s, α = 1 − s, σ = s (arXiv 2409.08861)."""
    h = 1e-5
    sigmas = torch.tensor([s, s - h], dtype=torch.float64)
    process, x = process_of(sigmas), torch.tensor([[0.3]], dtype=torch.float64)
    eps = denoiser(sigmas)
    scale, following = math.hypot(1 - s, s), math.hypot(1 - s + h, s - h)
    mean = process.mean(0, x / scale, eps(x / scale, 0)) * following
    noise = eps(x / scale, 0)
    velocity = (x - s * noise) / (1 - s) - noise  # E[x_0 − eps | x], in τ
    drift = 2 * velocity - x / (1 - s)
    assert ((mean - x) / h).item() == pytest.approx(drift.item(), rel=1e-3)
    assert (process.sigma(0) * following) ** 2 / h == pytest.approx(2 * s * (s / (1 - s) + 1), rel=1e-3)


def test_pure_noise_tells_the_mean_alone():
    """At s = 1 the velocity is noise − E[x_0], and what the noise is taken for leaves the estimate of the image as it is."""
    s, x = torch.tensor(1.0), torch.tensor([[-0.3], [2.0]])
    a, norm = scales(s)
    eps = noise_in(x, velocity(x, s), s)
    assert (a, round(norm.item(), 5)) == (pytest.approx(FIRST), 1.0)
    torch.testing.assert_close((x - s * eps) / a, torch.full_like(x, MEAN), rtol=0, atol=1e-3)


@pytest.mark.parametrize("eta", [1.0, 0.5])
def test_the_scheduler_for_plain_diffusers_takes_the_same_steps(eta):
    """In x_s, which a transformer sees, where the process is in x_t; with a generator for each image."""
    scheduler, seeds = MemorylessScheduler(shift=3.0), (5, 6)
    scheduler.set_timesteps(6)
    scheduler.eta, scheduler.generator = eta, [torch.Generator().manual_seed(seed) for seed in seeds]
    again = [torch.Generator().manual_seed(seed) for seed in seeds]
    sigmas = scheduler.sigmas[:-1]
    process, eps = process_of(sigmas), denoiser(sigmas)
    process = Process(process.timesteps, process.abar_t, process.abar_s, eta)
    x = z = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(velocity(x, sigmas[i].float()), t, x)[0]
        noise = torch.cat([torch.randn(1, 1, 2, 2, generator=generator) for generator in again])
        z = process.step(i, z, eps(z, i).float(), noise)
        torch.testing.assert_close(x, z * scales(scheduler.sigmas[i + 1])[1].float(), rtol=1e-3, atol=1e-3)


def test_given_noise_levels_are_taken_as_they_are():
    scheduler = MemorylessScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[0.9, 0.5])
    assert scheduler.timesteps.tolist() == [900, 500] and scheduler.sigmas.tolist() == pytest.approx([0.9, 0.5, 0])
    scheduler.set_timesteps(sigmas=[0.9, 0.5, 0.0])
    assert scheduler.sigmas.tolist() == pytest.approx([0.9, 0.5, 0]), "as diffusers' Euler takes them"
    scheduler.set_timesteps(2)
    assert scheduler.timesteps[0] == 1000 and 8 < scheduler.timesteps[1] < 10, "diffusers' own, shifted"


@pytest.mark.parametrize("spacing", ["scheduler", "quadratic"])
def test_the_noise_levels_of_a_base(tmp_path, spacing):
    process = bases.load(kinds.sd3(tmp_path / "sd3")).process(4, spacing=spacing)
    assert process.timesteps[0] == 1000 and process.abar_t[0] == pytest.approx(FIRST**2) and process.abar_s[-1] == 1
    s = process.timesteps[1].double() / 1000
    assert process.abar_t[1].item() == pytest.approx(((1 - s) ** 2 / ((1 - s) ** 2 + s**2)).item())
    assert process.lowest_noisy_timestep == process.timesteps[-2], "the last step ends without noise"


def test_a_slot_that_nobody_uses_changes_nothing(tmp_path):
    """And the label's vector is added where the time's is, for each row its own."""
    transformer = bases.load(kinds.sd3(tmp_path / "sd3")).pipe.transformer
    seen = []
    transformer.transformer_blocks[0].register_forward_pre_hook(lambda m, a, k: seen.append(k["temb"]), with_kwargs=True)
    open_slot(transformer)  # a second time, as a base and a pipeline both do
    assert transformer.forward.__func__ is type(transformer).forward, "what moves weights to and fro puts it back"
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 5, 32),
        "pooled_projections": torch.randn(2, 24), "timestep": torch.tensor([900.0, 900.0]),
    }  # fmt: skip
    with torch.no_grad():
        plain = transformer(**inputs).sample
        transformer.class_embedding = torch.nn.Embedding(2, transformer.inner_dim)
        torch.nn.init.zeros_(transformer.class_embedding.weight)
        transformer.class_labels = torch.tensor([0, 1])
        assert torch.equal(transformer(**inputs).sample, plain)
        transformer.class_embedding.weight[1] = 3.0
        labelled = transformer(**inputs).sample
    assert torch.equal(labelled[0], plain[0]) and not torch.allclose(labelled[1], plain[1])
    torch.testing.assert_close(seen[2] - seen[0], torch.tensor([0.0, 3.0])[:, None].expand_as(seen[0]))


def test_pure_noise_takes_no_guidance():
    """There a fitted classifier's gradient is what is left of its fit, and d mu / d eps is large."""
    sigmas = torch.tensor([1.0, 0.8, 0.3], dtype=torch.float64)
    process, x = process_of(sigmas), torch.randn(2, 3)
    assert [process.pure_noise(i) for i in range(3)] == [True, False, False]
    plain, eps = torch.zeros(2, 3), []

    def denoiser(x_t, i):
        return 0 * x_t

    for guide in (
        classifier_guidance(denoiser, process, lambda x, i: x.sum(1), 1.0),
        reconstruction_guidance(denoiser, process, lambda x_0: x_0.sum(1) - 5, 1.0, "constant"),
        reconstruction_guidance(denoiser, process, lambda x_0: x_0.sum(1) - 5, 1.0),
    ):
        eps = [guide(x, i) for i in range(3)]
        assert torch.equal(eps[0], plain) and not torch.equal(eps[1], plain)


def test_a_flow_learns_the_velocity_from_labelled_images():
    """The loss of an estimate of eps is the error of the velocity that it stands for; of a diffusion, that of eps."""
    sigmas, losses = torch.tensor([1.0, 0.8, 0.3], dtype=torch.float64), {}
    process = process_of(sigmas)
    flow = Process(process.timesteps, process.abar_t, process.abar_s, flow=True)
    x_0, shift = torch.randn(64, 1, 2, 2), torch.tensor(0.5, requires_grad=True)
    for name, each in (("flow", flow), ("diffusion", process)):

        def psi(x_t, i):
            s = sigmas[i].view(-1, 1, 1, 1)
            x_s, (a, _) = scales(s)[1] * x_t, scales(s)
            noise = (x_s - a * x_0) / s
            return noise_in(x_s, noise - x_0 + shift, s).float()  # a velocity that is wrong by `shift`

        losses[name] = supervised(each, psi, x_0, torch.Generator().manual_seed(0), 1 / x_0.numel())["loss"].item()
    assert losses["flow"] == pytest.approx(0.25, rel=0.02) and losses["diffusion"] < 0.1
