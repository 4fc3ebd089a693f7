"""Classifier guidance: the gradient of a classifier that was trained on noisy latents.

    eps − sqrt(1 − ᾱ_t) · scale · ∇_{x_t} log p_t(y | x_t)

Dhariwal & Nichol, NeurIPS 2021 (arXiv 2105.05233), Algorithm 2. At a scale of 1, with the exact p_t(y | x_t) = E[p(y | x_0) | x_t], this is
E[eps | x_t, y]: the denoiser of the exact conditional law.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ctrl.process import Denoiser, Process


def classifier_guidance(denoiser: Denoiser, process: Process, log_prob: Callable[[Tensor, int], Tensor], scale: float) -> Denoiser:
    """`log_prob` maps x_t with shape (B, *) and the step's index to log p_t(y | x_t) with shape (B,), in nats; `scale` ≥ 0.

    Costs one forward pass of the network a step, and the noisy classifier's forward and backward.
    """

    def guided(x_t: Tensor, i: int) -> Tensor:
        if process.pure_noise(i):
            return denoiser(x_t, i)
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            (g,) = torch.autograd.grad(log_prob(x, i).sum(), x)
        with torch.no_grad():
            return denoiser(x_t, i) - scale * (1 - process.abar_t[i].item()) ** 0.5 * g

    return guided
