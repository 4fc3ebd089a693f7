"""Where the right answer is known: both trainers on a Gaussian mixture, against exact samples and the identities of the optimum."""

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from ctrl.distances import sliced_wasserstein
from ctrl.errors import UserError
from ctrl.finetune.adjoint import adjoint
from ctrl.finetune.backprop import backprop
from ctrl.guidance.classifier import classifier_guidance
from ctrl.mixture import Controlled, GaussianMixture, SoftmaxLinear, active, exact, noisy_log_prob, process_of
from ctrl.proof import Problem, compare_sets, draw_exact
from ctrl.sampling import path_statistics, sample

WEIGHTS, MEANS = [0.3, 0.3, 0.2, 0.2], [[-2, -1], [2, -1], [0, 2], [0, 0]]
COVARIANCES = [[[0.3, 0.1], [0.1, 0.2]], [[0.2, -0.1], [-0.1, 0.3]], [[0.4, 0], [0, 0.1]], [[0.1, 0], [0, 0.1]]]
TRAINERS = {"backprop": backprop, "adjoint": adjoint}


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def problem():
    """The mixture and its label, standardised."""
    mixture = GaussianMixture.from_config(WEIGHTS, MEANS, COVARIANCES)
    label = SoftmaxLinear.from_config([[2, 0], [-2, 0], [0, 3]], [0, 0, -1], 2)
    moments = mixture.moments()
    return mixture.affine(*moments), label.affine(*moments)


def train(problem, trainer, gamma, num_updates, num_steps=32, batch_size=256):
    """Adam with a cosine to zero, as everywhere; returns the network and the process."""
    mixture, label = problem
    process, generator = process_of(mixture, num_steps), torch.Generator().manual_seed(1)
    pre, net = mixture.denoiser(process), Controlled(mixture, label.num_classes)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_updates)
    for _ in range(num_updates):
        y = torch.randint(label.num_classes, (batch_size,), generator=generator)
        noise = torch.randn(num_steps + 1, batch_size, mixture.dim, generator=generator)
        optimizer.zero_grad()
        TRAINERS[trainer](
            process, net.denoiser(process, y), pre, lambda x, y=y: label.log_prob(x, y), noise, gamma, share=1 / batch_size,
            active=active(process),
        )  # fmt: skip
        optimizer.step()
        schedule.step()
    return net, process


def test_denoiser_is_the_score_of_the_noisy_mixture(problem, generator):
    """eps = −sqrt(1 − ᾱ) ∇ log p_t, by automatic differentiation of the noisy mixture's density."""
    mixture, process = problem[0], process_of(problem[0], 8)
    for i in range(8):
        abar = process.abar_t[i].item()
        noisy = GaussianMixture(mixture.weights, abar**0.5 * mixture.means, abar * mixture.covariances + (1 - abar) * torch.eye(2))
        x = torch.randn(50, 2, generator=generator).requires_grad_()
        (score,) = torch.autograd.grad(noisy.log_density(x).sum(), x)
        assert torch.allclose(mixture.denoiser(process)(x, i), -((1 - abar) ** 0.5) * score, atol=1e-4)


def test_density_moments_and_samples_agree(generator):
    mixture = GaussianMixture.from_config(WEIGHTS, MEANS, COVARIANCES)
    x = mixture.sample(20_000, generator)
    expected = sum(w * multivariate_normal(m, c).pdf(x.numpy()) for w, m, c in zip(WEIGHTS, MEANS, COVARIANCES, strict=True))
    np.testing.assert_allclose(mixture.log_density(x).exp().numpy(), expected, rtol=1e-9)
    mean, sd = mixture.moments()
    assert torch.allclose(x.mean(0), mean, atol=0.05) and torch.allclose(x.std(0), sd, atol=0.05)
    standard = mixture.affine(mean, sd)
    assert torch.allclose(standard.moments()[0], torch.zeros(2).double(), atol=1e-12)
    assert torch.allclose(standard.log_density((x - mean) / sd), mixture.log_density(x) + sd.log().sum(), atol=1e-9)


def test_label_is_the_same_in_standardised_coordinates(generator):
    label, x = SoftmaxLinear.from_config([[1, 2], [3, -1]], [0.5, 0], 2), torch.randn(10, 2, generator=generator).double()
    shift, scale = torch.tensor([1.0, 2.0]).double(), torch.tensor([3.0, 0.5]).double()
    assert torch.allclose(label.affine(shift, scale).log_probs((x - shift) / scale), label.log_probs(x))


