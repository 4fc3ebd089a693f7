"""A pretrained model whose every law is known: a Gaussian mixture, a label that is softmax-linear in x, and so the exact p_gamma(x | y).

Here methods are proved, not measured: the denoiser is the mixture's own, the classifier is the truth, and exact samples are for the asking.
Everything runs in standardised coordinates (mean 0, standard deviation 1 along each axis), so that any mixture meets the same noise levels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ctrl.errors import UserError
from ctrl.process import Denoiser, Process


@dataclass(frozen=True)
class GaussianMixture:
    """Σ_m weights[m] N(means[m], covariances[m]), with shapes (M,), (M, D), (M, D, D), in double precision."""

    weights: Tensor
    means: Tensor
    covariances: Tensor

    @classmethod
    def from_config(cls, weights: Sequence, means: Sequence, covariances: Sequence) -> "GaussianMixture":
        """Weights are normalised. Raises UserError where shapes disagree, a weight is not positive, or a covariance is no covariance."""
        try:
            w, m, c = (torch.tensor(v, dtype=torch.float64) for v in (weights, means, covariances))
        except (ValueError, TypeError) as error:
            raise UserError(f"base: weights, means and covariances must be numbers in lists of equal lengths ({error})") from error
        if w.ndim != 1 or m.ndim != 2 or len(m) != len(w) or m.shape[1] < 2 or c.shape != (*m.shape, m.shape[1]):
            shapes = ", ".join(f"{name} {tuple(v.shape)}" for name, v in {"weights": w, "means": m, "covariances": c}.items())
            raise UserError(f"base: a mixture has weights (M,), means (M, D) and covariances (M, D, D) with D of 2 or more, not {shapes}")
        if not (w > 0).all():
            raise UserError(f"base.weights: {weights}; every weight must be above 0")
        for k, matrix in enumerate(c):
            if not torch.allclose(matrix, matrix.T) or torch.linalg.eigvalsh(matrix).min() <= 0:
                raise UserError(f"base.covariances[{k}]: {covariances[k]} is not a symmetric matrix with positive eigenvalues")
        return cls(w / w.sum(), m, c)

    @property
    def dim(self) -> int:
        return self.means.shape[1]

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation along each axis, both with shape (D,)."""
        mean = self.weights @ self.means
        variance = self.weights @ (self.covariances.diagonal(dim1=1, dim2=2) + (self.means - mean).square())
        return mean, variance.sqrt()

    def affine(self, shift: Tensor, scale: Tensor) -> "GaussianMixture":
        """The law of (x − shift) / scale."""
        return GaussianMixture(self.weights, (self.means - shift) / scale, self.covariances / (scale[:, None] * scale))

    def sample(self, num: int, generator: torch.Generator) -> Tensor:
        """Exact samples with shape (num, D)."""
        which = torch.multinomial(self.weights, num, replacement=True, generator=generator)
        noise = torch.randn(num, self.dim, generator=generator, dtype=torch.float64)
        return self.means[which] + (torch.linalg.cholesky(self.covariances)[which] @ noise[:, :, None])[:, :, 0]

    def log_density(self, x: Tensor) -> Tensor:
        """log p(x) in nats with shape (N,)."""
        laws = torch.distributions.MultivariateNormal(self.means, self.covariances)
        return torch.logsumexp(laws.log_prob(x.double()[:, None]) + self.weights.log(), dim=1)

    def denoiser(self, process: Process) -> Denoiser:
        """E[eps | x_t], exactly: −sqrt(1 − ᾱ_t) ∇ log Σ_m weights[m] N(x_t; sqrt(ᾱ_t) means[m], ᾱ_t covariances[m] + (1 − ᾱ_t) I)."""
        spread, axes = torch.linalg.eigh(self.covariances)
        centres = torch.einsum("mde,md->me", axes, self.means).float()
        rotate = axes.permute(1, 0, 2).flatten(1).float()  # (D, M D): all components' axes in one product
        spread, log_weights = spread.float(), self.weights.log().float()

        def eps(x_t: Tensor, i: int | Tensor) -> Tensor:
            alpha, sd = process.scales(i, x_t[:, :, None])
            variances = alpha**2 * spread + sd**2
            z = (x_t @ rotate).unflatten(1, spread.shape) - alpha * centres
            inward = z / variances
            r = (log_weights - 0.5 * (z * inward + variances.log()).sum(2)).softmax(1)
            return (sd * inward * r[:, :, None]).flatten(1) @ rotate.T

        return eps

    def posterior(self, abar: float, x_t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """p(x_0 | x_t), a mixture too: log weights (B, M), means (B, M, D), and roots R (M, D, D) of the covariances R Rᵀ."""
        spread, axes, means = (v.to(x_t.dtype) for v in (*torch.linalg.eigh(self.covariances), self.means))
        variances = abar * spread + (1 - abar)
        z = torch.einsum("mde,bmd->bme", axes, x_t[:, None] - abar**0.5 * means)
        log_r = self.weights.log().to(x_t.dtype) - 0.5 * (z.square() / variances + variances.log()).sum(2)
        moved = means + torch.einsum("mde,bme->bmd", axes, abar**0.5 * spread / variances * z)
        return log_r.log_softmax(1), moved, axes * (spread * (1 - abar) / variances).sqrt()[:, None]


@dataclass(frozen=True)
class SoftmaxLinear:
    """p(y | x) = softmax(weight x + bias)[y], with shapes (K, D) and (K,)."""

    weight: Tensor
    bias: Tensor

    @classmethod
    def from_config(cls, weight: Sequence, bias: Sequence, dim: int) -> "SoftmaxLinear":
        """Raises UserError where the shapes disagree with each other or with the mixture."""
        try:
            w, b = (torch.tensor(v, dtype=torch.float64) for v in (weight, bias))
        except (ValueError, TypeError) as error:
            raise UserError(f"label: weight and bias must be numbers in lists of equal lengths ({error})") from error
        if w.ndim != 2 or b.shape != w.shape[:1] or len(w) < 2 or w.shape[1] != dim:
            raise UserError(f"label: weight {tuple(w.shape)} and bias {tuple(b.shape)}; for this base they are (K, {dim}) and (K,), K ≥ 2")
        return cls(w, b)

    @property
    def num_classes(self) -> int:
        return len(self.bias)

    def affine(self, shift: Tensor, scale: Tensor) -> "SoftmaxLinear":
        """The same label as a function of (x − shift) / scale."""
        return SoftmaxLinear(self.weight * scale, self.bias + self.weight @ shift)

    def log_probs(self, x: Tensor) -> Tensor:
        """log p(y | x) of every label, with shape (N, K)."""
        return torch.log_softmax(x @ self.weight.T.to(x.dtype) + self.bias.to(x.dtype), dim=1)

    def log_prob(self, x: Tensor, y: Tensor) -> Tensor:
        """log p(y | x) with shape (N,)."""
        return self.log_probs(x).gather(1, y[:, None])[:, 0]


def noisy_log_prob(
    mixture: GaussianMixture, label: SoftmaxLinear, process: Process, y: Tensor, num_nodes: int = 128
) -> Callable[[Tensor, int], Tensor]:
    """(x_t, i) -> log p_t(y | x_t) = log E[p(y | x_0) | x_t] with shape (B,), in nats, for labels with shape (B,).

    The mean over each component is that over `num_nodes` quasi-random points (Sobol's, mapped to a normal law), in any dimension.
    """
    uniform = torch.quasirandom.SobolEngine(mixture.dim, scramble=True, seed=0).draw(num_nodes, dtype=torch.float64)
    nodes = torch.special.ndtri(uniform)

    def log_prob(x_t: Tensor, i: int) -> Tensor:
        log_r, means, roots = mixture.posterior(process.abar_t[i].item(), x_t)
        weight, bias = label.weight.to(x_t.dtype), label.bias.to(x_t.dtype)
        offsets = torch.einsum("kd,mde,qe->mqk", weight, roots, nodes.to(x_t.dtype))
        log_p = torch.log_softmax((means @ weight.T + bias)[:, :, None] + offsets, dim=3)  # (B, M, num_nodes, K)
        log_p = log_p.gather(3, y.view(-1, 1, 1, 1).expand(*log_p.shape[:3], 1))[..., 0]
        return torch.logsumexp(log_r[:, :, None] + log_p, dim=(1, 2)) - math.log(num_nodes)

    return log_prob


DENSEST, WIDTH, SPARSEST = 0.7, 1.5, 0.1  # of the steps, along the log-SNR: where, how wide, and the least density beside the highest, 1


def process_of(mixture: GaussianMixture, num_steps: int) -> Process:
    """From pure noise to 1 % of the smallest variance; the last step, to no noise at all, has no sigma.

    The mixture is a standardised one. Steps are short about DENSEST, where log E[p(y | x_0) | x_t] bends most: what a Gaussian step leaves
    of the variance of log w is in proportion to that bend squared and to the step squared. Where that lies was measured for the mixture
    of config/mixture.yaml; the modes of any standardised mixture part not far from it.
    """
    smallest = torch.linalg.eigvalsh(mixture.covariances).min().item()
    log_snr = np.linspace(-8.0, math.log(100 / smallest), 4001)
    density = 1 / np.cosh((log_snr - DENSEST) / WIDTH) + SPARSEST
    passed = density.cumsum() - density[0]
    abar_t = torch.sigmoid(torch.from_numpy(np.interp(np.linspace(0, passed[-1], num_steps), passed, log_snr)))
    return Process(torch.arange(num_steps).flip(0), abar_t, torch.cat([abar_t[1:], abar_t.new_ones(1)]))


def exact(mixture: GaussianMixture, label: SoftmaxLinear, y: int, gamma: float, num: int, generator: torch.Generator) -> Tensor:
    """`num` exact samples of p_gamma(x | y) ∝ p(x) p(y | x)^gamma, with shape (num, D), by rejection: p(y | x)^gamma ≤ 1.

    Raises UserError where fewer than one draw in 100,000 is accepted.
    """
    kept, accepted, drawn = [], 0, 0
    while accepted < num:
        x = mixture.sample(100_000, generator)
        uniform = torch.rand(len(x), generator=generator, dtype=torch.float64)
        kept.append(x[uniform.log() < gamma * label.log_probs(x)[:, y]])
        accepted, drawn = accepted + len(kept[-1]), drawn + len(x)
        if accepted < drawn / 100_000:
            raise UserError(f"label {y} at gamma {gamma:g} is too rare for exact samples: {accepted} of {drawn} draws; lower gamma")
    return torch.cat(kept)[:num]


class Controlled(nn.Module):
    """The mixture's denoiser plus a network of the label that starts at zero: eps_pre − sqrt(1 − ᾱ_t) · net(x_t, x̂_0, log-SNR, y).

    The same bargain as in an image model: with the network's last layer at zero it *is* the pretrained model.
    """

    def __init__(self, mixture: GaussianMixture, num_classes: int, width: int = 128, seed: int = 0):
        super().__init__()
        self.mixture = mixture
        self.register_buffer("frequencies", 2.0 ** torch.arange(-3, 3))
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.inner = nn.Linear(2 * mixture.dim + 1 + len(self.frequencies), width)
            self.label = nn.Embedding(num_classes, width)
            self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
            self.outer = nn.Linear(width, mixture.dim)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def denoiser(self, process: Process, y: Tensor, strength: float = 1.0, pre: Denoiser | None = None) -> Denoiser:
        """For labels with shape (B,): eps_pre + strength · (eps_psi − eps_pre). `pre`: the mixture's denoiser, if it is there."""
        pre = pre or self.mixture.denoiser(process)
        log_snr = torch.logit(process.abar_t).float()[:, None]
        times = torch.cat([log_snr / 8, (log_snr * self.frequencies).sin()], dim=1)

        acts = active(process)

        def psi(x_t: Tensor, i: int | Tensor) -> Tensor:
            eps = pre(x_t, i)
            if not isinstance(i, Tensor) and not acts[i]:
                return eps
            known = torch.cat([x_t, process.predict_x0(i, x_t, eps).clamp(-10, 10), times[i].expand(len(x_t), -1)], dim=1)
            h = self.inner(known) + self.label(y)
            for layer in self.hidden:
                h = h + layer(nn.functional.silu(h))
            return eps - strength * process.scales(i, x_t)[1] * self.outer(nn.functional.silu(h))

        return psi


def remembering(denoiser: Denoiser) -> Denoiser:
    """The same denoiser, which does not work twice when it is asked again at the very x_t that it was asked last."""
    last: tuple = (None, None, None)

    def once(x_t: Tensor, i: int) -> Tensor:
        nonlocal last
        x, step, eps = last
        needs_graph = torch.is_grad_enabled() and x_t.requires_grad
        if x is not x_t or step != i or (needs_graph and not eps.requires_grad):
            eps = denoiser(x_t, i)
            last = (x_t, i, eps)
        return eps

    return once


def active(process: Process) -> list[bool]:
    """At which steps a control can act: where there is noise, and so a law."""
    return [process.sigma(i) > 0 for i in range(process.num_steps)]
