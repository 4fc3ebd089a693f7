"""Samplers that move many particles for each image and let the classifier weigh or choose among them: no gradient anywhere.

- `smc`: sequential Monte Carlo towards p_pre(x_0) p̂(y | x_0)^gamma, with the twists gamma · ᾱ_t · log p̂(y | decode(x̂_0(x_t))) (Wu et al.,
  NeurIPS 2023, "Twisted diffusion sampler", arXiv 2306.17775, with the pretrained model as the proposal; tempered by ᾱ_t, since an early
  x̂_0 says little). Exact in the limit of many particles.
- `svdd`: at every step the best of M candidates by log p̂(y | decode(x̂_0)) (Li et al. 2024, arXiv 2408.08252, alpha = 0).
- `resample`: M whole paths of a controlled model, of which one is drawn by its weight p̂(y | x_0)^gamma · pre(path) / psi(path) (sampling
  importance resampling, Rubin 1988). Exact in the limit of many, whatever psi is; the nearer psi is to the optimum, the fewer it takes.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ctrl.process import Denoiser, Process

LogProb = Callable[[Tensor], Tensor]


def smc(
    process: Process, denoiser: Denoiser, log_prob: LogProb, noise: Tensor, num_particles: int, gamma: float,
    generators: Sequence[torch.Generator],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One x_0 for each of B images with shape (B, *), and the effective sample size after each step, of 1 … M, with shape (N + 1, B).

    `noise` with shape (N + 1, B · M, *), the particles of an image side by side, as `denoiser` and `log_prob` take them. Resamples
    (systematically) an image's particles when their effective sample size falls below M / 2. `generators`: one an image, on the CPU: no
    image depends on those beside it.
    """
    x, batch = noise[0], noise.shape[1] // num_particles
    twist = log_w = torch.zeros(batch, num_particles, dtype=torch.float64)
    sizes = []
    with torch.no_grad():
        for i in range(process.num_steps + 1):
            last = i == process.num_steps
            eps = None if last else denoiser(x, i)
            x_0, trust = (x, 1.0) if last else (process.predict_x0(i, x, eps), process.abar_t[i].item())
            new = (gamma * trust * log_prob(x_0)).double().cpu().view(batch, num_particles)
            log_w, twist = log_w + new - twist, new
            weights = log_w.softmax(1)
            sizes.append(1 / weights.square().sum(1))
            if last:
                return one_of_each(x, weights, generators), torch.stack(sizes)
            poor = sizes[-1] < num_particles / 2
            ancestors = torch.where(poor[:, None], systematic(weights, generators), torch.arange(num_particles))
            log_w = torch.where(poor[:, None], 0.0, log_w)
            twist = twist.gather(1, ancestors)
            flat = (ancestors + num_particles * torch.arange(batch)[:, None]).flatten().to(x.device)
            x = process.step(i, x[flat], eps[flat], noise[i + 1])


def systematic(weights: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Indices with shape (B, M): particle m of each row occurs M · weights[m] times, rounded up or down (systematic resampling).

    Each of the B rows draws one number from its own generator.
    """
    count = weights.shape[1]
    offsets = torch.stack([torch.rand(1, generator=g, dtype=weights.dtype) for g in generators])
    points = (torch.arange(count) + offsets) / count
    return torch.searchsorted(weights.cumsum(1).contiguous(), points.contiguous()).clamp(max=count - 1)


def one_of_each(x: Tensor, weights: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Of B · M particles, those of an image side by side, one for each image, drawn by its `weights` with shape (B, M)."""
    batch, count = weights.shape
    chosen = torch.cat([torch.multinomial(w, 1, generator=g) for w, g in zip(weights, generators, strict=True)])
    return x.view(batch, count, *x.shape[1:])[torch.arange(batch), chosen.to(x.device)]


def resample(x: Tensor, log_w: Tensor, num_candidates: int, generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
    """One x_0 for each of B images with shape (B, *), and the effective sample size of its M paths, of 1 … M, with shape (1, B).

    `x` with shape (B · M, *) are the ends of paths of a controlled model, M = `num_candidates` an image, side by side; `log_w` with shape
    (B · M,) their gamma · log p̂ − log psi(path) / pre(path); `generators` as in `smc`. At the optimum of gamma, where log w is the same
    for all paths, the effective sample size is M.
    """
    weights = log_w.double().cpu().view(-1, num_candidates).softmax(1)
    return one_of_each(x, weights, generators), 1 / weights.square().sum(1)[None]


def svdd(process: Process, denoiser: Denoiser, log_prob: LogProb, noise: Tensor, num_particles: int) -> Tensor:
    """One x_0 for each of B images with shape (B, *); `noise`, `denoiser` and `log_prob` as in `smc`.

    The candidates of the first step are M draws of x_T. A candidate's x̂_0 takes a pass, whose eps serves the next step too.
    """
    batch = noise.shape[1] // num_particles
    x = noise[0]
    with torch.no_grad():
        for i in range(process.num_steps + 1):
            last = i == process.num_steps
            eps = None if last else denoiser(x, i)
            value = log_prob(x if last else process.predict_x0(i, x, eps)).view(batch, num_particles)
            best = value.argmax(1) + num_particles * torch.arange(batch, device=value.device)
            if last:
                return x[best]
            every = best.repeat_interleave(num_particles)
            x = process.step(i, x[every], eps[every], noise[i + 1])
