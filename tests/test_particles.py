"""Particle samplers where the right answer is known: a Gaussian prior and a Gaussian log p, whose product is Gaussian."""

import argparse

import pandas as pd
import pytest
import torch

from ctrl import base as bases
from ctrl import classifier as classifiers
from ctrl import control as controls
from ctrl.control import Control
from ctrl.errors import UserError
from ctrl.generate import denoised, generate
from ctrl.guidance.particles import resample, smc, svdd, systematic
from ctrl.process import Process
from ctrl.sampling import path_statistics, sample
from scripts.guided import particle_draw, resampled_draw
from tests.test_control import save, scramble

ABAR = torch.sigmoid(torch.linspace(-8, 8, 41, dtype=torch.float64))
PROCESS = Process(torch.arange(40).flip(0), ABAR[:-1], ABAR[1:])


def denoiser(x_t, i):
    """E[eps | x_t] for x_0 ~ N(0, I)."""
    return (1 - PROCESS.abar_t[i].item()) ** 0.5 * x_t


def log_prob(x_0):
    return -(x_0[:, 0] - 1.5).square()


def generators(images, first=0):
    return [torch.Generator().manual_seed(first + k) for k in range(images)]


def noise_for(images, particles, seed=0):
    return torch.randn(41, images * particles, 1, generator=torch.Generator().manual_seed(seed))


def test_smc_with_many_particles_is_exact():
    """N(0, 1) times exp(−2 (x − 1.5)²) is N(6/5, 1/5)."""
    noise = noise_for(300, 128)
    x, sizes = smc(PROCESS, denoiser, log_prob, noise, 128, 2.0, generators(300))
    assert x.shape == (300, 1) and sizes.shape == (41, 300)
    assert x.mean().item() == pytest.approx(1.2, abs=0.1) and x.var().item() == pytest.approx(0.2, abs=0.06)
    assert ((sizes >= 1) & (sizes <= 128.001)).all() and sizes.min() < 64 < sizes[:5].min(), "poor later, not at the start"


def test_one_particle_is_the_pretrained_model():
    noise = noise_for(6, 1)
    plain = sample(PROCESS, denoiser, noise)
    assert torch.equal(smc(PROCESS, denoiser, log_prob, noise, 1, 3.0, generators(6))[0], plain)
    assert torch.equal(svdd(PROCESS, denoiser, log_prob, noise, 1), plain)


def test_images_keep_to_their_own_particles():
    """Another image's noise changes nothing of this one's, and neither does its generator."""
    first, second = noise_for(4, 8, 0), noise_for(4, 8, 1)
    mixed = torch.cat([first[:, :16], second[:, 16:]], dim=1)
    one, other = (svdd(PROCESS, denoiser, log_prob, noise, 8) for noise in (first, mixed))
    assert torch.equal(one[:2], other[:2]) and not torch.equal(one[2:], other[2:])
    one, sizes = smc(PROCESS, denoiser, log_prob, first, 8, 2.0, generators(4))
    other, other_sizes = smc(PROCESS, denoiser, log_prob, mixed, 8, 2.0, generators(2) + generators(2, 7))
    assert torch.equal(one[:2], other[:2]) and torch.equal(sizes[:, :2], other_sizes[:, :2]) and not torch.equal(one[2:], other[2:])


def conditional(mean, variance):
    """E[eps | x_t] for x_0 ~ N(mean, variance)."""

    def denoiser(x_t, i):
        abar = PROCESS.abar_t[i].item()
        return (1 - abar) ** 0.5 * (x_t - abar**0.5 * mean) / (abar * variance + 1 - abar)

    return denoiser


def resampled_paths(psi, images, candidates, gamma):
    x, _, log_ratio = path_statistics(PROCESS, psi, denoiser, noise_for(images, candidates))
    return resample(x, gamma * log_prob(x) - log_ratio, candidates, generators(images))


@pytest.mark.parametrize("psi", [denoiser, conditional(0.8, 0.6)], ids=["pretrained", "near"])
def test_many_paths_of_any_model_are_weighted_to_the_exact_law(psi):
    """From the pretrained model, and from one that only comes near: to what the sampler's own N(0, v) becomes with exp(−2 (x − 1.5)²)."""
    x, sizes = resampled_paths(psi, 2000, 64, 2.0)
    assert x.shape == (2000, 1) and sizes.shape == (1, 2000) and ((sizes >= 1) & (sizes <= 64.001)).all()
    one, zero, v = torch.ones(1, 1), torch.zeros(1, 1), 1.0
    for i in range(PROCESS.num_steps):  # each step is linear
        v = PROCESS.step(i, one, denoiser(one, i), zero).item() ** 2 * v + PROCESS.sigma(i) ** 2
    assert v < 0.85, "steps are few: not the law that the denoiser was made for"
    assert x.mean().item() == pytest.approx(6 / (1 / v + 4), abs=0.03) and x.var().item() == pytest.approx(1 / (1 / v + 4), abs=0.02)


def test_the_nearer_the_model_the_larger_the_effective_sample():
    """Nowhere all of the paths: a controlled step cannot narrow its law. By hand at gamma 0: no path is better than another."""
    models = (denoiser, conditional(0.8, 0.6), conditional(1.2, 0.2))
    mean_size = [resampled_paths(psi, 200, 16, 2.0)[1].mean().item() for psi in models]
    assert 1 < mean_size[0] < mean_size[1] < mean_size[2] <= 16
    assert torch.allclose(resampled_paths(denoiser, 200, 16, 0.0)[1], torch.tensor(16.0).double())


