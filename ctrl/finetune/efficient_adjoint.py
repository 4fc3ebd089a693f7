"""Adjoint matching in closed form: sample without gradients, add noise again, regress. No walk back (Shin et al. 2026, arXiv 2605.11480).

Let x_1 be the state in which the control ends, with noise level ᾱ_1, from which the pretrained model goes on alone. At the optimum

    ∇ log p*(x_1) = −eps*(x_1) / sqrt(1 − ᾱ_1),    eps*(x_1) = eps_pre(x_1) − sqrt(1 − ᾱ_1) ∇ E[gamma · log p̂(y | x_0) | x_1] / kl_weight

and with r = ᾱ_t / ᾱ_1, x_t = sqrt(r) x_1 + sqrt(1 − r) z, the score at any other noise level is the mean, given x_t, of either of

    A = ∇ log p*(x_1) / sqrt(r)      (target score matching, De Bortoli et al. 2024, arXiv 2402.08667)
    B = −z / sqrt(1 − r)             (denoising score matching, Vincent 2011)

and so of a A + (1 − a) B with any a. As z knows nothing of x_1, E[A · B] = 0, and a : 1 − a = E‖B‖² : E‖A‖² has the least variance.
With m = E[eps*(x_1)²], of one dimension, this is the regression of eps_psi(x_t), for x_1 drawn by psi itself, on

    target = sqrt(1 − ᾱ_t) · (sqrt(r (1 − ᾱ_1)) eps*(x_1) + m sqrt(1 − r) z) / (r (1 − ᾱ_1) + m (1 − r))

The paper's linear base drift towards N(0, I) amounts to m = 1 − ᾱ_1. An x_1 costs one pass a step, and each regression one pass forward and
back at a level of its own; the passes back through the pretrained model, but for those below ᾱ_1, are gone.

It is right where eps_pre is the score of what the pretrained sampler draws: with short steps, and without prompt guidance. The weights of
separate modes come late, as no score within a mode depends on them. On the mixture an update takes a fifth of backprop's CPU time, and
samples are 20 times the floor away after 300 updates and 4.7 times after 1,500, where 300 of backprop came to 2.9 times (sliced
Wasserstein; `scripts/mixture.py --config config/mixture.yaml FILE --method ctrl_efficient_adjoint`, or `ctrl`, where FILE says
`gammas: [1]`, `num_sets: 4`, `sampler: {num_steps: 64}` and `num_updates` under `finetune`).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ctrl.finetune.backprop import bounded, clip_adjoint
from ctrl.process import Denoiser, Process


def efficient_adjoint(
    process: Process,
    psi: Denoiser,
    pre: Denoiser,
    log_prob: Callable[[Tensor], Tensor],
    noise: Tensor,
    gamma: float,
    kl_weight: float = 1.0,
    *,
    active: Sequence[bool],
    steps: Tensor,
    fresh: Tensor,
    information: float,
    share: float = 1.0,
    max_adjoint_norm: float | None = None,
) -> dict[str, Tensor]:
    """Adds the gradient of `share` times the sum of the loss over the batch to every trained parameter's `.grad`.

    `steps` and `fresh`, with shapes (K, B) and (K, B, *), are those of `levels`; `information` is m; the others are `backprop`'s arguments.
    The loss is kl_weight · Σ_t w_t ‖eps_psi(x_t) − target‖², of which K terms stand for all. Returns log_prob, loss and x_0, detached; a KL
    would take passes that training does not need. Raises ValueError for a `kl_weight` of 0, where there is nothing to regress on, and as
    `end_of_control` does.
    """
    if kl_weight <= 0:
        raise ValueError("adjoint matching needs a KL: kl_weight must be above 0; maximise a reward alone by backprop")
    x_1, last = end_of_control(process, psi, noise, active)
    eps, log_p, x_0 = optimal_eps(process, pre, log_prob, noise, gamma, kl_weight, x_1, last, max_adjoint_norm)
    weights = kl_weight * last / len(steps) * torch.tensor([process.kl_weight(i) for i in range(last)])
    loss = x_1.new_zeros(len(x_1))
    for i, z in zip(steps, fresh, strict=True):
        x_t, target = noised(process, i, last, x_1, eps, z, information)
        missed = weights[i].to(x_1) * (psi(x_t, i) - target).square().flatten(1).sum(1)
        (share * missed.sum()).backward()
        loss += missed.detach()
    return {"log_prob": log_p, "loss": loss, "x_0": x_0}


def end_of_control(process: Process, psi: Denoiser, noise: Tensor, active: Sequence[bool]) -> tuple[Tensor, int]:
    """x_1 with shape (B, *), and the step that begins there, the first one of the pretrained model alone.

    Raises ValueError where the control acts to the very end, or not on the first steps.
    """
    last = sum(active)
    if not 0 < last < len(active) or not all(active[:last]):
        raise ValueError("the control must act on every step but the last ones")
    x = noise[0]
    with torch.no_grad():
        for i in range(last):
            x = process.step(i, x, psi(x, i), noise[i + 1])
    return x, last


def optimal_eps(
    process: Process, pre: Denoiser, log_prob: Callable[[Tensor], Tensor], noise: Tensor, gamma: float, kl_weight: float, x_1: Tensor,
    last: int, max_adjoint_norm: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """eps*(x_1) with shape (B, *), unbiased; log p̂(y | x_0) with shape (B,), and x_0, of what the pretrained model makes of x_1."""
    with torch.enable_grad():
        x = x_1 = x_1.detach().requires_grad_()
        eps = pre(x_1, last)
        for i in range(last, process.num_steps):
            x = process.step(i, x, eps if i == last else pre(x, i), noise[i + 1])
            x = clip_adjoint(x, 1.0, max_adjoint_norm)
        log_p = log_prob(x)
        (g,) = torch.autograd.grad(gamma * log_p.sum(), x_1)
    shift = process.scales(last, x_1)[1] * bounded(g, max_adjoint_norm) / kl_weight
    return eps.detach() - shift, log_p.detach(), x.detach()


def noised(process: Process, i: Tensor, last: int, x_1: Tensor, eps: Tensor, z: Tensor, m: float) -> tuple[Tensor, Tensor]:
    """x_t at the steps `i` with shape (B,), one for each x_1, and the target, given `eps`, eps*(x_1); both with shape (B, *)."""
    abar, abar_1 = process.abar_t[i].view(-1, *[1] * (x_1.ndim - 1)), process.abar_t[last]
    r = abar / abar_1
    scale = (1 - abar).sqrt() / (r * (1 - abar_1) + m * (1 - r))
    to_x, to_z, of_eps, of_z = (
        v.to(x_1) for v in (r.sqrt(), (1 - r).sqrt(), scale * (r * (1 - abar_1)).sqrt(), scale * m * (1 - r).sqrt())
    )
    return to_x * x_1 + to_z * z, of_eps * eps + of_z * z


def levels(active: Sequence[bool], num_levels: int, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Tensor]:
    """`steps` with shape (K, B), K = `num_levels` of the active ones for each x_1, uniform; `fresh`, z for each. `shape` is (B, *)."""
    steps = torch.randint(sum(active), (num_levels, shape[0]), generator=generator)
    return {"steps": steps, "fresh": torch.randn(num_levels, *shape, generator=generator)}


def information(process: Process, pre: Denoiser, noise: Tensor, active: Sequence[bool]) -> float:
    """m = E[eps_pre(x_1)²], of one dimension, over the pretrained model's own x_1: their Fisher information times 1 − ᾱ_1.

    Another m above 0 has the same optimum. One too small has more variance; one too large leaves little of A, and with it of what is new.
    """
    x_1, last = end_of_control(process, pre, noise, active)
    with torch.no_grad():
        return pre(x_1, last).square().mean().item()
