"""Particle samplers where the right answer is known: a Gaussian prior and a Gaussian log p, whose product is Gaussian."""

import pandas as pd
import pytest
import torch

from ctrl import classifier as classifiers
from ctrl.generate import generate
from ctrl.guidance.particles import smc, svdd, systematic
from ctrl.process import Process
from ctrl.sampling import sample
from scripts.guided import particle_draw

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
    monkeypatch.setattr(base.unet, "forward", lambda x, *a, forward=base.unet.forward, **k: passes.append(len(x)) or forward(x, *a, **k))
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
