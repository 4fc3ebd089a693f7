"""Every baseline where the right answer is known: in closed form under an exponential tilt of one Gaussian, and on the mixture."""

import pytest
import torch

from ctrl.distances import sliced_wasserstein
from ctrl.guidance.mpgd import mpgd
from ctrl.guidance.particles import smc, svdd
from ctrl.guidance.reconstruction import reconstruction_guidance
from ctrl.mixture import Controlled, GaussianMixture, SoftmaxLinear, exact, process_of
from ctrl.process import Process
from ctrl.proof import METHODS, Problem
from ctrl.sampling import sample
from tests.test_mixture import COVARIANCES, MEANS, WEIGHTS

# log p = tilt · x − 30 makes N(mean, C) into N(mean + gamma C tilt, C), and log p of E[x_0 | x_t] linear in x_t.
MEAN, COVARIANCE, TILT = torch.tensor([0.5, -0.2]), torch.tensor([[1.0, 0.6], [0.6, 0.8]]), torch.tensor([0.7, -1.5])
GAUSSIAN = GaussianMixture.from_config([1.0], [MEAN.tolist()], [COVARIANCE.tolist()])
PROCESS = process_of(GAUSSIAN, 8)
X_T = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
SETTINGS = {
    "batch_size": 128, "learning_rate": 1e-2, "weight_decay": 0.0, "betas": [0.9, 0.99], "warmup_updates": 10, "decay": "quadratic",
    "num_updates": 80, "coarse": {"stride": 4, "end": 0.3}, "control_variate": True, "max_grad_norm": 10.0,
    "checkpoint_every": 1000,
}  # fmt: skip


def tilted(gamma):
    """The exact denoiser of p_gamma."""
    mean = MEAN + gamma * COVARIANCE @ TILT
    return GaussianMixture.from_config([1.0], [mean.tolist()], [COVARIANCE.tolist()]).denoiser(PROCESS)


def log_p(x_0):
    return x_0 @ TILT - 30


def slope(i):
    """d E[x_0 | x_t] / d x_t, symmetric, with shape (2, 2)."""
    abar = PROCESS.abar_t[i].item()
    return abar**0.5 * COVARIANCE @ torch.linalg.inv(abar * COVARIANCE + (1 - abar) * torch.eye(2))


@pytest.mark.parametrize("gamma", [1.0, 3.0])
@pytest.mark.parametrize("i", [1, 4, 7])
def test_constant_reconstruction_guidance_is_exact_under_a_tilt(i, gamma):
    guided = reconstruction_guidance(GAUSSIAN.denoiser(PROCESS), PROCESS, log_p, gamma, "constant")
    assert torch.allclose(guided(X_T, i), tilted(gamma)(X_T, i), atol=1e-4)


@pytest.mark.parametrize("i", [1, 4, 6])
def test_dps_and_mpgd_move_the_next_x_by_what_the_tilt_says(i):
    """DPS along the gradient by x_t, MPGD, times sqrt(ᾱ_s), along that by x̂_0; both over the root of −log p."""
    pre, noise = GAUSSIAN.denoiser(PROCESS), torch.zeros_like(X_T)
    x_s, root = PROCESS.step(i, X_T, pre(X_T, i), noise), (-log_p(PROCESS.predict_x0(i, X_T, pre(X_T, i)))).sqrt()[:, None]
    for guidance, direction in ((reconstruction_guidance, slope(i) @ TILT), (mpgd, PROCESS.abar_s[i].item() ** 0.5 * TILT)):
        moved = PROCESS.step(i, X_T, guidance(pre, PROCESS, log_p, 0.4)(X_T, i), noise)
        assert torch.allclose(moved - x_s, 0.4 * direction / root, atol=1e-4), guidance


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("i", [1, 4, 6])
def test_classifier_free_guidance_is_exact_under_a_tilt(i, scale):
    """Between the exact denoisers without the label and with it; a scale is there what gamma is."""
    net = Controlled(GAUSSIAN, 2)
    net.outer.bias.data = slope(i) @ TILT
    y = torch.zeros(len(X_T), dtype=torch.long)
    assert torch.allclose(net.denoiser(PROCESS, y)(X_T, i), tilted(1.0)(X_T, i), atol=1e-4)
    assert torch.allclose(net.denoiser(PROCESS, y, scale)(X_T, i), tilted(scale)(X_T, i), atol=1e-4)


@pytest.fixture
def problem(tmp_path):
    """The mixture of config/mixture.yaml, few steps, and a short training."""
    mixture = GaussianMixture.from_config(WEIGHTS, MEANS, COVARIANCES)
    label = SoftmaxLinear.from_config([[2, 0], [-2, 0], [0, 3]], [0, 0, -1], 2)
    moments = mixture.moments()
    return Problem(mixture.affine(*moments), label.affine(*moments), 16, SETTINGS, 0, tmp_path)


