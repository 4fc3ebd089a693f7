"""Manifold preserving guided diffusion: the classifier's gradient with respect to the denoised estimate, not through the network.

    x̂_0' = x̂_0 + scale · g / sqrt(−log p̂),    g = ∇_{x̂_0} log p̂(y | decode(x̂_0))

He et al., ICLR 2024 (arXiv 2311.16424), Algorithm 1 in latent space, with DPS's division by the root of the loss, so that a scale means the
same at every step. The step from x̂_0' keeps the predicted noise.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ctrl.process import Denoiser, Process


def mpgd(denoiser: Denoiser, process: Process, log_prob: Callable[[Tensor], Tensor], scale: float) -> Denoiser:
    """`log_prob` maps latents with shape (B, *) to log p̂(y | decode(x_0)) with shape (B,), in nats; `scale` ≥ 0, and 0 guides nothing.

    Costs one forward pass of the network a step, and the decoder's forward and backward.
    """

    def guided(x_t: Tensor, i: int) -> Tensor:
        with torch.no_grad():
            eps = denoiser(x_t, i)
        if process.stays(i):
            return eps
        with torch.enable_grad():
            x_0 = process.predict_x0(i, x_t, eps).requires_grad_()
            log_p = log_prob(x_0)
            (g,) = torch.autograd.grad(log_p.sum(), x_0)
        residual = (-log_p.detach()).clamp(min=1e-6).sqrt().view(-1, *[1] * (g.ndim - 1))
        # Moving x̂_0 by delta moves x_s by sqrt(ᾱ_s) delta; mu is linear in eps.
        return eps + (process.abar_s[i].item() ** 0.5 * scale / process.eps_coefficient(i)) * g / residual

    return guided