def grid_posterior(mixture, abar, x_t, num=500):
    """Points x_0 (N, 2) of a grid, and their probabilities given each x_t, (B, N), straight from Bayes' rule."""
    axis = torch.linspace(-5, 5, num, dtype=torch.float64)
    x_0 = torch.cartesian_prod(axis, axis)
    log_likelihood = -0.5 * (x_t[:, None] - abar**0.5 * x_0).square().sum(2) / (1 - abar)
    return x_0, (mixture.log_density(x_0) + log_likelihood).softmax(1)


@pytest.mark.parametrize("i", [0, 4, 8, 11, 15])
def test_classifier_guidance_at_scale_one_is_the_denoiser_of_the_conditional_law(problem, generator, i):
    """p_t(y | x_t) = E[p(y | x_0) | x_t], and with it eps − sqrt(1 − ᾱ_t) ∇ log p_t(y | x_t) = E[eps | x_t, y]: both against a grid."""
    mixture, label = problem
    process = process_of(mixture, 20)
    abar = process.abar_t[i].item()
    x_t = abar**0.5 * mixture.sample(12, generator) + (1 - abar) ** 0.5 * torch.randn(12, 2, generator=generator).double()
    x_0, p = grid_posterior(mixture, abar, x_t)
    y = label.log_probs(abar**-0.5 * x_t).argmax(1)  # a label that is not absurd there
    p_y = p * label.log_probs(x_0).exp().T[y]
    log_p = noisy_log_prob(mixture, label, process, y, 4096)
    assert torch.allclose(log_p(x_t, i), p_y.sum(1).log(), atol=0.01)
    eps_given_y = (x_t - abar**0.5 * (p_y @ x_0) / p_y.sum(1, keepdim=True)) / (1 - abar) ** 0.5
    guided = classifier_guidance(mixture.denoiser(process), process, log_p, 1.0)(x_t.float(), i)
    assert torch.allclose(guided.double(), eps_given_y, atol=0.01)
    assert (mixture.denoiser(process)(x_t.float(), i) - eps_given_y).abs().max() > 0.02, "the label matters here"


@pytest.mark.slow
def test_classifier_guidance_draws_the_conditional_law(problem, generator):
    """With many steps no farther from exact samples than 1.5 times what two exact sets are, over the labels."""
    mixture, label = problem
    process, n = process_of(mixture, 128), 4_000
    guided, floor = [], []
    for y in range(label.num_classes):
        log_p = noisy_log_prob(mixture, label, process, torch.full((n,), y), num_nodes=32)
        denoiser = classifier_guidance(mixture.denoiser(process), process, log_p, 1.0)
        truth, again = (exact(mixture, label, y, 1.0, n, generator) for _ in range(2))
        guided.append(sliced_wasserstein(sample(process, denoiser, torch.randn(129, n, 2, generator=generator)), truth))
        floor.append(sliced_wasserstein(again, truth))
    assert sum(guided) < 1.5 * sum(floor)


@pytest.mark.parametrize("num_steps", [2, 3, 128, 1000])
def test_every_step_of_the_sampler_goes_towards_less_noise(problem, num_steps):
    process = process_of(problem[0], num_steps)
    assert (process.abar_t.diff() > 0).all() and process.abar_t[0] < 1e-3 and process.abar_s[-1] == 1
    smallest = torch.linalg.eigvalsh(problem[0].covariances).min()
    assert ((1 - process.abar_t[-1]) / process.abar_t[-1] / smallest).item() == pytest.approx(0.01, rel=0.01)
    assert active(process) == [True] * (num_steps - 1) + [False]


def test_sampler_nears_the_mixture_as_steps_grow(problem, generator):
    mixture, distances = problem[0], []
    for num_steps in (8, 32, 128):
        process = process_of(mixture, num_steps)
        x = sample(process, mixture.denoiser(process), torch.randn(num_steps + 1, 20_000, 2, generator=generator))
        distances.append(sliced_wasserstein(x, mixture.sample(20_000, generator)))
    assert distances[0] > 1.5 * distances[1] > 1.5 * distances[2] and distances[2] < 0.03


def test_rejection_draws_the_tilted_density(problem, generator):
    """Importance weights p(y | x)^gamma on draws of the mixture give the same means as rejection."""
    mixture, label = problem
    x = mixture.sample(200_000, generator)
    weights = (3.0 * label.log_probs(x)[:, 2]).softmax(0)
    assert torch.allclose(exact(mixture, label, 2, 3.0, 20_000, generator).mean(0), weights @ x, atol=0.03)
    with pytest.raises(UserError, match="too rare"):
        exact(mixture, SoftmaxLinear(label.weight, torch.tensor([0.0, 0.0, -40.0]).double()), 2, 1.0, 10, generator)


