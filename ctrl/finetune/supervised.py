"""Supervised fine-tuning on labelled data, as for classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598).

loss = Σ ‖eps_psi(x_t, t, y) − eps‖²,    x_t = sqrt(ᾱ_t) x_0 + sqrt(1 − ᾱ_t) eps,    t uniform
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ctrl.process import Denoiser, Process


def supervised(
    process: Process,
    denoiser_of: Callable[[Process, Tensor], Denoiser],
    x_0: Tensor,
    y: Tensor,
    generator: torch.Generator,
    share: float = 1.0,
    active: Sequence[bool] | None = None,
    num_groups: int = 16,
) -> dict[str, Tensor]:
    """Adds the gradient of `share` times the sum of the loss over a batch of x_0 with shape (B, *) and labels with shape (B,).

    The batch is cut into `num_groups`, each with one random step t: a denoiser takes one step at a time. Returns the loss, a scalar.
    """
    steps = [i for i in range(process.num_steps) if active is None or active[i]]
    noise, loss = torch.randn(x_0.shape, generator=generator).to(x_0.device), 0.0
    for rows in torch.arange(len(x_0)).chunk(num_groups):
        i = steps[torch.randint(len(steps), (1,), generator=generator).item()]
        abar = process.abar_t[i].item()
        x_t = abar**0.5 * x_0[rows] + (1 - abar) ** 0.5 * noise[rows]
        loss = loss + (denoiser_of(process, y[rows])(x_t, i) - noise[rows]).square().sum()
    (share * loss).backward()
    return {"loss": share * loss.detach()}