def test_one_path_is_the_models_own():
    psi = conditional(0.8, 0.6)
    assert torch.equal(resampled_paths(psi, 6, 1, 3.0)[0], sample(PROCESS, psi, noise_for(6, 1)))


def test_systematic_resampling_by_hand():
    weights = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
    for seed in range(5):
        ancestors = systematic(weights, generators(2, seed))
        assert torch.bincount(ancestors[0], minlength=4).tolist() == [2, 1, 1, 0] and ancestors[1].tolist() == [3] * 4


def test_svdd_comes_nearer_to_the_label_with_more_particles():
    reached = [log_prob(svdd(PROCESS, denoiser, log_prob, noise_for(200, m), m)).mean().item() for m in (1, 4, 16)]
    assert reached[0] < reached[1] < reached[2] and reached[2] > -0.2


@pytest.fixture
def a_classifier(tmp_path):
    """Of two labels, with random weights, on disk."""
    torch.manual_seed(0)
    classifiers.save(tmp_path, classifiers.Classifier({"network": "cnn", "head": "softmax", "num_classes": 2, "descending": False}).eval())
    return tmp_path


@pytest.mark.parametrize("method", ["smc", "svdd"])
def test_many_images_share_a_pass_and_none_depends_on_the_others(base, a_classifier, method, monkeypatch):
    """Five images of 3 particles, at most 7 particles at a time: passes of 6, 6 and 3, and the same images one by one."""
    process, passes = base.process(3), []
    forward = base.network.forward
    monkeypatch.setattr(base.network, "forward", lambda x, *a, **k: passes.append(len(x)) or forward(x, *a, **k))
    rows = pd.DataFrame({"prompt": ["coat", "bag", "a bag", "coat", "coat"], "label": [0, 1, 0, 1, 1], "seed": [5, 6, 7, 8, 8]})
    config = {"sampler": {"guidance_scale": 1.0, "batch_size": 7}, "particles": 3, "finetune": {"gamma": 20.0}}
    draw = particle_draw(base, process, config, a_classifier, method)
    [(together, table)] = generate(base, rows, draw, 5)
    assert passes == [6] * 3 + [6] * 3 + [3] * 3 and (table["nfe_forward"] == 9).all()
    alone, tables = zip(*generate(base, rows, draw, 1), strict=True)
    assert torch.allclose(together, torch.cat(alone), atol=1e-4) and torch.allclose(together[3], together[4], atol=1e-4)
    if method == "svdd":
        assert "effective_sample_size" not in table
        return
    sizes, one_by_one = (torch.tensor(t["effective_sample_size"].tolist()) for t in (table, pd.concat(tables)))
    assert sizes.shape == (5, 4) and ((sizes >= 1) & (sizes <= 3.0001)).all() and torch.allclose(sizes, one_by_one, atol=1e-3)


def resampled(folder, candidates, **changes):
    """The draw of a scrambled adapter's paths by `candidates`, at most 7 paths at a time; its base and process before it."""
    control = Control(bases.load(folder / "sd"), 3, 4, ["to_q", "to_v", "conv1"], seed=0, min_timestep=260)
    scramble(control)
    save(control, folder / "adapter", **{"effective_gamma": 20.0} | changes)
    base = bases.load(folder / "sd")
    args = argparse.Namespace(adapter=folder / "adapter", classifier=folder, strength=1.0)
    config = {"sampler": {"guidance_scale": 1.0, "batch_size": 7}, "candidates": candidates}
    return base, base.process(4), resampled_draw(base, base.process(4), config, args)


def test_resampled_paths_of_an_adapter(tiny_sd, a_classifier):
    """One candidate is the adapter's own image; of several none depends on other images; and an adapter that aims at no law is refused."""
    (a_classifier / "sd").symlink_to(tiny_sd)
    rows = pd.DataFrame({"prompt": ["coat", "bag", "a bag"], "label": [0, 1, 0], "seed": [5, 6, 7]})
    base, process, draw = resampled(a_classifier, 1)
    [(one, table)] = generate(base, rows, draw, 3)
    control = controls.load(bases.load(tiny_sd), a_classifier / "adapter")
    [(own, _)] = generate(control.base, rows, denoised(control.base, process, lambda p, y: control.denoiser(process, p, y)), 3)
    assert torch.allclose(one, own, atol=1e-4) and table["effective_sample_size"].tolist() == [[1.0]] * 3
    base, _, draw = resampled(a_classifier, 3)
    [(together, table)] = generate(base, rows, draw, 3)
    alone, tables = zip(*generate(base, rows, draw, 1), strict=True)
    assert torch.allclose(together, torch.cat(alone), atol=1e-4) and not torch.allclose(together, one, atol=1e-4)
    sizes, one_by_one = (torch.tensor(t["effective_sample_size"].tolist()) for t in (table, pd.concat(tables)))
    assert sizes.shape == (3, 1) and ((sizes >= 1) & (sizes <= 3.0001)).all() and torch.allclose(sizes, one_by_one, atol=1e-3)
    assert (table["nfe_forward"] == 3 * (4 + sum(control.active(process)))).all(), "psi is asked where it acts alone"
    with pytest.raises(UserError, match="without a KL"):
        resampled(a_classifier, 3, effective_gamma=float("inf"))