def test_at_the_start_it_is_the_mixture_and_the_kl_is_zero(problem, generator):
    mixture, label = problem
    process = process_of(mixture, 6)
    net, noise, y = Controlled(mixture, 3), torch.randn(7, 5, 2, generator=generator), torch.tensor([0, 1, 2, 0, 1])
    assert torch.equal(sample(process, net.denoiser(process, y), noise), sample(process, mixture.denoiser(process), noise))
    for trainer in TRAINERS.values():
        figures = trainer(process, net.denoiser(process, y), mixture.denoiser(process), lambda x: label.log_prob(x, y), noise, 1.0,
                          active=active(process))  # fmt: skip
        assert figures["kl_nats"].abs().max() == 0 and figures["log_ratio"].abs().max() == 0


def test_both_trainers_report_the_same_trajectories(problem, generator):
    mixture, label = problem
    process = process_of(mixture, 6)
    net, noise, y = Controlled(mixture, 3), torch.randn(7, 5, 2, generator=generator), torch.tensor([0, 1, 2, 0, 1])
    torch.nn.init.normal_(net.outer.weight, 0, 0.3, generator=generator)
    a, b = (
        t(process, net.denoiser(process, y), mixture.denoiser(process), lambda x: label.log_prob(x, y), noise, 2.0, active=active(process))
        for t in TRAINERS.values()
    )
    assert all(torch.allclose(a[key], b[key], atol=1e-4) for key in ("x_0", "log_prob", "kl_nats", "log_ratio"))


@pytest.mark.slow
@pytest.mark.parametrize(("trainer", "gamma", "num_updates"), [("backprop", 3.0, 150), ("adjoint", 1.0, 400)])
def test_the_optimum_is_p_gamma(problem, trainer, gamma, num_updates, generator):
    """No label is farther from p_gamma(x | y) than a tenth of where it began, and the variance of log w, 0 there, has collapsed."""
    mixture, label = problem
    net, coarse = train(problem, trainer, gamma, num_updates)
    process, n = process_of(mixture, 128), 5_000
    for y in range(label.num_classes):
        noise, labels = torch.randn(129, n, 2, generator=generator), torch.full((n,), y)
        truth = exact(mixture, label, y, gamma, n, generator)
        before, after = (sample(process, d, noise) for d in (mixture.denoiser(process), net.denoiser(process, labels)))
        assert sliced_wasserstein(after, truth) < 0.1 * sliced_wasserstein(before, truth)
        noise = torch.randn(33, n, 2, generator=generator)
        x, _, log_ratio = path_statistics(coarse, net.denoiser(coarse, labels), mixture.denoiser(coarse), noise, active(coarse))
        start = gamma * label.log_prob(sample(coarse, mixture.denoiser(coarse), noise), labels)
        assert (gamma * label.log_prob(x, labels) - log_ratio).var() < 0.1 * start.var()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("weights", [1, -1], "base.weights"),
        ("weights", [1], r"weights \(1,\)"),
        ("means", [[0, 0], [1]], "lists of equal lengths"),
        ("covariances", [[[1, 0], [0, 1]], [[1, 2], [2, 1]]], r"base.covariances\[1\].*positive eigenvalues"),
    ],
)
def test_a_wrong_mixture_is_refused(key, value, message):
    right = {"weights": [1, 1], "means": [[0, 0], [1, 1]], "covariances": [[[1, 0], [0, 1]]] * 2}
    with pytest.raises(UserError, match=message):
        GaussianMixture.from_config(**right | {key: value})
    with pytest.raises(UserError, match=r"weight \(2, 3\)"):
        SoftmaxLinear.from_config([[1, 2, 3], [1, 2, 3]], [0, 0], 2)


def test_distances_are_means_over_independent_sets(problem, tmp_path):
    """The first set does not depend on how many there are; the standard error is that of the sets' mean."""
    proof = Problem(*problem, 8, {}, 0, tmp_path)
    draw = draw_exact(proof, 1.0)
    (first, two), (again, three) = (compare_sets(proof, 1.0, draw, 1000, k, (1, 500)) for k in (2, 3))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    name = "sliced_wasserstein"
    mean, spread = two[name], two[f"{name}_se"]  # of two values: they are mean ± spread
    third = 3 * three[name] - 2 * mean
    values = torch.tensor([mean - spread, mean + spread, third])
    assert spread > 0 and three[f"{name}_se"] == pytest.approx((values.std() / 3**0.5).item(), rel=1e-4)
