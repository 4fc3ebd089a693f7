"""The one sampling loop, and the noise that makes an image depend on its seed and on nothing else."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ctrl.process import Denoiser, Process


def noise_of(seeds: Sequence[int], shape: tuple[int, ...], num_steps: int, device: torch.device | str = "cpu") -> Tensor:
    """All the noise of a batch, with shape (num_steps + 1, B, *shape): x_T first, then one for each step.

    Every image has its own generator, and draws in the order in which a diffusers pipeline draws: the same seed gives the same image there.
    """
    images = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(int(seed))
        images.append(torch.stack([torch.randn((1, *shape), generator=generator)[0] for _ in range(num_steps + 1)]))
    return torch.stack(images, dim=1).to(device)


def sample(process: Process, denoiser: Denoiser, noise: Tensor) -> Tensor:
    """x_0 with shape (B, *) from `noise` with shape (N + 1, B, *), without gradients."""
    with torch.no_grad():
        x = noise[0]
        for i in range(process.num_steps):
            x = process.step(i, x, denoiser(x, i), noise[i + 1])
        return x


def path_statistics(
    process: Process, psi: Denoiser, pre: Denoiser, noise: Tensor, active: Sequence[bool] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """x_0 sampled by `psi`, its path KL to `pre` in nats, and log psi(path) / pre(path); shapes (B, *), (B,), (B,).

    `active` says at which steps psi differs from pre at all: elsewhere only pre is run.
    """
    with torch.no_grad():
        x, kl, log_ratio = noise[0], noise.new_zeros(noise.shape[1]), noise.new_zeros(noise.shape[1])
        for i in range(process.num_steps):
            eps = eps_pre = pre(x, i)
            if active is None or active[i]:
                eps = psi(x, i)
                kl += process.kl(i, eps, eps_pre)
                log_ratio += process.log_ratio(i, eps, eps_pre, noise[i + 1])
            x = process.step(i, x, eps, noise[i + 1])
        return x, kl, log_ratio
