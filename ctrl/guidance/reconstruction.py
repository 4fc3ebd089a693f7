"""Reconstruction guidance: the classifier on the denoised estimate, differentiated through the network.

    g = ∇_{x_t} log p̂(y | decode(x̂_0(x_t)))

- `constant` (Ho et al. 2022, "Video Diffusion Models", arXiv 2204.03458): eps − scale · sqrt(1 − ᾱ_t) · g, the score plus scale · g.
- `normalised` (Chung et al., ICLR 2023, "Diffusion Posterior Sampling", arXiv 2209.14687, Algorithm 1): x_s + scale · g / sqrt(−log p̂);
  −log p̂ takes the place of DPS's squared residual ‖y − A(x̂_0)‖², whose root DPS divides by.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ctrl.process import Denoiser, Process


def reconstruction_guidance(
    denoiser: Denoiser, process: Process, log_prob: Callable[[Tensor], Tensor], scale: float, weighting: str = "normalised"
) -> Denoiser:
    """`log_prob` maps latents with shape (B, *) to log p̂(y | decode(x_0)) with shape (B,), in nats; `scale` ≥ 0, and 0 guides nothing.

    Costs one forward and one backward pass of the network a step, and the decoder's.
    """
    if weighting not in ("constant", "normalised"):
        raise ValueError(f"weighting is {weighting!r}; it is 'constant' or 'normalised'")

    def guided(x_t: Tensor, i: int) -> Tensor:
        if process.stays(i) or process.pure_noise(i):
            return denoiser(x_t, i)
        with torch.enable_grad():
            x_t = x_t.detach().requires_grad_()
            eps = denoiser(x_t, i)
            log_p = log_prob(process.predict_x0(i, x_t, eps))
            (g,) = torch.autograd.grad(log_p.sum(), x_t)
        eps = eps.detach()
        if weighting == "constant":
            return eps - scale * (1 - process.abar_t[i].item()) ** 0.5 * g
        residual = (-log_p.detach()).clamp(min=1e-6).sqrt().view(-1, *[1] * (g.ndim - 1))
        # mu is linear in eps, so moving x_s by delta is moving eps by delta / (d mu / d eps).
        return eps + (scale / process.eps_coefficient(i)) * g / residual

    return guided
