"""Supervised fine-tuning on labelled data, as for classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598).

loss = Σ ‖eps_psi(x_t, t, y) − eps‖²,    x_t = sqrt(ᾱ_t) x_0 + sqrt(1 − ᾱ_t) eps,    t uniform

Of a model of flow matching the error is that of the velocity (`Process.loss_weight`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ctrl.process import Denoiser, Process


def supervised(
    process: Process, psi: Denoiser, x_0: Tensor, generator: torch.Generator, share: float = 1.0, active: Sequence[bool] | None = None,
    rows: Tensor | slice = slice(None),
) -> dict[str, Tensor]:  # fmt: skip
    """Adds the gradient of `share` times the sum of the loss over a batch of x_0 with shape (B, *); returns the loss, a scalar.

    Each image has a random step of its own, among those that are `active`: psi is given their indices, a tensor with shape (B,). Of
    `rows` alone, which psi is made for, the gradient is added; what is random of each image is the same whichever they are.
    """
    steps = torch.tensor([i for i in range(process.num_steps) if active is None or active[i]])
    noise = torch.randn(x_0.shape, generator=generator)[rows].to(x_0.device)
    i, x_0 = steps[torch.randint(len(steps), (len(x_0),), generator=generator)][rows], x_0[rows]
    alpha, sd = process.scales(i, x_0)
    x_t = alpha * x_0 + sd * noise
    loss = share * (process.loss_weight(i, x_t) * (psi(x_t, i) - noise).square()).sum()
    loss.backward()
    return {"loss": loss.detach()}