def reached(problem, method, gamma=1.0, num=2000):
    """Means over the labels: the distance to the exact law, and the share of samples whose label is the likeliest."""
    draw, distances, shares = METHODS[method](problem, gamma), [], []
    for y in range(problem.label.num_classes):
        x, truth = draw(y, num, torch.Generator().manual_seed(y)), exact(problem.mixture, problem.label, y, gamma, num, torch.Generator())
        distances.append(sliced_wasserstein(x, truth))
        shares.append((problem.label.log_probs(x).argmax(1) == y).double().mean().item())
    return sum(distances) / len(distances), sum(shares) / len(shares)


@pytest.mark.parametrize("method", ["reconstruction_guidance", "dps", "mpgd", "smc", "cfg"])
def test_baseline_comes_near_the_exact_law(problem, method):
    """From where the pretrained model is, 0.85 away: with a scale that is neither end of the sweep, and what 16 steps allow."""
    distance, share = reached(problem, method)
    assert distance < 0.2 and share == pytest.approx(reached(problem, "exact")[1], abs=0.1)
    if scales := [row["scale"] for row in problem.figures.get("sweep", [])]:
        assert min(scales) < problem.figures["scale"] < max(scales)


@pytest.mark.slow
def test_reward_maximisation_leaves_the_exact_law_and_ctrl_does_not(problem):
    """All mass goes where the label is likeliest, and the KL with it; the same trainer with the KL in its objective keeps to the law."""
    distance, share, kl = {}, {}, {}
    for method in ("exact", "pretrained", "ctrl", "reward_maximization"):
        (distance[method], share[method]), kl[method] = reached(problem, method), problem.figures.get("kl_nats")
    assert distance["ctrl"] < 0.35 * distance["pretrained"] and distance["reward_maximization"] > distance["pretrained"]
    assert share["reward_maximization"] == 1 and share["exact"] - 0.2 < share["ctrl"] < share["exact"] + 0.02
    assert kl["ctrl"] < 1.5 and kl["reward_maximization"] > 20


def test_smc_draws_the_exact_law_of_the_same_steps(problem):
    """Of 64 particles as by rejection from the pretrained sampler, by means over the labels: steps are few, and so their law another."""
    process, generator, num = process_of(problem.mixture, 16), torch.Generator().manual_seed(0), 1000
    pre, distances = problem.mixture.denoiser(process), []
    for y in range(problem.label.num_classes):
        drawn = sample(process, pre, problem.noise(20_000, generator))
        kept = drawn[torch.rand(20_000, generator=generator).log() < problem.label.log_probs(drawn)[:, y]]
        noise = problem.noise(64 * num, generator)
        x, _ = smc(process, pre, lambda x_0, y=y: problem.label.log_probs(x_0)[:, y], noise, 64, 1.0, [generator] * num)
        distances.append([sliced_wasserstein(z[:num], kept[:num]) for z in (x, kept[num:], drawn)])
    reached, floor, pretrained = torch.tensor(distances).mean(0)
    assert reached < 2 * floor < 0.1 * pretrained


def peaked(x_0):
    """log p with its maximum, 0, at a point where the mixture has mass."""
    return -(x_0 - torch.tensor([0.9, -0.8])).square().sum(1)


def test_svdd_of_one_step_is_the_best_of_its_draws(problem):
    abar = torch.tensor([0.3, 1.0], dtype=torch.float64)
    process = Process(torch.tensor([0]), abar[:1], abar[1:])
    pre, noise = problem.mixture.denoiser(process), problem.noise(20 * 8, torch.Generator().manual_seed(0), 1)
    drawn = sample(process, pre, noise).view(20, 8, 2)
    best = drawn[torch.arange(20), peaked(drawn.flatten(0, 1)).view(20, 8).argmax(1)]
    assert torch.allclose(svdd(process, pre, peaked, noise, 8), best)


def test_svdd_of_many_particles_is_where_the_label_is_likeliest(problem):
    """A point, and no law: not what p_gamma is for any gamma."""
    process, generator = process_of(problem.mixture, 16), torch.Generator().manual_seed(0)
    pre = problem.mixture.denoiser(process)
    draws = [svdd(process, pre, peaked, problem.noise(50 * num, generator), num) for num in (1, 16, 256)]
    one, some, many = ((-peaked(x)).sqrt().mean().item() for x in draws)
    assert one > 1 and some < 0.05 and many < 0.4 * some


def test_svdd_of_a_label_ends_farther_from_the_exact_law_than_it_began(problem):
    """Its log p rises without end in one direction, and every step takes the best of 16."""
    distance, share = reached(problem, "svdd")
    assert share == 1 and distance > reached(problem, "pretrained")[0]
